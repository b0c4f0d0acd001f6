from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.unit.cli.synthetic import report, worker, write_run

from rljob.report import PLOTS, write_report
from rljob.run_directory import RunDirectory
from rljob_api.errors import BadInput, RljobError

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
        self.feed(text)
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


def test_one_run_has_every_plot_its_summary_and_its_workers(tmp_path: Path) -> None:
    page = written([make_run(tmp_path / "a")], tmp_path / "report.html")
    assert page.count["svg"] == len(PLOTS) == len(set(page.labels))
    for name, caption, _ in PLOTS:
        assert name in page.text
        assert caption in page.text
    for cell in ("Snapshot", "3,000", "Stale 90", "main-0", "Stopped"):
        assert cell in page.cells, cell
    assert "flat: no staleness in it" in page.text


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


def test_discrepancy_that_rises_with_staleness_is_said(tmp_path: Path) -> None:
    rising = {
        str(bucket): {"tokens": 10, "rmsLogDiscrepancy": 1e-3 * 2**bucket, "maxAbsLogDiscrepancy": 0.1}
        for bucket in range(3)
    }
    directory = write_run(tmp_path / "a", [report(1, discrepancy_by_staleness=rising)], [])
    page = written([directory], tmp_path / "report.html")
    assert "4.00 times that at 0, rising: staleness leaks into the mask" in page.text


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
