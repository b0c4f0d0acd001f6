from __future__ import annotations

import json
from pathlib import Path

import pytest

from rljob_api.errors import SpecError
from rljob_runtime.settings import RECORD_BYTES, RuntimeSettings

JOB = {
    "metadata": {"name": "sort-digits"},
    "spec": {
        "model": {"random": {}},
        "environment": {"name": "digit-copy"},
        "training": {"steps": 1, "tasksPerStep": 1, "learningRate": 0.001},
        "rolloutPools": [{"name": "main"}],
    },
}


def environ(tmp_path: Path, job: object = JOB, **more: str) -> dict[str, str]:
    config = tmp_path / "job.json"
    config.write_text(json.dumps(job))
    given = {
        "RLJOB_CONFIG": str(config),
        "RLJOB_UID": "u1",
        "RLJOB_NATS_URL": "nats://127.0.0.1:1",
        "RLJOB_CACHE_DIR": str(tmp_path / "cache"),
    }
    return {**given, **more}


def test_a_trainer_needs_four_variables_and_gets_defaults_for_the_rest(tmp_path: Path) -> None:
    settings = RuntimeSettings.from_environment(environ(tmp_path))
    assert settings.job.metadata.name == "sort-digits"
    assert (settings.attempt, settings.record_bytes, settings.record_dir) == (1, RECORD_BYTES, None)
    assert (settings.credentials, settings.checkpoint_dir, settings.weights_dir) == (None, None, None)
    assert settings.job_names.uid == "u1"


def test_everything_a_host_sets_arrives(tmp_path: Path) -> None:
    settings = RuntimeSettings.from_environment(
        environ(
            tmp_path,
            RLJOB_NATS_CREDENTIALS="/run/user.creds",
            RLJOB_CHECKPOINT_DIR="/ckpt",
            RLJOB_WEIGHTS_DIR="/weights",
            RLJOB_RECORD_DIR="/record",
            RLJOB_RECORD_BYTES="77",
            RLJOB_WORKER="main-0",
            RLJOB_POOL="main",
            RLJOB_INCARNATION="i1",
            RLJOB_ATTEMPT="4",
        )
    )
    assert settings.credentials == Path("/run/user.creds") and settings.checkpoint_dir == Path("/ckpt")
    assert settings.weights_dir == Path("/weights") and settings.record_dir == Path("/record")
    assert (settings.record_bytes, settings.attempt) == (77, 4)
    assert (settings.worker, settings.incarnation, settings.rollout_pool().name) == ("main-0", "i1", "main")


def test_all_missing_variables_are_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        RuntimeSettings.from_environment({"RLJOB_ATTEMPT": "two"})
    paths = [violation.path for violation in caught.value.violations]
    assert paths == ["RLJOB_CONFIG", "RLJOB_UID", "RLJOB_NATS_URL", "RLJOB_CACHE_DIR", "RLJOB_ATTEMPT"]


def test_a_wrong_job_file_is_refused_with_the_place(tmp_path: Path) -> None:
    broken = {**JOB, "spec": {**JOB["spec"], "training": {"steps": 0, "tasksPerStep": 1, "learningRate": 0.1}}}  # type: ignore[dict-item]
    with pytest.raises(SpecError, match=r"spec.training.steps: Input should be greater than or equal to 1 \(got 0\)"):
        RuntimeSettings.from_environment(environ(tmp_path, broken))
    with pytest.raises(SpecError, match="RLJOB_CONFIG: cannot be read: No such file"):
        RuntimeSettings.from_environment({**environ(tmp_path), "RLJOB_CONFIG": str(tmp_path / "none.json")})


def test_a_rollout_worker_needs_a_name_an_incarnation_and_a_pool_of_the_job(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="RLJOB_WORKER: this environment variable is not set"):
        RuntimeSettings.from_environment(environ(tmp_path)).rollout_pool()
    stray = environ(tmp_path, RLJOB_WORKER="x-0", RLJOB_POOL="x", RLJOB_INCARNATION="1")
    with pytest.raises(SpecError, match=r"RLJOB_POOL: the job has no such rollout pool \(got x\). It has: main."):
        RuntimeSettings.from_environment(stray).rollout_pool()
