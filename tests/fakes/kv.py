"""A key-value store with compare-and-set writes, as the control bucket keeps it, in memory."""

from __future__ import annotations

from dataclasses import dataclass

from rljob_api.base import WireMessage
from rljob_api.errors import Fenced


@dataclass(frozen=True, slots=True)
class Entry:
    value: WireMessage
    revision: int


class FakeKv:
    """Revisions rise over all keys; `history` records each accepted write."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self.history: list[tuple[str, WireMessage]] = []

    def read(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def write(self, key: str, value: WireMessage, *, expected_revision: int | None) -> int:
        """Compare-and-set; None = the key must not exist.

        Raises:
            Fenced: the key has another revision.
        """
        held = self._entries.get(key)
        if (None if held is None else held.revision) != expected_revision:
            raise Fenced(f"{key} is not at revision {expected_revision}")
        return self.put(key, value)

    def put(self, key: str, value: WireMessage) -> int:
        """Write whatever is there."""
        self.history.append((key, value))
        self._entries[key] = Entry(value, len(self.history))
        return len(self.history)
