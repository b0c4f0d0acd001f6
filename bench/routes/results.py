"""Replays and runs on disk, as JSON documents: tables and the figure are made from these."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.measure import machine
from bench.routes.real_runs import RealRun
from bench.routes.ways import Cost, Way

FOLDER = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True)
class Document:
    """A replay, and what was replayed."""

    stream: str
    parameters: int
    tokens: int
    """A step, mean."""
    copy_bytes: int
    """Of the weights in the compute type."""
    costs: tuple[Cost, ...]
    machine: str
    date: str


def save_replay(
    name: str,
    *,
    stream: str,
    parameters: int,
    tokens: int,
    copy_bytes: int,
    costs: Sequence[Cost],
    folder: Path = FOLDER,
) -> None:
    """Write a replay, replacing what was there of that name."""
    document = Document(stream, parameters, tokens, copy_bytes, tuple(costs), machine(), _today())
    _write(folder / f"{name}.json", asdict(document))


def load_replay(name: str, folder: Path = FOLDER) -> Document:
    """What `save_replay` wrote."""
    stored = json.loads((folder / f"{name}.json").read_text())
    costs = tuple(Cost(**{**cost, "way": Way(cost["way"])}) for cost in stored.pop("costs"))
    return Document(**stored, costs=costs)


def save_runs(runs: Sequence[RealRun], folder: Path = FOLDER) -> None:
    """Write what runs did, replacing what was there."""
    _write(folder / "runs.json", [asdict(run) for run in runs])


def load_runs(folder: Path = FOLDER) -> list[RealRun]:
    """What `save_runs` wrote."""
    return [RealRun(**stored) for stored in json.loads((folder / "runs.json").read_text())]


def _write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(document), parse_float=lambda text: round(float(text), 6))
    path.write_text(json.dumps(rounded, indent=1, default=str) + "\n")


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
