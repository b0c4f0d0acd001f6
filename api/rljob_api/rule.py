"""A rule over several fields, with one text that every place shows: `rljob validate`, and the apiserver (cel.py).

A rule looks at one object of the job (`scope`), and finds fields inside it that break it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """A field that breaks a rule."""

    field: str
    """Path relative to the rule's scope; empty is the scope itself."""
    value: object
    note: str = ""
    """The other values that the rule looked at."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule and its text."""

    id: str
    scope: str
    """Pattern of the objects it looks at, such as `spec.rolloutPools[*]`; empty is the whole object."""
    reason: str
    remedy: str
    check: Callable[[Any], Iterable[Finding]]
    """Findings of one object at `scope`."""

    @property
    def message(self) -> str:
        """What the apiserver says when its form of the rule (cel.py) is broken; it names the field itself."""
        return f"{self.reason}. {self.remedy}"


def unless(holds: bool, field: str, value: object, note: str = "") -> Iterator[Finding]:
    """The one finding of a rule that does not hold."""
    if not holds:
        yield Finding(field, value, note)
