"""Structured logs of the runtime processes: one JSON object a line, past tense, one line per state change.

Libraries get a logger passed or ask for `logging.getLogger(__name__)`; only a process's entry point calls `configure`.
Fields go in by `extra=fields(weight_version=3)`.

Example line: {"time": "2026-11-23T01:00:00.250Z", "level": "INFO", "event": "swapped", "worker": "main-0", ...}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

_FIELDS = "rljob_fields"


def fields(**values: object) -> dict[str, object]:
    """The `extra` of a log call: values that become fields of the line."""
    return {_FIELDS: values}


class JsonFormatter(logging.Formatter):
    """A record as one JSON line; `bound` fields (worker, pool ...) are on every line."""

    def __init__(self, bound: Mapping[str, object]) -> None:
        super().__init__()
        self._bound = dict(bound)

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "event": record.getMessage(),
            **self._bound,
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(stream: TextIO, *, level: int = logging.INFO, **bound: object) -> logging.Logger:
    """Send the logs of rljob's packages to `stream` as JSON lines; returns the runtime's logger.

    Other libraries' warnings come out in the same form, so that a pod's log is one format.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(bound))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for package in ("rljob_runtime", "rljob_protocol"):
        logging.getLogger(package).setLevel(level)
    return logging.getLogger("rljob_runtime")
