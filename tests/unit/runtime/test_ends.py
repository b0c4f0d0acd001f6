"""How processes of pods say why they ended, when a worker is ready, and that a GPU is never done without in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from rljob_api.errors import AcceleratorMissing, RljobError, SpecError
from rljob_api.messages import PublishedVersion
from rljob_api.names import ENV_ACCELERATOR
from rljob_api.weights import Blob
from rljob_runtime import termination
from rljob_runtime.accelerator import check_accelerator
from rljob_runtime.rollout.readiness import Readiness
from rljob_runtime.termination import STOPPED, Termination
from rljob_runtime.trainer.launch import EXIT_STOPPED, cause

EARLY, LATE = "2026-11-23T01:00:00.120Z", "2026-11-23T01:00:00.480Z"


def end(reason: str, time: str = EARLY, rank: int = 0, code: int = 1) -> Termination:
    return Termination(reason, code, time, "because", rank)


@pytest.mark.parametrize(
    ("code", "ends", "was_stopped", "expected"),
    [
        (0, [], False, None),
        (1, [end("RendezvousFailed", LATE, 0), end("AcceleratorMissing", EARLY, 1)], False, ("AcceleratorMissing", 1)),
        (1, [end(STOPPED, code=0), end("TrainerFailed", LATE, 1)], True, ("TrainerFailed", 1)),
        (0, [end(STOPPED, code=0), end(STOPPED, rank=1, code=0)], True, (STOPPED, EXIT_STOPPED)),
        (1, [], True, (STOPPED, EXIT_STOPPED)),  # told to go before a rank could say anything
        (1, [], False, ("TrainerFailed", 1)),  # killed
        (-9, [], False, ("TrainerFailed", 137)),
    ],
)
def test_the_earliest_failure_of_the_ranks_is_the_pods_end(
    code: int, ends: list[Termination], was_stopped: bool, expected: tuple[str, int] | None
) -> None:
    found = cause(code, ends, was_stopped=was_stopped)
    assert (found and (found.reason, found.exit_code)) == expected


def test_a_termination_survives_its_file_and_is_cut_to_what_kubernetes_keeps(tmp_path: Path) -> None:
    path = tmp_path / "end"
    termination.write(Termination("TrainerFailed", 1, EARLY, "x" * 9000, 3), path)
    text = path.read_text()
    assert len(text.encode()) < 4096
    assert Termination.from_json(text) == Termination("TrainerFailed", 1, EARLY, "x" * termination.MAX_MESSAGE, 3)
    with pytest.raises(ValueError, match="not a termination"):
        Termination.from_json('["no"]')
    termination.write(end("A"), tmp_path / "absent" / "end")  # not worth failing for


def test_moments_are_told_apart_within_a_second() -> None:
    assert termination.text_of(1_795_395_600.1239) == "2026-11-23T01:00:00.123Z"


def test_all_that_no_new_attempt_can_mend_has_one_reason() -> None:
    assert termination.reason_of(SpecError(())) == "InvalidConfiguration"
    assert termination.reason_of(AcceleratorMissing("x")) == "AcceleratorMissing"
    assert termination.reason_of(RljobError("x")) == "RljobError"
    assert termination.reason_of(ValueError("x")) == "TrainerFailed"


def test_who_asked_for_a_gpu_gets_one_or_an_error() -> None:
    check_accelerator({}, is_available=False)
    check_accelerator({ENV_ACCELERATOR: "cuda"}, is_available=True)
    with pytest.raises(AcceleratorMissing, match="finds no CUDA device"):
        check_accelerator({ENV_ACCELERATOR: "cuda"}, is_available=False)


def version(number: int) -> PublishedVersion:
    blob = Blob(name="m", sha256="0" * 64, num_bytes=1)
    return PublishedVersion(epoch=1, version=number, step=number, manifest=blob, num_bytes=1)


def test_a_worker_becomes_ready_within_the_bound_and_stops_well_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    path.touch()
    readiness = Readiness(path, max_versions=4)
    assert not path.exists(), "left by the container before"
    readiness.update(None, version(3))
    assert not path.exists()
    readiness.update(version(3), version(8))
    assert not path.exists(), "5 behind, and not ready yet"
    readiness.update(version(4), version(8))
    assert path.exists()
    for newest in range(8, 15):
        readiness.update(version(4), version(newest))
        assert path.exists(), f"{newest - 4} behind"
    readiness.update(version(4), version(15))
    assert not path.exists(), "11 behind"
    readiness.update(version(10), version(15))
    assert not path.exists(), "5 behind: the way back is within the bound"
    readiness.update(version(11), version(15))
    assert path.exists()
    readiness.update(version(11), version(9))  # a trainer that went back to its checkpoint
    assert path.exists()
    readiness.end()
    assert not path.exists()


def test_a_synchronous_worker_stays_ready_through_a_swap(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    readiness = Readiness(path, max_versions=0)
    readiness.update(version(3), version(3))
    readiness.update(version(3), version(4))
    assert path.exists()
