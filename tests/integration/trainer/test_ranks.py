"""One and two ranks: exact values, equal updates, checkpoints that change the number of ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.integration.trainer.ranks import check_checkpoint, run_checks
from tests.integration.trainer.toy import make_model

from rljob_runtime.trainer.distributed import distributed_world

ROOT = Path(__file__).parents[3]


def torchrun(folder: Path, script: str = "ranks.py") -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"),
        *(f"--master-port={port}", f"--log-dir={folder / 'torchrun'}"),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    process = subprocess.Popen(
        [sys.executable, *command, str(Path(__file__).with_name(script)), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Findings of one rank, then of two, then of one that goes on from the checkpoint of two."""
    folder = tmp_path_factory.mktemp("ranks")
    make_model(folder / "tied", tied=True)
    make_model(folder / "untied")
    make_model(folder / "flat", sharpness=0.05)
    with distributed_world("cpu", timeout_seconds=60) as world:
        run_checks(folder, world)
        torchrun(folder)
        later = check_checkpoint(folder, world, save=False, load_from=2)
        (folder / "one-from-two.json").write_text(json.dumps(later))
    return folder


def findings(folder: Path, size: int) -> dict[str, Any]:
    return json.loads((folder / f"world-{size}" / "findings.json").read_text())


@pytest.mark.parametrize("size", [1, 2])
def test_resident_and_snapshot_values_are_bitwise_those_of_the_published_weights(folder: Path, size: int) -> None:
    of_ranks = findings(folder, size)["exact"]
    assert len(of_ranks) == size
    for claims in of_ranks:
        assert len(claims) == 4 * 9 + 2 * 10
        assert [claim for claim, holds in claims.items() if not holds] == []


@pytest.mark.parametrize("case", ["one update", "four updates", "a rank without rows"])
def test_one_and_two_ranks_make_the_same_update(folder: Path, case: str) -> None:
    one, two = (
        {name: value for name, value in findings(folder, size)["updates"].items() if name.startswith(case)}
        for size in (1, 2)
    )
    assert one == pytest.approx(two, rel=1e-5, abs=1e-6)
    assert one[f"{case}: num_updates"] == {"one update": 1, "four updates": 4, "a rank without rows": 2}[case]
    assert 0.02 < one[f"{case}: keep_fraction"] < 1 and one[f"{case}: exact_fraction"] == 1
    weights, of_two = (load_file(folder / f"world-{size}" / f"{case}.safetensors") for size in (1, 2))
    start = load_file(folder / "flat" / "model.safetensors")
    assert weights.keys() == of_two.keys() == start.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, of_two[name], rtol=0, atol=1e-6)
        assert (tensor - start[name]).abs().max() > 1e-4


@pytest.mark.parametrize(("size", "came_from"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, size: int, came_from: int) -> None:
    if (size, came_from) == (1, 2):
        resumed = json.loads((folder / "one-from-two.json").read_text())
    else:
        resumed = findings(folder, size)["checkpoints"][f"from {came_from}"]
    uninterrupted = findings(folder, size)["checkpoints"]["uninterrupted"]
    assert resumed == pytest.approx(uninterrupted, rel=1e-6)
    if size == came_from == 1:
        assert resumed == uninterrupted
