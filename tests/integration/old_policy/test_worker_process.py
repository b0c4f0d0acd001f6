"""An old-policy worker's process against a real nats-server; the test plays trainer and rollout workers."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rljob_api.messages import OldPolicyState, Outcome, PublishedVersion, RetainedVersions, TrajectoryHeader
from rljob_api.names import KEY_PUBLISHED, KEY_RETAINED, JobNames, old_policy_key
from rljob_api.spec import RLJob
from rljob_api.weights import Probe
from rljob_protocol.ahead import ScoreLog
from rljob_protocol.claims import TrajectoryClaims
from rljob_protocol.link import Link, StateLimits
from rljob_protocol.server import NatsServer
from rljob_protocol.streams import TrajectoryLog
from rljob_runtime.model_source import materialise
from rljob_runtime.score_codec import Scores, decode_scores
from rljob_runtime.trajectory_codec import Trajectory, encode_trajectory
from rljob_runtime.weights.encode import encode_version, model_file_blobs
from rljob_runtime.weights.nats_blobs import NatsBlobStore
from rljob_runtime.weights.publish import publish_model_files, publish_version

pytestmark = pytest.mark.timeout(240)  # importing torch and transformers takes a minute on a busy machine

UID = "old-policy-test"
TEMPERATURE = 0.7
JOB = RLJob.model_validate(
    {
        "metadata": {"name": "j"},
        "spec": {
            "model": {"random": {"hiddenSize": 32, "intermediateSize": 32, "layers": 1, "heads": 1}},
            "environment": {"name": "digit-copy", "parameters": {"digits": 4, "turns": 6}},
            "sampling": {"maxTokens": 4, "maxTrajectoryTokens": 128, "temperature": TEMPERATURE},
            "training": {"steps": 99, "tasksPerStep": 1, "learningRate": 0.001, "computeType": "Float32"},
            "staleness": {"maxVersions": 2},
            "correction": {"oldLogprobs": "Dedicated"},
            "oldPolicyPool": {"replicas": 2},
            "rolloutPools": [{"name": "main", "engine": {"simulated": {}}}],
        },
    }
)


class Job:
    """Publishes versions, each with other weights, and finished trajectories; reads the scores."""

    def __init__(self, link: Link, server: NatsServer, directory: Path) -> None:
        self.link, self.store, self.server, self.directory = link, NatsBlobStore(link), server, directory
        self.log, self.claims = TrajectoryLog(link), TrajectoryClaims(link)
        self.models = {-1: AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32).eval()}
        self.published: dict[int, PublishedVersion] = {}
        self.revisions: dict[str, int | None] = {KEY_PUBLISHED: None, KEY_RETAINED: None}
        self.trajectories: dict[int, Trajectory] = {}
        self.scores: dict[int, list[Scores]] = {}
        self.processes: list[asyncio.subprocess.Process] = []

    async def publish(self, version: int, *, keep: int = 9, wrong_probe: bool = False) -> None:
        self.models[version] = model = copy.deepcopy(self.models[max(self.models)])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version)))
        tokens = np.arange(3, 14, dtype=np.int32)
        probe = Probe(
            tokens=tuple(tokens.tolist()),
            logprobs=tuple((logprobs(model, tokens, 1.0)[1:] - (0.1 if wrong_probe else 0.0)).tolist()),
            compute_type="Float32",
        )
        files = model_file_blobs(self.directory / "model")
        await publish_model_files(self.store, files)
        encoded = encode_version(
            model.state_dict(),
            epoch=1,
            version=version,
            compute_type="Float32",
            model_files=[file for file, _ in files],
            probe=probe,
        )
        manifest = await publish_version(self.store, encoded)
        self.published[version] = newest = PublishedVersion(
            epoch=1, version=version, step=version, manifest=manifest, num_bytes=encoded.manifest.num_bytes
        )
        retained = tuple(self.published[v] for v in sorted(self.published)[-keep:])
        for key, value in ((KEY_RETAINED, RetainedVersions(epoch=1, versions=retained)), (KEY_PUBLISHED, newest)):
            self.revisions[key] = await self.link.write(key, value, expected_revision=self.revisions[key])
        await self.link.hint(self.link.names.published_hint)

    async def finish(self, task: int, *versions: int, sample: int = 0) -> int:
        """A rollout worker stores a trajectory with a turn of each version; its sequence."""
        chance = np.random.default_rng(task)
        lengths = chance.integers(3, 8, len(versions))
        turn = np.concatenate([[-1, -1], *([[i] * n + [-1] for i, n in enumerate(lengths)])]).astype(np.int32)
        made = np.array([versions[t] if t >= 0 else -1 for t in turn], np.int32)
        header = TrajectoryHeader(
            task=task,
            sample=sample,
            attempt=1,
            epoch=1,
            worker="main-0",
            incarnation="a",
            outcome=Outcome.FINISHED,
            turn_rewards=(0.0,) * len(versions),
        )
        tokens = chance.integers(3, 14, len(turn)).astype(np.int32)
        trajectory = Trajectory(header, tokens, turn, made, np.where(turn >= 0, -1.0, 0.0).astype(np.float32))
        sequence = await self.log.append(task, sample, encode_trajectory(trajectory))
        self.trajectories[sequence] = trajectory
        return sequence

    async def read(self) -> None:
        async for _, data in ScoreLog(self.link).read(0):
            scores = decode_scores(data)
            self.scores.setdefault(scores.header.sequence, []).append(scores)

    async def start(self, worker: str = "old-policy-0") -> asyncio.subprocess.Process:
        environ = os.environ | {
            "RLJOB_CONFIG": str(self.directory / "job.json"),
            "RLJOB_UID": UID,
            "RLJOB_NATS_URL": self.server.url,
            "RLJOB_CACHE_DIR": str(self.directory / worker),
            "RLJOB_WORKER": worker,
            "RLJOB_POOL": "old-policy",
            "RLJOB_READY_FILE": str(self.directory / "ready"),
            "RLJOB_TERMINATION_FILE": str(self.directory / "end"),
        }
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "rljob_runtime.old_policy", env=environ)
        self.processes.append(process)
        return process

    async def state(self, worker: str = "old-policy-0") -> OldPolicyState | None:
        return await self.link.read_live(old_policy_key(worker), OldPolicyState)

    async def until(self, condition: Callable[[OldPolicyState], bool], seconds: float = 150.0) -> OldPolicyState:
        async with asyncio.timeout(seconds):
            while True:
                state = await self.state()
                if state is not None and condition(state):
                    return state
                await asyncio.sleep(0.05)

    async def scored(self, *sequences: int, seconds: float = 150.0) -> None:
        async with asyncio.timeout(seconds):
            while not set(sequences) <= self.scores.keys():
                await asyncio.sleep(0.05)

    def largest_error(self, sequence: int) -> float:
        """Of all copies, against a forward of plain transformers under each token's own version."""
        trajectory, errors = self.trajectories[sequence], [0.0]
        for scores in self.scores[sequence]:
            assert (scores.weight_version == trajectory.weight_version[scores.positions]).all()
            for version in set(scores.weight_version.tolist()):
                places = scores.positions[scores.weight_version == version]
                expected = logprobs(self.models[version], trajectory.tokens, TEMPERATURE)[places]
                errors.append(float(np.abs(scores.logprobs[scores.weight_version == version] - expected).max()))
        return max(errors)


def logprobs(model: torch.nn.Module, tokens: np.ndarray, temperature: float) -> np.ndarray:  # type: ignore[type-arg]
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1] / temperature
    values = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0].numpy()
    return np.concatenate([[0.0], values]).astype(np.float32)


@pytest.fixture
async def job(tmp_path: Path, server: NatsServer) -> AsyncIterator[Job]:
    link = await Link.connect(JobNames(UID), server.url, client_name="test")
    limits = StateLimits(max_tasks=256, trajectory_bytes=16 << 20, max_payload_bytes=8 << 20, old_policy_workers=2)
    await link.ensure_state(limits)
    materialise(JOB.spec.model, tmp_path / "model")
    (tmp_path / "job.json").write_text(JOB.model_dump_json(by_alias=True))
    made = Job(link, server, tmp_path)
    reading = asyncio.create_task(made.read())
    try:
        yield made
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        for process in made.processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
        await link.close()


async def test_killed_in_mid_run_and_drained_at_the_end_the_pool_scores_every_token_under_its_own_version(
    job: Job, tmp_path: Path
) -> None:
    for version in (0, 1, 2):
        await job.publish(version)
    first = [await job.finish(task, task % 3, min(2, task % 3 + 1)) for task in range(30)]
    in_hand = [await job.finish(50 + task, 2, 3) for task in range(6)]  # version 3 is not there yet
    process = await job.start()
    await job.scored(*first)
    await job.until(lambda state: state.backlog == len(in_hand))
    async with asyncio.timeout(30):  # written once a second
        while not (tmp_path / "ready").exists():
            await asyncio.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    await job.log.cut(first[20])  # the trainer trained some meanwhile
    second = [await job.finish(100 + task, 1, 2) for task in range(10)]
    process = await job.start()
    await job.scored(*second)
    assert not set(in_hand) & job.scores.keys()

    # The version comes; then trajectories with tokens over the bound, and with tokens of a version that is not kept.
    await job.publish(3)
    await job.scored(*in_hand)
    await job.until(lambda state: state.version == 3)
    too_old, fresh = await job.finish(201, 0, 3), await job.finish(202, 1, 3)
    await job.scored(too_old, fresh)
    await job.publish(4, keep=2)
    await job.until(lambda state: state.version == 4)
    late = await job.finish(203, 1, 4)
    await job.scored(late)
    assert max(job.largest_error(sequence) for sequence in job.scores) <= 1e-5
    complete = {
        s: all(len(c.positions) == job.trajectories[s].num_model_tokens for c in copies)
        for s, copies in job.scores.items()
    }
    assert [s for s, is_complete in complete.items() if not is_complete] == [too_old, late]
    assert {int(v) for s in (too_old, late) for v in job.scores[s][0].weight_version} == {3, 4}

    expected = len(second) + len(in_hand) + 3
    state = await job.until(lambda state: state.backlog == 0 and state.trajectories_scored >= expected)
    over_bound, gone = (
        int((job.trajectories[sequence].weight_version == version).sum())
        for sequence, version in ((too_old, 0), (late, 1))
    )
    assert state.message == f"tokens not scored: {over_bound} OverBound, {gone} VersionGone"
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 60) == 0
    assert not (tmp_path / "ready").exists()
    assert (await job.until(lambda state: state.message == "drained")).trajectories_scored == state.trajectories_scored
    assert await job.claims.backlog() == 0


async def test_a_version_whose_probe_is_wrong_ends_the_process_with_a_word(job: Job, tmp_path: Path) -> None:
    await job.publish(0, wrong_probe=True)
    process = await job.start()
    assert await asyncio.wait_for(process.wait(), 150) == 70
    assert "not what the trainer published" in json.loads((tmp_path / "end").read_text())["message"]
    assert job.scores == {}


async def test_a_job_without_a_pool_is_refused(job: Job, tmp_path: Path) -> None:
    document = json.loads(JOB.model_dump_json(by_alias=True))
    del document["spec"]["oldPolicyPool"]
    (tmp_path / "job.json").write_text(json.dumps(document))
    process = await job.start()
    assert await asyncio.wait_for(process.wait(), 150) == 78
    end = json.loads((tmp_path / "end").read_text())
    assert (end["reason"], end["exitCode"]) == ("InvalidConfiguration", 78)
    assert "the job has no old-policy pool" in end["message"]
