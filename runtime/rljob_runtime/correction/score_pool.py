"""Old log-probabilities that were scored ahead of the step that trains them (docs/design.md, section 6, *pool*).

Rank 0 keeps here what is known so far of each sample's tokens, from the segments of an unfinished trajectory and then
from the finished one, and the values that the trainer or an old-policy worker scored for them. It is a cache: whatever
does not fit together is dropped and counted, and costs another route's time, never a wrong value. A value is used for a
token only if it was scored on the very tokens before it, under the version that the token names.

Shapes: T tokens known of one sample, N tokens of one message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from rljob_runtime.correction.sources import Known, Source
from rljob_runtime.score_codec import Scores
from rljob_runtime.segment_codec import OpenSegment
from rljob_runtime.trajectory_codec import Trajectory

Key = tuple[int, int]
"""(task, sample)"""
TOKEN_BYTES = 14
"""What the arrays of an entry take per token."""
SCORE_BYTES = 12
"""The same of scores that came before their trajectory."""


class Discard(StrEnum):
    """Why tokens left the pool, or values did not enter it."""

    GAP = "Gap"  # a segment whose predecessor never came
    CONFLICT = "Conflict"  # a segment or the finished trajectory contradicts what was sent before
    OTHER_ATTEMPT = "OtherAttempt"  # the sample was begun anew
    LATE = "Late"  # scored when its tokens had left the pool
    OTHER_TRAJECTORY = "OtherTrajectory"  # scores of another trajectory of the sample than the one that counts
    OTHER_VERSION = "OtherVersion"  # scores under another version than the token's
    EVICTED = "Evicted"  # the bound on memory


@dataclass(frozen=True, slots=True)
class Wanted:
    """One forward's row: score these tokens while the policy holds `version`, and give the result to `store`."""

    key: Key
    generation: int
    version: int
    tokens: NDArray[np.int32]
    """All tokens up to the last one that is wanted."""
    positions: NDArray[np.int64]
    """Places of the tokens that are wanted."""


@dataclass(slots=True)
class _Entry:
    """What is known of one sample; arrays [T]."""

    generation: int
    origin: tuple[str, str, int]
    """(worker, incarnation, attempt)"""
    sequence: int | None = None
    """Of the finished trajectory on its stream; None while it is unfinished."""
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    weight_version: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """-1 for prompt and observation tokens."""
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    source: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))
    in_time: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """Arrived while the trainer held their version."""

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def num_model_tokens(self) -> int:
        return int((self.weight_version >= 0).sum())

    def agrees(self, start: int, tokens: NDArray[np.int32], weight_version: NDArray[np.int32]) -> bool:
        """Whether tokens from `start` on are those that are held, as far as both reach."""
        held = slice(start, start + tokens.shape[0])
        shared = self.tokens[held].shape[0]
        return bool(
            (self.tokens[held] == tokens[:shared]).all()
            and (self.weight_version[held] == weight_version[:shared]).all()
        )

    def append(self, tokens: NDArray[np.int32], weight_version: NDArray[np.int32], resident: int | None) -> None:
        self.tokens = np.concatenate([self.tokens, tokens])
        self.weight_version = np.concatenate([self.weight_version, weight_version])
        self.logprobs = np.concatenate([self.logprobs, np.zeros(tokens.shape, np.float32)])
        self.source = np.concatenate([self.source, np.full(tokens.shape, Source.NONE, np.int8)])
        self.in_time = np.concatenate([self.in_time, (weight_version >= 0) & (weight_version == resident)])

    def unscored(self, version: int) -> NDArray[np.int64]:
        return np.flatnonzero((self.weight_version == version) & (self.source == Source.NONE))


class ScorePool:
    """Tokens and values by (task, sample). Not for several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: dict[Key, _Entry] = {}  # the least recently grown first
        self._early: dict[Key, list[Scores]] = {}  # scores whose trajectory is not here yet, the oldest sample first
        self._generation = 0
        self.resident: int | None = None
        """Version that the trainer holds; None from a step's first update on until the next version is published."""
        self.discarded: Counter[str] = Counter()
        """Model tokens, by `Discard`."""

    @property
    def num_bytes(self) -> int:
        """Memory of tokens and values; never above the bound when a call returns."""
        early = sum(int(scores.positions.shape[0]) for held in self._early.values() for scores in held)
        return TOKEN_BYTES * sum(entry.num_tokens for entry in self._entries.values()) + SCORE_BYTES * early

    def extend(self, segment: OpenSegment) -> None:
        """Add tokens of an unfinished trajectory, where they fit what is known of it."""
        header = segment.header
        key, origin = (header.task, header.sample), (header.worker, header.incarnation, header.attempt)
        weight_version = _model_versions(segment)
        entry = self._entries.get(key)
        if entry is not None and entry.sequence is not None:
            return
        if entry is None or entry.origin != origin:
            if header.start > 0:
                self._count(Discard.GAP, int((weight_version >= 0).sum()))
                return
            self._drop(key, Discard.OTHER_ATTEMPT)
            entry = self._begin(key, origin)
        known = entry.num_tokens - header.start
        if known < 0:
            self._count(Discard.GAP, int((weight_version >= 0).sum()))
            self._drop(key, Discard.GAP)
        elif not entry.agrees(header.start, segment.tokens, weight_version):
            self._drop(key, Discard.CONFLICT)
        elif known < segment.num_tokens:
            entry.append(segment.tokens[known:], weight_version[known:], self.resident)
            self._entries[key] = self._entries.pop(key)
            self._keep_bound()

    def complete(self, trajectory: Trajectory, sequence: int) -> None:
        """The sample's trajectory: what was scored of it counts if it begins as its segments said.

        Args:
            trajectory: the one that counts among the sample's.
            sequence: its message on the trajectory stream.
        """
        header = trajectory.header
        key, weight_version = (header.task, header.sample), _model_versions(trajectory)
        entry = self._entries.get(key)
        if entry is not None and (
            entry.num_tokens > trajectory.num_tokens or not entry.agrees(0, trajectory.tokens, weight_version)
        ):
            self._drop(key, Discard.CONFLICT)
            entry = None
        if entry is None:
            entry = self._begin(key, (header.worker, header.incarnation, header.attempt))
        known = entry.num_tokens
        entry.append(trajectory.tokens[known:], weight_version[known:], self.resident)
        entry.sequence = sequence
        self._entries[key] = self._entries.pop(key)
        for scores in self._early.pop(key, ()):
            self._apply(entry, scores)
        self._keep_bound()

    def accept(self, scores: Scores) -> None:
        """Values from an old-policy worker; they may come before their trajectory does."""
        key = (scores.header.task, scores.header.sample)
        entry = self._entries.get(key)
        if entry is None or entry.sequence is None:
            self._early.setdefault(key, []).append(scores)
            self._keep_bound()
        else:
            self._apply(entry, scores)

    def versions_wanted(self, versions: Collection[int]) -> list[int]:
        """Which of these versions have tokens without a value, ascending."""
        named = [entry.weight_version[entry.source == Source.NONE] for entry in self._entries.values()]
        unscored = np.unique(np.concatenate(named)) if named else np.zeros(0, np.int32)
        return [version for version in unscored.tolist() if version in versions]

    def wanted(
        self, version: int, token_budget: int | None = None, *, without: Collection[int] = frozenset()
    ) -> list[Wanted]:
        """Rows to score under a version, the tasks with the oldest deadline first.

        Args:
            version: that the policy is to hold.
            token_budget: most padded tokens in all rows together; one row may exceed it. None: all that there are.
            without: tasks that are left out.
        """
        rows: list[Wanted] = []
        longest = 0
        for key in sorted(self._entries):
            entry = self._entries[key]
            positions = entry.unscored(version) if key[0] not in without else np.zeros(0, np.int64)
            if not positions.size:
                continue
            length = int(positions[-1]) + 1
            longest = max(longest, length)
            if rows and token_budget is not None and (len(rows) + 1) * longest > token_budget:
                break
            rows.append(Wanted(key, entry.generation, version, entry.tokens[:length], positions))
        return rows

    def store(self, row: Wanted, logprobs: NDArray[np.float32]) -> None:
        """Values [len(row.tokens)] that the policy gave while it held `row.version`.

        One that is not finite is kept, too: the resolver counts it as missing, and it is not scored again and again.
        """
        entry = self._entries.get(row.key)
        if entry is None or entry.generation != row.generation:
            self._count(Discard.LATE, row.positions.shape[0])
            return
        free = row.positions[entry.source[row.positions] == Source.NONE]
        entry.logprobs[free] = logprobs[free]
        entry.source[free] = Source.POOL

    def known(self, trajectory: Trajectory) -> Known:
        """Values of a finished trajectory's tokens, as far as there are any."""
        entry = self._of(trajectory)
        if entry is None:
            shape = trajectory.tokens.shape
            return Known(np.zeros(shape, np.float32), np.full(shape, Source.NONE, np.int8))
        return Known(entry.logprobs.copy(), entry.source.copy())

    def in_time(self, trajectory: Trajectory) -> NDArray[np.bool_]:
        """[T], tokens of a finished trajectory that arrived while their version was resident."""
        entry = self._of(trajectory)
        return np.zeros(trajectory.tokens.shape, np.bool_) if entry is None else entry.in_time.copy()

    def forget(self, keys: Iterable[Key]) -> None:
        """Samples that are trained or dropped."""
        for key in keys:
            self._entries.pop(key, None)
            self._early.pop(key, None)

    def _of(self, trajectory: Trajectory) -> _Entry | None:
        entry = self._entries.get((trajectory.header.task, trajectory.header.sample))
        is_it = (
            entry is not None
            and entry.num_tokens == trajectory.num_tokens
            and entry.agrees(0, trajectory.tokens, _model_versions(trajectory))
        )
        return entry if is_it else None

    def _begin(self, key: Key, origin: tuple[str, str, int]) -> _Entry:
        self._generation += 1
        self._entries[key] = _Entry(self._generation, origin)
        return self._entries[key]

    def _drop(self, key: Key, reason: Discard) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._count(reason, entry.num_model_tokens)

    def _count(self, reason: Discard, tokens: int) -> None:
        if tokens:
            self.discarded[reason] += tokens

    def _apply(self, entry: _Entry, scores: Scores) -> None:
        if scores.header.sequence != entry.sequence:
            self._count(Discard.OTHER_TRAJECTORY, scores.positions.shape[0])
            return
        inside = scores.positions < entry.num_tokens
        right = inside.copy()
        right[inside] = entry.weight_version[scores.positions[inside]] == scores.weight_version[inside]
        self._count(Discard.OTHER_VERSION, int((~right).sum()))
        positions, logprobs = scores.positions[right], scores.logprobs[right]
        free = entry.source[positions] == Source.NONE
        entry.logprobs[positions[free]] = logprobs[free]
        entry.source[positions[free]] = Source.DEDICATED

    def _keep_bound(self) -> None:
        """Unfinished trajectories go first, the least recently grown before others; then early scores; then the rest."""
        excess = self.num_bytes - self._max_bytes
        if excess <= 0:
            return
        for key in sorted(self._entries, key=lambda key: self._entries[key].sequence is not None):
            entry = self._entries[key]
            if entry.sequence is not None:
                excess = self._evict_early(excess)
            if excess <= 0:
                return
            excess -= TOKEN_BYTES * entry.num_tokens
            self._drop(key, Discard.EVICTED)
        self._evict_early(excess)

    def _evict_early(self, excess: int) -> int:
        while excess > 0 and self._early:
            key = next(iter(self._early))
            tokens = sum(scores.positions.shape[0] for scores in self._early.pop(key))
            self._count(Discard.EVICTED, tokens)
            excess -= SCORE_BYTES * tokens
        return excess


def _model_versions(run: OpenSegment | Trajectory) -> NDArray[np.int32]:
    """The weight versions, -1 wherever the model did not sample: a message may say anything there."""
    return np.where(run.turn >= 0, run.weight_version, np.int32(-1)).astype(np.int32)
