"""Runs on disk: one JSON line a run, keyed by all of its settings, so that a sweep that was cut off goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.staleness.measures import RunRecord
from bench.staleness.settings import Settings

FOLDER = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    settings: Settings
    record: RunRecord


def load(name: str, folder: Path = FOLDER) -> list[Run]:
    """The finished runs of a sweep, each setting once; empty where there is no file."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        return []
    runs: dict[str, Run] = {}
    for line in path.read_text().splitlines():
        stored = json.loads(line)
        run = Run(Settings(**stored["settings"]), stored["record"])
        runs.setdefault(run.settings.key, run)
    return list(runs.values())


def missing(wanted: Iterable[Settings], name: str, folder: Path = FOLDER) -> Iterator[Settings]:
    """Those of the wanted settings that no line of the file has; the file is read again before each."""
    for settings in wanted:
        if settings.key not in {run.settings.key for run in load(name, folder)}:
            yield settings


def append(name: str, settings: Settings, record: RunRecord, folder: Path = FOLDER) -> None:
    """Add a run: one write of one line, so that two processes may share a sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"settings": json.loads(settings.key), "record": record}, separators=(",", ":"))
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")


def load_document(name: str, folder: Path = FOLDER) -> Any:
    """A result that is one JSON document; None where there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def save_document(name: str, document: Any, folder: Path = FOLDER) -> None:
    """Write it, replacing what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
