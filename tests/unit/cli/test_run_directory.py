from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.api.documents import MINIMAL
from tests.unit.cli.synthetic import report, worker, write_run

from rljob.run_directory import RunDirectory
from rljob_api.errors import BadInput, StorageError
from rljob_api.validate import parse_job


def test_a_new_run_is_laid_out_and_read_back(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "deep" / "run")
    job = parse_job(MINIMAL)
    info = directory.create(job, "abc")
    assert directory.read_info() == info
    assert directory.read_job().spec == job.spec
    directory.write_info(replace(info, attempts=2))
    assert directory.read_info().attempts == 2


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create(parse_job(MINIMAL), "abc")
    with pytest.raises(BadInput, match="holds a run already: go on with it by --resume"):
        directory.create(parse_job(MINIMAL), "def")
    assert directory.read_info().uid == "abc"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").create(parse_job(MINIMAL), "abc")


@pytest.mark.parametrize("text", ["", "{}", "[]", json.dumps({"uid": "a", "who": "b"})])
def test_a_folder_without_a_usable_run_json_is_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BadInput, match="is not the folder of a run"):
        RunDirectory(tmp_path).read_info()


def test_only_one_process_runs_a_run_at_a_time(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    with first.locked(), pytest.raises(BadInput, match="is being run by another process"), second.locked():
        pytest.fail("both hold the lock")
    with second.locked():
        pass


def test_steps_of_an_abandoned_attempt_are_replaced_by_the_resumed_ones(tmp_path: Path) -> None:
    """The first attempt trained to step 4, its checkpoint was of step 2."""
    steps = [report(step) for step in (1, 2, 3, 4)] + [report(step, epoch=2, version=step + 3) for step in (3, 4, 5)]
    directory = write_run(tmp_path / "run", steps, [])
    assert [(step.step, step.epoch) for step in directory.read_steps()] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_a_step_beyond_the_resumed_attempts_last_one_does_not_count(tmp_path: Path) -> None:
    """The second attempt was stopped before it came as far as the first."""
    steps = [report(step) for step in (1, 2, 3, 4)] + [report(3, epoch=2, version=6)]
    directory = write_run(tmp_path / "run", steps, [])
    assert [(step.step, step.epoch) for step in directory.read_steps()] == [(1, 1), (2, 1), (3, 2)]


def test_workers_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    states = [worker(10, 8), worker(5, 5, incarnation="b")]
    assert write_run(tmp_path / "run", [], states).read_workers() == states
