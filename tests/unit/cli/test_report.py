from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from tests.numerics.test_divergence import THRESHOLDS, batch
from tests.unit.cli.synthetic import SOURCES, leaking, report, worker, write_run

from rljob.leak import reported_leak, version_that_passes
from rljob.report import PLOTS, write_report
from rljob.run_directory import RunDirectory
from rljob_api.diagnostics import AuditBucket, AuditReport
from rljob_api.errors import BadInput, RljobError
from rljob_api.messages import EwmaReport, Outcome, SourceStats, TrajectoryHeader
from rljob_runtime.correction.step_diagnostics import step_diagnostics

RISES = "rises with staleness: staleness leaks into the discrepancy mask"
VOID = {"meta", "br", "path", "use", "rect", "stop", "img", "hr", "input", "link"}
REFERENCES = ("src", "href", "xlink:href", "data", "action", "poster", "srcset")


class Page(HTMLParser):
    """Counts elements, checks that they close in order, and collects text and references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.references: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.labels: list[str] = []
        self.runs = 0
        self.feed(text)
        self.runs = len(re.findall(r"<th>", text.split("<tbody>")[0])) - 1
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.references += [value or "" for name, value in attrs if name in REFERENCES]
        self.labels += [value or "" for name, value in attrs if name == "aria-label"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in REFERENCES]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def make_run(root: Path, name: str = "toy", steps: int = 30) -> RunDirectory:
    return write_run(root, [report(step) for step in range(1, steps + 1)], [worker(3200, 3090)], name=name)


def written(directories: list[RunDirectory], output: Path) -> Page:
    write_report(directories, output)
    return Page(output.read_text(encoding="utf-8"))


def row(page: Page, name: str) -> list[str]:
    """Cells of a row of the table of the correction, a run each; no-break spaces as plain ones."""
    (after,) = [page.cells[i + 1 :] for i, cell in enumerate(page.cells) if cell == name]
    return [cell.replace("\u00a0", " ") for cell in after[: page.runs]]


def test_one_run_has_every_plot_its_summary_and_its_workers(tmp_path: Path) -> None:
    page = written([make_run(tmp_path / "a")], tmp_path / "report.html")
    assert page.count["svg"] == len(PLOTS) == len(set(page.labels))
    for name, caption, _ in PLOTS:
        assert name in page.text
        assert caption in page.text
    for cell in ("Snapshot", "3,000", "Stale 90", "main-0", "Stopped"):
        assert cell in page.cells, cell
    assert "a: whether staleness leaks into log r_d was not tested" in page.text


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "a")
    page = written([directory], tmp_path / "report.html")
    assert [reference for reference in page.references if not reference.startswith("#")] == []
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r"(?:https?:)?//[a-z]|url\((?!#)|@import|<script|<!DOCTYPE svg", text) == []


def test_ids_of_one_plot_are_not_those_of_another(tmp_path: Path) -> None:
    """Two plots with the same clip path or marker id would be drawn with each other's."""
    written([make_run(tmp_path / "a")], tmp_path / "report.html")
    plots = re.findall(r"<svg.*?</svg>", (tmp_path / "report.html").read_text(), re.DOTALL)
    referred = [set(re.findall(r'(?:url\(#|href="#)([^)"]+)', plot)) for plot in plots]
    assert all(referred)
    assert sum(len(ids) for ids in referred) == len(set().union(*referred))


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    page = written([make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=3)], tmp_path / "report.html")
    assert "2 runs compared" in page.text
    assert page.count["svg"] == len(PLOTS)
    assert page.cells[page.cells.index("Steps") :][:3] == ["Steps", "30", "3"]
    assert "Workers of b" in page.text


def test_names_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    nasty = "<b>&\"'$x_1$"
    page = written([make_run(tmp_path / nasty, nasty), make_run(tmp_path / "b")], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<b>" not in text
    assert nasty in page.text
    assert page.text.count("$x_1$") > 5, "a name in a plot is text, not a formula"


def test_a_worker_message_is_escaped(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "a", [report(1)], [worker(103, 103, message="<script>x</script>")])
    page = written([directory], tmp_path / "report.html")
    assert "script" not in page.count
    assert "<script>x</script>" in page.cells


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([report(1)], id="a single step"),
        pytest.param([report(1, discrepancy_by_staleness={}, baseline=None, tokens_dropped={})], id="nothing measured"),
        pytest.param(
            [report(s, discrepancy_by_staleness={"0": {"tokens": 4, "rmsLogDiscrepancy": 0, "maxAbsLogDiscrepancy": 0}})
             for s in (1, 2)],
            id="engine and trainer agree exactly",
        ),
        pytest.param([report(s, seconds_waiting=0, seconds_scoring=0, seconds_training=0, seconds_publishing=0, seconds_total=0) for s in (1, 2)], id="no time"),
        pytest.param([report(s, route="Current", exact_fraction=0.1) for s in range(1, 1200)], id="more steps than points"),
    ],
)  # fmt: skip
def test_a_run_with_little_or_much_to_show_still_has_every_plot(tmp_path: Path, steps: list[object]) -> None:
    directory = write_run(tmp_path / "a", steps, [])  # type: ignore[arg-type]
    page = written([directory], tmp_path / "report.html")
    assert page.count["svg"] == len(PLOTS)
    assert (tmp_path / "report.html").stat().st_size < 1 << 20


def with_record(root: Path, leaking: float, *, steps: int = 40) -> RunDirectory:
    """Steps of eight trajectories with noise in log r_d that grows over training, and `leaking` a version more."""
    generator = np.random.default_rng(3)
    directory = make_run(root, steps=steps)
    (directory.record / "steps").mkdir(parents=True)
    for step in range(1, steps + 1):
        staleness = np.repeat(generator.integers(0, min(step, 4), (8, 1)), 20, axis=1)
        noise = generator.normal(0, 1e-3 * step, staleness.shape) * (1 + leaking * staleness)
        turn = np.tile(np.repeat([-1, 0], [2, 18]), (8, 1))
        is_model = turn >= 0
        tensors = {
            "tokens": np.zeros(turn.shape, np.int32),
            "turn": turn.astype(np.int32),
            "weight_version": np.where(is_model, step - 1 - staleness, -1).astype(np.int32),
            "behavior_logprobs": np.zeros(turn.shape, np.float32),
            "old_logprobs": np.where(is_model, noise, 0).astype(np.float32),
            "old_source": np.where(is_model, 2, 0).astype(np.uint8),
            "target_logprobs": np.zeros(turn.shape, np.float32),
            "advantages": np.zeros(turn.shape, np.float32),
            "loss_mask": is_model.astype(np.uint8),
        }
        header = TrajectoryHeader(
            task=step, sample=0, attempt=1, epoch=1, worker="main-0", incarnation="a", outcome=Outcome.FINISHED
        )
        said = {
            "step": step,
            "epoch": 1,
            "version_start": step - 1,
            "temperature": 1.0,
            "compute_type": "Float32",
            "source_names": SOURCES,
            "headers": [header.model_dump(mode="json", by_alias=True)] * 8,
        }
        flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
        flat["row_offsets"] = np.arange(9, dtype=np.int64) * 20
        (directory.record / "steps" / f"{step:06d}.safetensors").write_bytes(save(flat, {"rljob": json.dumps(said)}))
    return directory


def test_staleness_in_the_discrepancy_is_told_from_noise_that_grows_over_training(tmp_path: Path) -> None:
    page = written([with_record(tmp_path / "a", 0.0), with_record(tmp_path / "b", 0.3)], tmp_path / "report.html")
    of_a, of_b = re.findall(r"(.): RMS of log r_d varies by (.*?)% .*?trajectories: (.*?)\.", page.text)
    assert (of_a[0], of_a[2]) == ("a", "flat: clean")
    assert (of_b[0], of_b[2]) == ("b", RISES)
    assert float(of_a[1]) < 10 < float(of_b[1])
    flatness = row(page, "… flatness test on the record, p")
    assert flatness[1] == "0.001"
    assert float(flatness[0]) > 0.01
    assert row(page, "Leak") == ["flat: clean", RISES]


def test_a_record_in_which_a_leak_would_not_be_found_is_not_called_flat(tmp_path: Path) -> None:
    page = written(
        [with_record(tmp_path / "a", 0.0, steps=3), with_record(tmp_path / "b", 0.0)], tmp_path / "report.html"
    )
    assert row(page, "Leak") == ["too few tokens to say", "flat: clean"]


def test_without_a_record_the_verdict_is_that_of_the_steps_own_reports(tmp_path: Path) -> None:
    directories = [
        write_run(
            tmp_path / name, [report(s, reward=0.1, diagnostics=leaking(s, rising=rising)) for s in range(1, 31)], []
        )
        for name, rising in (("a", 0.0), ("b", 0.5))
    ]
    directories.append(make_run(tmp_path / "c"))
    page = written(directories, tmp_path / "report.html")
    assert row(page, "Leak") == ["flat: clean", RISES, "–"]
    assert f"b: RMS of log r_d by the steps' own reports: {RISES}. Not tested on the record" in page.text
    assert "c: whether staleness leaks into log r_d was not tested" in page.text


def test_tokens_from_after_the_reward_passed_do_not_count_in_the_reports_verdict() -> None:
    """Leaking from step 46 on, after the mean reward has passed: the cells of before decide."""
    steps = [
        report(s, reward=0.1 if s <= 30 else 1.0, diagnostics=leaking(s, rising=0.0 if s <= 45 else 2.0))
        for s in range(1, 81)
    ]
    assert str(reported_leak(steps)) == "flat: clean"
    assert str(reported_leak(steps, last=20)) == "flat: clean"
    assert str(reported_leak([step.model_copy(update={"reward": 0.1}) for step in steps])) == RISES
    assert str(reported_leak(steps, last=3)) == "too few tokens to say"
    assert reported_leak([report(1)]) is None


def test_sources_cost_and_audits_of_compared_runs_stand_side_by_side(tmp_path: Path) -> None:
    def stats(tokens: int) -> SourceStats:
        return SourceStats(tokens=tokens, rms_log_discrepancy=1e-3, max_abs_log_discrepancy=5e-3)

    audit = AuditReport(
        tokens=30,
        by_staleness={
            str(n): AuditBucket(
                tokens=10,
                leak=0.01 * abs(n - 1),
                approximate=0.02,
                exact=0.01,
                drift_by_lag={str(lag): 0.01 * lag for lag in range(1, n + 1)},
            )
            for n in range(3)
        },
        version_weights=(1 / 3, 1 / 3, 1 / 3),
    )
    exact = [report(s, reward=s / 40, sources={"resident": stats(30), "snapshot": stats(70)}) for s in range(1, 41)]
    missing = leaking(1).model_copy(update={"missing_share": 0.5})
    average = EwmaReport(
        decay=0.6,
        weight=2.5,
        center_of_mass=1.25,
        relative_distance=0.01,
        resets=0,
        steps_since_reset=30,
        low_streak=0,
        staleness_gap=-0.25,
    )
    ewma = [
        report(
            s,
            sources={"resident": stats(30), "ewma": stats(70)},
            diagnostics=missing,
            audit=audit,
            ewma=average,
            seconds_scoring=0.2,
        )
        for s in range(1, 31)
    ]
    page = written(
        [write_run(tmp_path / "a", exact, []), write_run(tmp_path / "b", ewma, [])], tmp_path / "report.html"
    )
    last = [sum(range(38, 41)) / 3 / 40, sum(range(28, 31)) / 3 / 50]
    assert row(page, "Reward, mean of the last 3 steps") == [f"{value:.4f}" for value in last]
    assert row(page, "Tokens by source") == [
        "resident 30.0% · snapshot 70.0%", "resident 15.0% · ewma 35.0% · missing 50.0%"
    ]  # fmt: skip
    assert row(page, "… exact, of the trained") == ["1.0000", "0.3000"]
    assert row(page, "Step: scoring") == ["0.100 s, 14.3%", "0.200 s, 28.6%"]
    assert row(page, "EWMA, centre of mass, versions") == ["–", "1.25, last step"]
    assert row(page, "… mean staleness less that") == ["–", "-0.25, last step"]
    assert row(page, "Audited tokens") == ["–", "900"]
    # Straight drift of 0.01, centre of mass 1: residuals 0.01, 0, 0.01.
    assert row(page, "… leak, RMS, measured / predicted") == ["–", "8.16e-03 / 8.16e-03"]
    assert row(page, "… log r_d, RMS, as used / exact") == ["–", "2.00e-02 / 1.00e-02"]


def test_a_row_that_no_run_has_anything_for_is_left_out(tmp_path: Path) -> None:
    page = written([make_run(tmp_path / "a"), make_run(tmp_path / "b")], tmp_path / "report.html")
    assert "Kept by the discrepancy mask" in page.cells
    assert "Audited tokens" not in page.cells
    assert "Leak" not in page.cells


def test_a_steps_diagnostics_are_in_the_table(tmp_path: Path) -> None:
    found = step_diagnostics(batch(), THRESHOLDS)
    page = written([write_run(tmp_path / "a", [report(1, diagnostics=found)], [])], tmp_path / "report.html")
    assert found.discrepancy is not None
    assert row(page, "Engine against trainer, exact tokens: KL (k3)") == [f"{found.discrepancy.kl_k3:.2e}"]
    assert row(page, "… A ≥ 0 / A < 0") == [f"{found.clip_high_share:.4f} / {found.clip_low_share:.4f}"]


def test_only_tokens_from_before_the_reward_passed_count() -> None:
    assert version_that_passes([0.0] * 20) == 21
    assert version_that_passes([0.0] * 10 + [0.9] * 20) == 19, "eight of the last ten steps, and a tenth of the rest"
    assert version_that_passes([0.9]) == 1


def test_a_run_without_a_step_has_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(RljobError, match="no trained step yet"):
        write_report([write_run(tmp_path / "a", [], [])], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RljobError, match="choose another --output"):
        write_report([make_run(tmp_path / "a")], tmp_path / "none" / "report.html")


def test_a_folder_that_is_no_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        write_report([RunDirectory(tmp_path)], tmp_path / "report.html")
