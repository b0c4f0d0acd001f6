"""Old weight versions in host memory, and the switch that lets the trainer's own model score with them.

A cache of published versions: what is not here any more can be loaded again from its published file.

The newest version is held whole, in the compute type, each older one as its difference to the next newer one: a chain
that ends at the newest. A version that is saved, loaded or dropped changes the one before it and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rljob_api.errors import BlobCorrupt, StorageError, StorageFull
from rljob_runtime.correction.published import LookedUp, PublishedParameters, local_shard
from rljob_runtime.correction.residency import Residency
from rljob_runtime.correction.reverse_delta import Bits, Layout, ReverseDelta, compose, difference, whole
from rljob_runtime.correction.spill import SpillFolder
from rljob_runtime.correction.switching import Overwritten, bits_of


@dataclass(frozen=True, slots=True)
class _Kept:
    """One version of this rank's shards."""

    tensors: Mapping[str, ReverseDelta]
    """By parameter name."""
    content: int
    """The same while it is encoded anew, another when other weights get the version's number."""
    file: Path | None = None
    """Where the data lies; None: in memory."""

    @property
    def num_bytes(self) -> int:
        return sum(delta.num_bytes for delta in self.tensors.values())


_Chain = dict[int, _Kept]


class SnapshotStore:
    """This rank's shards by weight version, losslessly compressed against each other.

    Every rank must save, load, drop, evict and hold the same versions in the same order: each keeps its own part.
    """

    def __init__(
        self, compute_dtype: torch.dtype, *, memory_bytes: int | None = None, spill_directory: Path | None = None
    ) -> None:
        """
        Args:
            compute_dtype: type of the published weights.
            memory_bytes: bound on `num_bytes`; None is no bound. While a version is saved or loaded there is one whole
                copy more.
            spill_directory: this process's own; takes the oldest versions that are over the bound. None: over the
                bound is an error.

        Raises:
            StorageError: the directory cannot be used.
        """
        self._compute_dtype = compute_dtype
        self._memory_bytes = memory_bytes
        self._spill = None if spill_directory is None else SpillFolder(spill_directory)
        self._chain: _Chain = {}
        self._contents = 0
        self._needed: frozenset[int] = frozenset()
        self._residency = Residency()

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions held, ascending."""
        return tuple(sorted(self._chain))

    @property
    def num_bytes(self) -> int:
        """Host memory that this rank's snapshots take."""
        return _in_memory(self._chain)

    @property
    def num_spilled_bytes(self) -> int:
        """Local disk that they take."""
        return sum(kept.num_bytes for kept in self._chain.values() if kept.file is not None)

    @property
    def density(self) -> float:
        """Share of elements in which a version differs from the next newer one, over all that have one; 0 without."""
        deltas = [delta for version in self.versions[:-1] for delta in self._chain[version].tensors.values()]
        return sum(delta.changed for delta in deltas) / max(1, sum(delta.size for delta in deltas))

    @property
    def copies(self) -> float:
        """All versions' bytes, in memory and on disk, over those of one whole copy; 0 where none is held."""
        if not self._chain:
            return 0.0
        return (self.num_bytes + self.num_spilled_bytes) / max(1, self._chain[self.versions[-1]].num_bytes)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Heed the steps of the policy's optimizer: a switch between `save` and the next step then costs little.

        Once it is watched, nothing but this optimizer may write to the policy's weights without putting them back.
        """
        self._residency.watch(optimizer)

    def save(self, version: int, policy: PublishedParameters) -> None:
        """Keep the policy's present weights, rounded to the compute type as publication rounds them.

        Raises:
            StorageFull: they do not fit the bound, or the disk; all is as it was.
            StorageError: the disk cannot be written.
        """
        policy = LookedUp.of(policy)
        self._insert(
            version,
            {
                name: bits_of(local_shard(parameter).to("cpu", self._compute_dtype, copy=True))
                for name, parameter in policy.published_parameters()
            },
        )
        self._residency.record(self._chain[version].content, policy)

    def load_full(self, version: int, policy: PublishedParameters, path: Path) -> None:
        """Keep the version that a published safetensors file holds; each rank reads its own part of it.

        It may be older or newer than those held, or between them.

        Raises:
            BlobCorrupt: the file cannot be read, or a tensor is missing or of another shape or type than the policy's.
            StorageFull: it does not fit the bound, or the disk; all is as it was.
            StorageError: the disk cannot be written.
        """
        shards: dict[str, Bits] = {}
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name, parameter in policy.published_parameters():
                    full = file.get_tensor(name)
                    if full.shape != parameter.shape or full.dtype != self._compute_dtype:
                        raise BlobCorrupt(
                            f"version {version}: {name} in {path} is {full.dtype} {list(full.shape)}, "
                            f"the policy's is {self._compute_dtype} {list(parameter.shape)}"
                        )
                    shards[name] = bits_of(_shard_like(full, parameter))
        except (SafetensorError, OSError) as error:
            raise BlobCorrupt(f"version {version} cannot be read from {path}: {error}") from error
        self._insert(version, shards)

    def retain(self, counts: Mapping[int, int]) -> None:
        """Tokens that may still have to be scored, by weight version: `evict` leaves these versions alone.

        The counts take the place of all earlier ones.
        """
        self._needed = frozenset(version for version, tokens in counts.items() if tokens > 0)

    def evict(self, oldest_allowed: int) -> tuple[int, ...]:
        """Drop versions below the bound that no retained token names; those that were dropped, ascending.

        Raises:
            StorageError: as `drop`.
        """
        dropped = tuple(v for v in self.versions if v < oldest_allowed and v not in self._needed)
        for version in dropped:
            self.drop(version)
        return dropped

    def drop(self, version: int) -> None:
        """Forget a version, needed or not; one that is not held is no error.

        Raises:
            StorageError: the version before it was on disk and could not be written anew; all is as it was.
        """
        if version in self._chain:
            self._commit(_without(self._chain, version))

    def close(self) -> None:
        """Forget all versions and delete their files."""
        self._chain = {}
        self._residency.forget()
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    @contextmanager
    def held(self, version: int, policy: PublishedParameters) -> Iterator[None]:
        """Let the policy hold another version inside the block; afterwards its masters are bit for bit as before.

        Forwards inside must run without gradient, and the optimizer must not step. Its state is never touched.

        Raises:
            KeyError: the version is not held here.
        """
        with self.visiting(policy) as visit:
            visit(version)
            yield

    @contextmanager
    def visiting(self, policy: PublishedParameters) -> Iterator[Callable[[int], None]]:
        """As `held`, for several versions: each call of what it gives makes the policy hold that version.

        Newest first is cheap: from one version to an older one only what differs between the two is written.

        Raises:
            KeyError: by a call, whose version is not held here; the policy then holds what it held.
        """
        policy = LookedUp.of(policy)
        resident = self._residency.mark(policy)
        self._residency.forget()
        place = None if resident is None else resident.content
        inside, is_undisturbed = self._residency.stamp(policy), True
        overwritten = Overwritten()

        def visit(version: int) -> None:
            nonlocal place, inside, is_undisturbed
            if version not in self._chain:
                raise KeyError(f"version {version} is not among the snapshots {self.versions}")
            is_undisturbed = is_undisturbed and inside == self._residency.stamp(policy)
            start, place = place if is_undisturbed else None, None  # in between it is neither
            self._switch(version, start, policy, overwritten)
            place, inside = self._chain[version].content, self._residency.stamp(policy)

        try:
            yield visit
        finally:
            is_undisturbed = is_undisturbed and inside == self._residency.stamp(policy)
            overwritten.restore()
            self._residency.forget()
            if resident is not None and is_undisturbed:
                self._residency.restore(resident, policy)

    def _switch(self, version: int, content: int | None, policy: LookedUp, to: Overwritten) -> None:
        resident = next((v for v, kept in self._chain.items() if kept.content == content), None)
        way_back = self._way_back(version, resident)
        for (name, _), masters in zip(policy.named, policy.masters, strict=True):
            deltas = None if way_back is None else [tensors[name] for tensors in way_back]
            if deltas is None or any(delta.layout is Layout.WHOLE for delta in deltas):
                to.switch(masters, _bits(self._chain, version, name), self._compute_dtype)
            elif changes := [delta for delta in deltas if delta.changed]:
                to.write(masters, changes, self._compute_dtype)

    def _way_back(self, version: int, resident: int | None) -> list[Mapping[str, ReverseDelta]] | None:
        """Deltas that lead from the resident version to an older one; None where elements must be compared."""
        if resident is None or resident < version:
            return None
        return [self._chain[v].tensors for v in reversed(self.versions) if version <= v < resident]

    def _insert(self, version: int, shards: Mapping[str, Bits]) -> None:
        chain = _without(self._chain, version) if version in self._chain else self._chain
        self._contents += 1
        self._commit(_with(chain, version, shards, self._contents))

    def _commit(self, chain: _Chain) -> None:
        """Take a chain in place of the present one, within the bound."""
        chain = self._within_bound(chain)
        kept = {of_version.file for of_version in chain.values()}
        gone = [of_version.file for of_version in self._chain.values() if of_version.file not in kept]
        self._chain = chain
        for file in gone:
            if file is not None and self._spill is not None:
                self._spill.remove(file)

    def _within_bound(self, chain: _Chain) -> _Chain:
        """The chain, its oldest versions on disk as far as memory has no room for them."""
        if self._memory_bytes is None or _in_memory(chain) <= self._memory_bytes:
            return chain
        if self._spill is None:
            raise StorageFull(
                f"weight versions {', '.join(map(str, sorted(chain)))} take {_in_memory(chain):,} bytes of this "
                f"process's memory, and correction.snapshots.memoryBytes is {self._memory_bytes:,}: raise "
                "correction.snapshots.memoryBytes, set correction.snapshots.spill or lower staleness.maxVersions"
            )
        chain, written = dict(chain), list[Path]()
        try:
            for version in sorted(chain):
                if chain[version].file is None and _in_memory(chain) > self._memory_bytes:
                    file, mapped = self._spill.write(version, chain[version].tensors)
                    written.append(file)
                    chain[version] = replace(chain[version], tensors=mapped, file=file)
        except StorageError:
            for file in written:
                self._spill.remove(file)
            raise
        return chain


def _in_memory(chain: _Chain) -> int:
    return sum(kept.num_bytes for kept in chain.values() if kept.file is None)


def _bits(chain: _Chain, version: int, name: str) -> Bits:
    """One tensor of a version, whole; a copy."""
    path = []
    for newer in sorted(v for v in chain if v >= version):
        path.append(chain[newer].tensors[name])
        if path[-1].layout is Layout.WHOLE:
            break
    bits: Bits = np.array(path.pop().values)
    for delta in reversed(path):
        delta.overwrite(bits)
    return bits


def _with(chain: _Chain, version: int, shards: Mapping[str, Bits], content: int) -> _Chain:
    """The chain with one version more."""
    older = max((v for v in chain if v < version), default=None)
    newer = min((v for v in chain if v > version), default=None)
    inserted, before = dict[str, ReverseDelta](), dict[str, ReverseDelta]()
    for name, bits in shards.items():
        inserted[name] = whole(bits) if newer is None else difference(bits, _bits(chain, newer, name))
        if older is not None:
            before[name] = difference(_bits(chain, older, name), bits)
    extended = chain | {version: _Kept(inserted, content)}
    if older is not None:
        extended[older] = _Kept(before, chain[older].content)
    return extended


def _without(chain: _Chain, version: int) -> _Chain:
    """The chain with one version less."""
    rest = {v: kept for v, kept in chain.items() if v != version}
    older = max((v for v in rest if v < version), default=None)
    if older is not None:
        gone = chain[version].tensors
        composed = {name: compose(delta, gone[name]) for name, delta in chain[older].tensors.items()}
        rest[older] = _Kept(composed, chain[older].content)
    return rest


def _shard_like(full: Tensor, parameter: nn.Parameter) -> Tensor:
    if not isinstance(parameter, DTensor):
        return full
    sharded = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return sharded.to_local().to("cpu", copy=True)
