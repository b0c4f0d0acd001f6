"""The command line's list of exact sources, which must not import torch, is that of the runtime."""

from __future__ import annotations

from rljob.record import EXACT_SOURCES
from rljob_runtime.correction import sources


def test_the_command_line_and_the_runtime_call_the_same_sources_exact() -> None:
    assert {source.name.lower() for source in sources.EXACT_SOURCES} == EXACT_SOURCES
