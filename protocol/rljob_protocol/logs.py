"""Structured logs: one JSON object a line on standard error, with the event and its fields."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """time, level, process name, event, then the fields of `extra`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def fields(**values: object) -> dict[str, object]:
    """The `extra` of a log call: values that become fields of the line."""
    return values


def configure(process: str, file: Path | None = None, *, level: int = logging.INFO) -> logging.Logger:
    """Send the logs of rljob's packages to a file, or to standard error, and return the process's logger."""
    handler = logging.StreamHandler(sys.stderr) if file is None else logging.FileHandler(file)
    handler.setFormatter(JsonLines(process))
    for package in ("rljob", "rljob_protocol", "rljob_runtime", "rljob_operator", "kopf"):
        logger = logging.getLogger(package)
        logger.handlers[:] = [handler]
        logger.setLevel(level if package != "kopf" else logging.WARNING)  # it tells of every trigger
        logger.propagate = False
    return logging.getLogger("rljob")
