"""Another version's values in the place of the trainer's masters, and back again bit for bit.

Only elements are written whose value in the compute type differs: forwards see the compute type, so the others may stay
as they are. What was there goes to the host, as a device that the masters fill has no room for a second set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rljob_runtime.correction.reverse_delta import Bits, ReverseDelta

_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


class Overwritten:
    """Masters that had to make way, in the order in which they were overwritten.

    Masters are a rank's local ones, flat: [N].
    """

    def __init__(self) -> None:
        self._stash: list[tuple[Tensor, Tensor | None, Tensor]] = []

    def switch(self, masters: Tensor, bits: Bits, dtype: torch.dtype) -> None:
        """Make masters round to these bits [N], whatever they are now: compares every element.

        Args:
            masters: this rank's, written in place.
            bits: the version's, whole.
            dtype: the compute type that the bits are of.
        """
        target = tensor_of(bits, dtype).to(masters.device)
        signed = _SIGNED[dtype.itemsize]
        differs = masters.to(dtype).view(signed) != target.view(signed)
        changed = int(differs.sum())
        if 3 * changed > masters.numel():  # an index takes twice the room of a master
            self._stash.append((masters, None, masters.to("cpu", copy=True)))
            masters.copy_(target)
        elif changed:
            indices = differs.nonzero().view(-1)
            self._stash.append((masters, indices.cpu(), masters.index_select(0, indices).cpu()))
            _put(masters, indices, target[indices])

    def write(self, masters: Tensor, deltas: Sequence[ReverseDelta], dtype: torch.dtype) -> None:
        """Overwrite the masters by these deltas, none of them whole, one after the other."""
        found = [delta.indices() for delta in deltas]
        on_host = torch.from_numpy(found[0] if len(found) == 1 else np.concatenate(found))
        indices = on_host.to(masters.device)
        # An element that is in several deltas is stashed as often, each time as it was before all of them.
        self._stash.append((masters, on_host, masters.index_select(0, indices).cpu()))
        for part, delta in zip(torch.split(indices, [len(places) for places in found]), deltas, strict=True):
            _put(masters, part, tensor_of(delta.values, dtype).to(masters.device))

    def restore(self) -> None:
        """Put all masters back, the last overwritten first."""
        while self._stash:
            masters, indices, before = self._stash.pop()
            if indices is None:
                masters.copy_(before)
            else:
                masters.scatter_(0, indices.to(masters.device), before.to(masters.device))


def _put(masters: Tensor, indices: Tensor, values: Tensor) -> None:
    masters.scatter_(0, indices, values.to(masters.dtype))  # four times as fast on a CPU as index_copy_


def bits_of(tensor: Tensor) -> Bits:
    """Bit patterns of a tensor's elements in order, on the host; shares memory with a flat tensor that is there."""
    flat = tensor.cpu().contiguous().view(-1)
    signed = flat.view(_SIGNED[flat.dtype.itemsize]).numpy()
    return signed.view(_UNSIGNED[flat.dtype.itemsize])


def tensor_of(bits: Bits, dtype: torch.dtype) -> Tensor:
    """The numbers that bit patterns stand for, to be read only; a copy where the patterns lie in a mapped file."""
    readable = bits if bits.flags.writeable else np.array(bits)
    return torch.from_numpy(readable.view(f"i{bits.itemsize}")).view(dtype)
