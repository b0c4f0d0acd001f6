from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from tests.unit.cli.synthetic import RecordedRun, recorded_run, report, worker

from rljob.record import Record, read_step
from rljob.verify import ChosenRow, choose_rows, verify
from rljob_api.errors import BadInput, MalformedMessage, StorageError

TOKENS = 150


@pytest.fixture
def run(tmp_path: Path) -> RecordedRun:
    return recorded_run(tmp_path / "run")


def outcome(run: RecordedRun, tokens: int = TOKENS) -> tuple[int, str]:
    out = io.StringIO()
    code = verify(run.directory.root, minimum_tokens=tokens, out=out)
    return code, out.getvalue()


def failures(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("  FAIL")]


def test_a_run_whose_old_logprobs_are_those_of_the_tokens_versions_passes(run: RecordedRun) -> None:
    code, text = outcome(run)
    assert (code, failures(text)) == (0, [])
    assert text.count("  PASS") == 5
    assert "3 versions rebuilt" in text


def test_every_staleness_is_checked_and_gets_its_row_in_the_table(run: RecordedRun) -> None:
    _, text = outcome(run)
    rows = {int(line.split()[0]): line.split() for line in text.splitlines() if line[:12].strip().isdigit()}
    assert sorted(rows) == [0, 1, 2]
    assert all(int(row[2]) > 0 and float(row[3]) < 1e-5 for row in rows.values())
    assert all(float(row[5]) == pytest.approx(1e-4, rel=0.05) for row in rows.values()), "log r_d as it was made"


def test_one_logprob_off_by_a_thousandth_is_found(run: RecordedRun) -> None:
    place = int(np.flatnonzero(run.steps[2]["turn"] >= 0)[5])
    run.steps[2]["old_logprobs"][place] += 1e-3
    run.write()
    code, text = outcome(run, 10_000 // 50)
    assert code == 1
    assert "1 tokens differ by more than 1e-05, the worst by 0.001" in text


def test_a_nan_is_a_failure_and_not_a_small_difference(run: RecordedRun) -> None:
    place = int(np.flatnonzero(run.steps[2]["turn"] >= 0)[5])
    run.steps[2]["old_logprobs"][place] = np.nan
    run.write()
    code, text = outcome(run, 200)
    assert code == 1
    assert "1 log-probabilities are not finite" in text


def test_a_wrong_version_tag_is_found(run: RecordedRun) -> None:
    """The old log-probabilities are of version 0; the label says 1."""
    step = run.steps[3]
    step["weight_version"][step["weight_version"] == 0] = 1
    run.write()
    code, text = outcome(run, 200)
    assert code == 1
    assert "tokens differ by more than 1e-05" in text


def test_a_wrong_temperature_is_found(run: RecordedRun, tmp_path: Path) -> None:
    path = run.record / "steps" / "000002.safetensors"
    path.write_bytes(path.read_bytes().replace(b'\\"temperature\\": 0.7', b'\\"temperature\\": 0.8'))
    code, text = outcome(run, 200)
    assert code == 1
    assert "tokens differ by more than 1e-05" in text


def test_a_sample_trained_in_two_steps_is_found(run: RecordedRun) -> None:
    run.headers[3][1] = run.headers[1][2]
    run.write()
    code, text = outcome(run)
    assert code == 1
    assert "task 1, sample 2: 2 times" in text
    assert len(failures(text)) == 1


def test_a_step_that_a_resume_trained_anew_does_not_count_twice(run: RecordedRun) -> None:
    """The attempt that was abandoned had trained steps 2 and 3; the later one trained only step 2 again."""
    path = run.record / "steps" / "000002.safetensors"
    path.write_bytes(
        path.read_bytes().replace(b'\\"epoch\\": 1, \\"version_start', b'\\"epoch\\": 2, \\"version_start')
    )
    assert [(step.step, step.epoch) for step in Record(run.record).steps()] == [(1, 1), (2, 2)]


def test_tokens_that_vanish_between_worker_and_trainer_are_found(run: RecordedRun) -> None:
    counters = run.workers[0].counters
    run.workers[0] = worker(counters.tokens_generated + 7, counters.tokens_delivered + 7)
    run.write()
    code, text = outcome(run)
    assert code == 1
    assert failures(text)[0].startswith("  FAIL  no token is missing")


def test_tokens_that_vanish_inside_a_worker_are_found(run: RecordedRun) -> None:
    held = run.workers[0]
    run.workers[0] = held.model_copy(update={"counters": held.counters.model_copy(update={"tokens_in_flight": 0})})
    run.write()
    code, text = outcome(run)
    assert code == 1
    assert "accounts for" in text


def test_a_trained_count_that_the_record_does_not_hold_is_found(run: RecordedRun) -> None:
    last = run.reports[-1]
    changed = last.tokens_trained - 4
    run.reports[-1] = report(
        3, tokens_trained=changed, tokens_dropped={"Stale": 4}, tokens_received=last.tokens_received
    )
    run.write()
    code, text = outcome(run)
    assert code == 1
    assert failures(text) == [f"  FAIL  the record holds the {changed} tokens that the trainer counts as trained"]


def test_altered_weights_are_found_by_their_digest(run: RecordedRun) -> None:
    path = run.record / "versions" / "1-1" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    code, text = outcome(run)
    assert code == 1
    assert "the record was altered or is damaged" in text


def test_fewer_tokens_than_asked_for_is_a_failure_that_says_so(run: RecordedRun) -> None:
    code, text = outcome(run, 5000)
    assert code == 1
    assert "5,000 tokens were asked for and 216 can be checked" in text


def test_tokens_of_a_baseline_source_are_not_taken_for_exact(run: RecordedRun) -> None:
    for step in run.steps.values():
        step["old_source"][step["turn"] >= 0] = 3
    run.write()
    code, text = outcome(run, 1)
    assert code == 1
    assert "0 can be checked" in text


def test_a_truncated_record_is_said_to_be_so_and_still_checked(run: RecordedRun) -> None:
    (run.record / "notes.json").write_text('{"truncated_at_step": 3}')
    (run.record / "steps" / "000003.safetensors").unlink()
    code, text = outcome(run, 100)
    assert code == 0
    assert "nothing was recorded from step 3 on" in text


def test_a_run_without_summary_did_not_end_in_order(run: RecordedRun) -> None:
    run.directory.summary_file.unlink()
    code, text = outcome(run)
    assert code == 1
    assert "the run did not end in order" in text


def test_a_step_file_with_a_short_tensor_is_refused(run: RecordedRun) -> None:
    run.steps[1]["old_logprobs"] = run.steps[1]["old_logprobs"][:-1]
    run.write()
    with pytest.raises(MalformedMessage, match=r"old_logprobs is float32\[91\], must be float32\[92\]"):
        read_step(run.record / "steps" / "000001.safetensors")


def test_a_step_file_cut_short_is_refused(run: RecordedRun) -> None:
    path = run.record / "steps" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(MalformedMessage, match="is not a recorded step"):
        read_step(path)


def test_a_folder_that_is_no_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not the folder of a run"):
        verify(tmp_path, minimum_tokens=1, out=io.StringIO())


def test_a_run_without_record_says_why(run: RecordedRun) -> None:
    with pytest.raises(StorageError, match="--record-bytes 0"):
        Record(run.record / "nowhere")


def test_rare_staleness_is_chosen_before_common() -> None:
    rows = {ChosenRow(Path("s"), index): {0: 10} for index in range(50)}
    rows[ChosenRow(Path("s"), 50)] = {0: 1, 4: 2}
    chosen = choose_rows(rows, 60)
    assert ChosenRow(Path("s"), 50) in chosen
    assert 60 <= sum(sum(rows[row].values()) for row in chosen) <= 70


def test_the_summary_that_verify_reads_is_the_one_that_run_writes() -> None:
    from rljob.summary import summarise

    made = summarise(
        "x",
        finished=True,
        steps=[report(1)],
        workers=[worker(103, 103)],
        unread={"main-0/a": 5},
        seconds=1.0,
        worker_restarts=0,
    )
    assert json.loads(made.model_dump_json(by_alias=True))["unread"] == {"main-0/a": 5}
