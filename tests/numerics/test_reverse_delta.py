"""An older tensor comes back from its delta bit for bit, and the delta is the smallest of the three layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rljob_runtime.correction.reverse_delta import (
    BLOCK,
    Bits,
    Layout,
    ReverseDelta,
    compose,
    difference,
    smallest_layout,
    whole,
)

SPECIAL = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0xFFC1, 0x7FFF], np.uint16)
"""bf16: zeros, denormals, infinities and NaNs of several payloads."""
SIZES = (0, 1, 2, 3, 7, 8, 9, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 17)
SHARES = (0.0, 1e-4, 0.01, 0.0624, 0.0626, 0.3, 0.93, 0.95, 1.0)

sizes = st.sampled_from(SIZES) | st.integers(0, 300)
shares = st.sampled_from(SHARES)
seeds = st.integers(0, 2**32 - 1)
widths = st.sampled_from([np.uint16, np.uint32, np.uint64])


def tensor(random: np.random.Generator, size: int, width: type = np.uint16) -> Bits:
    bits = random.integers(0, np.iinfo(width).max, size, width, endpoint=True)
    if width is np.uint16:
        special = random.random(size) < 0.3
        bits[special] = random.choice(SPECIAL, int(special.sum()))
    return bits


def moved(random: np.random.Generator, bits: Bits, share: float) -> Bits:
    """Another tensor, that differs in about this share of the elements."""
    return np.where(random.random(bits.size) < share, tensor(random, bits.size, bits.dtype.type), bits)


def decoded(delta: ReverseDelta, successor: Bits) -> Bits:
    bits = successor.copy()
    delta.overwrite(bits)
    return bits


@settings(deadline=None, max_examples=150)
@given(sizes, shares, seeds, widths)
def test_the_older_tensor_comes_back_to_the_bit_and_takes_what_the_smallest_layout_takes(
    size: int, share: float, seed: int, width: type
) -> None:
    random = np.random.default_rng(seed)
    older = tensor(random, size, width)
    newer = moved(random, older, share)
    delta = difference(older, newer)
    np.testing.assert_array_equal(decoded(delta, newer), older)
    changed = sum(1 for one, other in zip(older.tolist(), newer.tolist(), strict=True) if one != other)
    w = np.dtype(width).itemsize
    sizes = [size * w, changed * (2 + w) + 4 * len(range(0, size, BLOCK)), changed * w + len(range(0, size, 8))]
    assert delta.num_bytes == min(sizes)
    assert (delta.changed, delta.size) == (changed, size)
    if delta.layout is not Layout.WHOLE:
        assert delta.indices().tolist() == [i for i in range(size) if older[i] != newer[i]]


@settings(deadline=None, max_examples=100)
@given(sizes, shares, shares, seeds, st.booleans())
def test_without_the_version_between_the_oldest_still_comes_back(
    size: int, first: float, second: float, seed: int, is_newest: bool
) -> None:
    random = np.random.default_rng(seed)
    oldest = tensor(random, size)
    between = moved(random, oldest, first)
    newest = moved(random, between, second)
    one = difference(oldest, between)
    other = whole(between) if is_newest else difference(between, newest)
    composed = compose(one, other)
    np.testing.assert_array_equal(decoded(composed, np.zeros_like(newest) if is_newest else newest), oldest)
    assert composed.num_bytes <= one.num_bytes + other.num_bytes
    assert int((oldest != newest).sum()) <= composed.changed <= size or is_newest


@pytest.mark.parametrize(
    ("changed", "layout"),
    [
        (0, Layout.SPARSE),
        (65_000, Layout.SPARSE),
        (66_000, Layout.BITMAP),
        (983_000, Layout.BITMAP),
        (983_100, Layout.WHOLE),
    ],
)
def test_the_layout_follows_the_share_of_changed_bf16_elements(changed: int, layout: Layout) -> None:
    """Sparse up to about 1/16, whole from 15/16 of a million elements."""
    assert smallest_layout(1 << 20, changed, 2) is layout


def test_tensors_of_different_size_or_type_are_refused() -> None:
    bits = np.zeros(3, np.uint16)
    for other in (np.zeros(4, np.uint16), np.zeros(3, np.uint32)):
        with pytest.raises(ValueError, match=r"not uint16 \[3\] with uint"):
            difference(bits, other)
    with pytest.raises(ValueError, match=r"bit patterns .* not float32 \[3\]"):
        difference(np.zeros(3, np.float32), np.zeros(3, np.float32))


def by_floats(older: Bits, newer: Bits) -> ReverseDelta:
    one, other = (torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16) for bits in (older, newer))
    stand_in = np.where((one != other).numpy(), older, newer)
    return difference(stand_in, newer)


def a_block_off(older: Bits, newer: Bits) -> ReverseDelta:
    delta = difference(older, newer)
    return dataclasses.replace(delta, counts=np.roll(delta.counts, 1))


def signed_places(older: Bits, newer: Bits) -> ReverseDelta:
    delta = difference(older, newer)
    return dataclasses.replace(delta, places=delta.places.view(np.int16))


def comes_back(encode: Callable[[Bits, Bits], ReverseDelta]) -> bool:
    """Three blocks of which the first and last differ here and there, among them a zero that changes its sign."""
    random = np.random.default_rng(0)
    older = random.integers(0x3F80, 0x4000, 3 * BLOCK, np.uint16)
    newer = older.copy()
    newer[[5, 40_000, 2 * BLOCK + 5, 3 * BLOCK - 1]] += 1
    older[70], newer[70] = 0x8000, 0x0000
    try:
        return bool((decoded(encode(older, newer), newer) == older).all())
    except IndexError:
        return False


def test_the_check_of_the_encoding_notices_defective_ones() -> None:
    assert comes_back(difference)
    assert not comes_back(by_floats)
    assert not comes_back(a_block_off)
    assert not comes_back(signed_places)


def test_the_check_of_composition_notices_the_wrong_order() -> None:
    oldest, between, newest = (np.full(1000, bits, np.uint16) for bits in (1, 1, 1))
    oldest[3], between[3], newest[3] = 7, 8, 9
    one, other = difference(oldest, between), difference(between, newest)
    np.testing.assert_array_equal(decoded(compose(one, other), newest), oldest)
    assert decoded(compose(other, one), newest)[3] == 8
