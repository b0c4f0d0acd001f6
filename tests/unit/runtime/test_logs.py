from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from rljob_runtime.logs import configure, fields


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for package in ("rljob_runtime", "rljob_protocol"):
        logging.getLogger(package).setLevel(logging.NOTSET)


@pytest.mark.usefixtures("untouched_logging")
def test_a_line_is_one_json_object_with_time_level_event_and_fields() -> None:
    stream = io.StringIO()
    logger = configure(stream, worker="main-0")
    logger.info("swapped", extra=fields(weight_version=3, seconds=0.25))
    logging.getLogger("other.library").info("chatter")
    logging.getLogger("other.library").warning("trouble %d", 7)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {"level": "INFO", "event": "swapped", "worker": "main-0", "weight_version": 3, "seconds": 0.25}
    assert (second["event"], second["level"]) == ("trouble 7", "WARNING")


@pytest.mark.usefixtures("untouched_logging")
def test_an_exception_stays_on_the_line_of_its_event() -> None:
    stream = io.StringIO()
    logger = configure(stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("claiming failed")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: two\nlines" in json.loads(line)["exception"]
