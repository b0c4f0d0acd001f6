"""What a user gets for a job that cannot run: a sentence and an exit code, at once, and nothing left running."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import job, processes_naming, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"sampling__topP": 0.9}, 2, "spec.sampling.topP: the trainer cannot score it"),
        ({"training__stepz": 3}, 2, "Did you mean `steps`?"),
        ({"training__steps": "forty"}, 2, "spec.training.steps: must be an integer"),
        ({"environment": {"name": "digit-copi"}}, 2, "Did you mean `digit-copy`?"),
        (
            {"environment": {"name": "reasoning-gym", "parameters": {"dataset": "no_such_dataset"}}},
            2,
            "reasoning-gym has no dataset of that name",
        ),
        ({"model": {"path": "/nonexistent/model"}}, 1, "the directory /nonexistent/model does not exist"),
        ({"staleness__maxVersions": 2, "correction": {"oldLogprobs": "Resident"}}, 2, "Use Snapshot"),
    ],
)
def test_a_job_that_cannot_run_is_refused_with_a_remedy(
    tmp_path: Path, changes: dict[str, Any], code: int, said: str
) -> None:
    seen, output = run(tmp_path, job(**changes), "--run-dir", str(tmp_path / "run"), timeout=80)
    assert said in output
    assert seen == code
    assert "Traceback" not in output
    assert processes_naming(str(tmp_path)) == []


def test_a_taken_port_is_named_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, output = run(tmp_path, job(), "--run-dir", str(tmp_path / "run"), "--nats-port", str(port))
    assert code == 1
    assert f"port {port} on 127.0.0.1 is taken" in output
    assert "--nats-port" in output
    assert processes_naming(str(tmp_path)) == []


def test_a_run_directory_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    code, output = run(tmp_path, job(), "--run-dir", str(tmp_path / "run"))
    assert code == 2
    assert "holds a run already" in output
