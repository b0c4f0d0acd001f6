"""What a run does when the world around it fails: the server, the disk, the bytes on it, and foreign messages."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest
from safetensors.numpy import save

from rljob_api.messages import Outcome, TrajectoryHeader
from rljob_api.names import JobNames
from rljob_api.trajectory import HEADER_KEY
from rljob_protocol.server import free_port
from tests.e2e.running import children_of, job, processes_naming, started, summary, wait_for_steps

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

OUTAGE_SECONDS = 20.0
SHARED_DIRECTORY = {"weights": {"persistentVolumeClaim": {"claimName": "weights"}}, "checkpoint": {"everySteps": 10}}


def check_ended_well(directory: Path, code: int, steps: int) -> dict[str, Any]:
    """Exit code, exactness, conservation and processes of a run below `directory`; its summary."""
    assert code == 0, (directory / "output.txt").read_text()
    seen = summary(directory / "run")
    assert seen["finished"] is True
    assert seen["steps"] == steps
    assert seen["exactFraction"] == 1.0
    assert seen["conservation"]["problems"] == []
    assert seen["conservation"]["lost"] == 0
    assert seen["tokensLostToInterruptions"] == 0
    assert processes_naming(str(directory)) == []
    return seen


def server_of(run_process: int) -> int:
    (found,) = [pid for pid in children_of(run_process) if b"nats-server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def log_lines(file: Path, event: str) -> list[dict[str, Any]]:
    """Lines of a process's log that report this event."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("{") and (entry := json.loads(line))["event"] == event:
            found.append(entry)
    return found


def test_a_server_that_does_not_answer_for_twenty_seconds_costs_time_and_no_token(tmp_path: Path) -> None:
    with started(tmp_path, job(training__steps=16), "--run-dir", str(tmp_path / "run")) as process:
        wait_for_steps(tmp_path / "run", 4)
        server = server_of(process.pid)
        os.kill(server, signal.SIGSTOP)
        try:
            time.sleep(OUTAGE_SECONDS)
        finally:
            os.kill(server, signal.SIGCONT)
        code = process.wait(240)
    seen = check_ended_well(tmp_path, code, 16)
    assert seen["workerRestarts"] == 0


@contextmanager
def server_gone_and_its_port_taken(run_process: int) -> Iterator[int]:
    """Kill the run's nats-server and listen on its port in its place, before the run can start another."""
    server = server_of(run_process)
    command = Path(f"/proc/{server}/cmdline").read_bytes().split(b"\0")
    configuration = Path(command[command.index(b"-c") + 1].decode()).read_text()
    port = int(configuration.split('"')[1].rpartition(":")[2])
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        os.kill(run_process, signal.SIGSTOP)  # so that the test wins the race for the port
        try:
            os.kill(server, signal.SIGKILL)
            deadline = time.monotonic() + 5
            while True:
                try:
                    taken.bind(("127.0.0.1", port))
                    break
                except OSError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(0.01)
            taken.listen()
        finally:
            os.kill(run_process, signal.SIGCONT)
        yield port


def test_a_killed_worker_and_a_server_that_is_away_for_twenty_seconds_cost_counted_tokens_and_nothing_else(
    tmp_path: Path,
) -> None:
    run_directory = tmp_path / "run"
    document = job(training__steps=24, messaging={"trajectoryStreamBytes": 64 << 20})
    with started(tmp_path, document, "--run-dir", str(run_directory)) as process:
        wait_for_steps(run_directory, 3)
        workers = [
            pid
            for pid in children_of(process.pid)
            if b"rljob_runtime.rollout" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        wait_for_steps(run_directory, 8)
        with server_gone_and_its_port_taken(process.pid) as port:
            time.sleep(OUTAGE_SECONDS)
            assert process.poll() is None
        code = process.wait(240)
    output = (tmp_path / "output.txt").read_text()
    assert code == 0, output
    assert "main-0 ended" in output or "main-1 ended" in output
    assert f"nats-server did not start (port {port} on 127.0.0.1 is taken" in output
    assert "nats-server is back after" in output
    seen = summary(run_directory)
    assert (seen["finished"], seen["steps"], seen["workerRestarts"], seen["exactFraction"]) == (True, 24, 1, 1.0)
    assert seen["conservation"]["problems"] == []
    checked = subprocess.run(
        [sys.executable, "-m", "rljob.main", "verify", str(run_directory), "--tokens", "500"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    assert processes_naming(str(tmp_path)) == []


def _small_disk(place: Path, size: str) -> list[str]:
    """Wrapper that mounts a small disk, seen by the wrapped command alone and gone with it; needs no privileges."""
    place.mkdir(parents=True)
    wrapper = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} none '{place}' && "
    probe = subprocess.run([*wrapper, f"{mount} true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"this kernel lets nobody mount a disk in a user namespace: {probe.stderr.strip()}")
    return [*wrapper, f'{mount} exec "$@"', "sh"]


@pytest.mark.parametrize(
    ("folder", "size", "storage", "said", "remedy"),
    [
        ("weights", "512k", SHARED_DIRECTORY, "no room for blob w-1-", "give the volume more space"),
        (
            "nats",
            "10m",
            {"checkpoint": {"everySteps": 100}},
            "has no room left for messages",
            "go on with rljob run --resume",
        ),
    ],
    ids=["shared directory", "messaging store"],
)
def test_a_disk_that_fills_up_ends_the_run_with_what_to_do(
    tmp_path: Path, folder: str, size: str, storage: dict[str, Any], said: str, remedy: str
) -> None:
    wrapper = _small_disk(tmp_path / "run" / folder, size)
    document = job(training__steps=400, storage=storage)
    with started(tmp_path, document, "--run-dir", str(tmp_path / "run"), wrapper=wrapper) as process:
        code = process.wait(240)
    output = (tmp_path / "output.txt").read_text()
    assert code == 1, output
    assert "rljob: the run failed: " in output
    failure = output.split("rljob: the run failed: ")[1].splitlines()[0]
    assert said in failure
    assert remedy in failure
    assert "Traceback" not in output
    assert processes_naming(str(tmp_path)) == []


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def malformed_trajectories() -> list[bytes]:
    """Garbage, cut-off messages, and well-formed safetensors that are no trajectory."""
    header = TrajectoryHeader(
        task=0,
        sample=0,
        attempt=1,
        epoch=1,
        worker="foreign",
        incarnation="x",
        outcome=Outcome.FINISHED,
        turn_rewards=(1,),
    )
    described = {HEADER_KEY: header.to_bytes().decode()}
    right = {
        "tokens": np.array([1, 2, 3], np.int32),
        "turn": np.array([-1, 0, 0], np.int32),
        "weight_version": np.array([-1, 0, 0], np.int32),
        "behavior_logprobs": np.array([0, -1, -1], np.float32),
    }
    whole = save(right, described)
    chance = random.Random(3)
    return [
        b"",
        b"\x00",
        chance.randbytes(300),
        b'{"task": 0}',
        *(whole[: chance.randrange(len(whole))] for _ in range(20)),
        (1 << 62).to_bytes(8, "little") + whole[8:],
        save(right),
        save(right, {HEADER_KEY: "{"}),
        save(right, {HEADER_KEY: "[]"}),
        save({name: tensor for name, tensor in right.items() if name != "turn"}, described),
        save({**right, "more": right["turn"]}, described),
        save({**right, "tokens": right["tokens"].astype(np.int64)}, described),
        save({**right, "behavior_logprobs": right["behavior_logprobs"].astype(np.float16)}, described),
        save({**right, "behavior_logprobs": np.array([0, np.nan, -1], np.float32)}, described),
        save({**right, "turn": np.array([-1, 0], np.int32)}, described),
        save({**right, "tokens": np.array([[1], [2], [3]], np.int32)}, described),
        save({name: tensor[:0] for name, tensor in right.items()}, described),
    ]


def damaged_until_refused(run_directory: Path, damage: Callable[[Path], None]) -> list[dict[str, Any]]:
    """Damage one version after the other as it appears, until the worker refuses one: it may be quicker than us."""
    weights, refused, damaged = run_directory / "weights", [], []
    log = run_directory / "logs" / "main-0.log"
    known = {path.name for path in weights.glob("w-*")}
    deadline = time.monotonic() + 60
    while not refused and time.monotonic() < deadline:
        if new := [path for path in weights.glob("w-*") if path.name not in known]:
            damage(new[0])
            known |= {path.name for path in new}
            damaged.append(int(new[0].name.split("-")[2]))
            time.sleep(0.4)
            refused = [line for line in log_lines(log, "version refused") if line["weight_version"] in damaged]
        time.sleep(0.0005)
    assert refused, f"versions {damaged} were damaged and served before that"
    return refused


def test_a_damaged_version_is_refused_until_it_is_stored_again_and_malformed_trajectories_for_good(
    tmp_path: Path,
) -> None:
    port, steps = free_port(), 20
    run_directory = tmp_path / "run"
    messages = malformed_trajectories()

    async def publish() -> None:
        names = JobNames(json.loads((run_directory / "run.json").read_text())["uid"])
        client = await nats.connect(f"nats://127.0.0.1:{port}")
        try:
            for number, message in enumerate(messages):
                await client.jetstream().publish(names.trajectory_subject(0, number), message)
        finally:
            await client.close()

    arguments = ("--run-dir", str(run_directory), "--nats-port", str(port))
    # One worker and no staleness: without the version that it refuses the run can never go on.
    document = job(
        training__steps=steps, storage=SHARED_DIRECTORY, staleness__maxVersions=0, rolloutPools__0__replicas=1
    )
    with started(tmp_path, document, *arguments) as process:
        wait_for_steps(run_directory, 3)
        asyncio.run(publish())
        refused = [line for damage in (_flip_a_bit, _cut_off) for line in damaged_until_refused(run_directory, damage)]
        code = process.wait(240)
    check_ended_well(tmp_path, code, steps)

    assert all(line["corrupt"] is True and "altered" in line["error"] for line in refused)
    restored = {
        line["weight_version"]: line["time"]
        for line in log_lines(
            run_directory / "logs" / "trainer.log", "stored weight version is damaged; it is stored again"
        )
    }
    served = {
        line["weight_version"]: line["time"]
        for line in log_lines(run_directory / "logs" / "main-0.log", "version served")
    }
    assert set(restored) == {line["weight_version"] for line in refused}
    assert all(line["time"] < restored[line["weight_version"]] < served[line["weight_version"]] for line in refused)

    malformed = log_lines(run_directory / "logs" / "trainer.log", "trajectory refused")
    assert len(malformed) == len(messages)
    assert all(line["error"].startswith(("trajectory", "TrajectoryHeader")) for line in malformed)
