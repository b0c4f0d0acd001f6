"""What an older tensor is, given its successor: the elements in which they differ, losslessly, or all of it.

Tensors are seen as bit patterns: -0.0 is not 0.0, a NaN equals itself, and denormals are numbers like any other. Few bf16
elements change in a step of training, because most updates are smaller than the distance to the next bf16 number.

Three layouts, of which the smallest is taken for each tensor. N elements of w bytes each, n of them different:

    whole    N * w                              the older tensor itself
    sparse   n * (2 + w) + 4 * ceil(N / 65536)  place within a block of 65536 elements and bits; a count for each block
    bitmap   n * w + ceil(N / 8)                one bit an element says whether it differs, then the bits
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 16
"""Elements of a block: as many as two bytes can tell apart."""

Bits = NDArray[Any]
"""Bit patterns of a tensor's elements in order [N]: unsigned integers of the elements' width."""


class Layout(Enum):
    """How a delta is laid out."""

    WHOLE = "whole"
    SPARSE = "sparse"
    BITMAP = "bitmap"


@dataclass(frozen=True, slots=True)
class ReverseDelta:
    """Makes an older tensor from its successor. A whole one needs no successor."""

    layout: Layout
    size: int
    """Elements of the tensor: N."""
    changed: int
    """Elements in which the two differ; after `compose` an upper bound, for a tensor without a successor N."""
    values: Bits
    """[n] bits of the older tensor where it differs, in order; [N] where the layout is whole."""
    places: NDArray[Any]
    """Sparse: uint16 [n], index within the block. Bitmap: uint8 [ceil(N / 8)], first element in the highest bit."""
    counts: NDArray[np.uint32]
    """Sparse: [blocks], places that belong to each block."""

    @property
    def num_bytes(self) -> int:
        """What it takes to keep."""
        return int(self.values.nbytes + self.places.nbytes + self.counts.nbytes)

    def indices(self) -> NDArray[np.int64]:
        """Index in the tensor of each value, ascending."""
        match self.layout:
            case Layout.WHOLE:
                return np.arange(self.size, dtype=np.int64)
            case Layout.SPARSE:
                indices: NDArray[np.int64] = np.repeat(np.arange(len(self.counts), dtype=np.int64) * BLOCK, self.counts)
                indices += self.places
                return indices
            case Layout.BITMAP:
                return np.flatnonzero(np.unpackbits(self.places, count=self.size))

    def overwrite(self, bits: Bits) -> None:
        """Turn the successor's bits [N] into the older tensor's, in place."""
        if self.layout is Layout.WHOLE:
            bits[:] = self.values
        else:
            bits[self.indices()] = self.values


def whole(bits: Bits) -> ReverseDelta:
    """A tensor that needs no successor. The array is kept, not copied."""
    return ReverseDelta(Layout.WHOLE, bits.size, bits.size, bits, _NO_PLACES, _NO_COUNTS)


def difference(older: Bits, newer: Bits) -> ReverseDelta:
    """The smallest delta that makes `older` from `newer`; both [N], of one type. Neither array is kept.

    Raises:
        ValueError: the arrays differ in size or type, or are not bit patterns.
    """
    if older.shape != newer.shape or older.dtype != newer.dtype or older.dtype.kind != "u":
        raise ValueError(
            f"bit patterns of one size and type are compared, not {older.dtype} {list(older.shape)} "
            f"with {newer.dtype} {list(newer.shape)}"
        )
    differs = older != newer
    changed = int(np.count_nonzero(differs))
    match smallest_layout(older.size, changed, older.itemsize):
        case Layout.WHOLE:
            return replace(whole(older.copy()), changed=changed)
        case Layout.SPARSE:
            indices = np.flatnonzero(differs)
            return _sparse(older.size, indices, older[indices])
        case Layout.BITMAP:
            return ReverseDelta(Layout.BITMAP, older.size, changed, older[differs], np.packbits(differs), _NO_COUNTS)


def compose(older: ReverseDelta, newer: ReverseDelta) -> ReverseDelta:
    """What `older` is when the version between is gone: its delta against the successor of `newer`'s tensor.

    An element that changed and changed back is kept as well: the result is exact, and may be larger than need be.
    """
    changed = min(older.size, older.changed + newer.changed)
    if older.layout is Layout.WHOLE:
        return replace(older, changed=changed)
    if newer.layout is Layout.WHOLE:
        bits = np.array(newer.values)
        older.overwrite(bits)
        return replace(whole(bits), changed=changed)
    bits = np.zeros(older.size, older.values.dtype)
    differs = np.zeros(older.size, np.bool_)
    for delta in (newer, older):  # where both have an element, the older one's holds
        indices = delta.indices()
        bits[indices] = delta.values
        differs[indices] = True
    changed = int(np.count_nonzero(differs))
    if smallest_layout(older.size, changed, bits.itemsize) is Layout.SPARSE:
        indices = np.flatnonzero(differs)
        return _sparse(older.size, indices, bits[indices])
    # Without the successor's bits a whole tensor cannot be made; it would be smaller by a bit an element at most.
    return ReverseDelta(Layout.BITMAP, older.size, changed, bits[differs], np.packbits(differs), _NO_COUNTS)


def smallest_layout(size: int, changed: int, width: int) -> Layout:
    """The layout that takes the fewest bytes for `changed` of `size` elements of `width` bytes; whole before others."""
    needed = {
        Layout.WHOLE: size * width,
        Layout.SPARSE: changed * (2 + width) + 4 * _blocks(size),
        Layout.BITMAP: changed * width + -(-size // 8),
    }
    return min(needed, key=lambda layout: needed[layout])


def _sparse(size: int, indices: NDArray[np.int64], values: Bits) -> ReverseDelta:
    counts = np.bincount(indices // BLOCK, minlength=_blocks(size)).astype(np.uint32)
    places = (indices % BLOCK).astype(np.uint16)
    return ReverseDelta(Layout.SPARSE, size, len(indices), values, places, counts)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


_NO_PLACES = np.zeros(0, np.uint8)
_NO_COUNTS = np.zeros(0, np.uint32)
