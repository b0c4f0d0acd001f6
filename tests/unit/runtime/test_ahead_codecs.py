"""Segment and score messages: what goes in comes out, and whatever breaks an invariant is refused on both sides."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from rljob_api.errors import MalformedMessage
from rljob_api.messages import ScoreHeader, SegmentHeader
from rljob_runtime import score_codec, segment_codec
from rljob_runtime.score_codec import Scores, decode_scores, encode_scores
from rljob_runtime.segment_codec import OpenSegment, decode_segment, encode_segment

NAN, INF = float("nan"), float("inf")


def segment(start: int = 3, **changes: list[float]) -> OpenSegment:
    arrays: dict[str, Any] = {
        "tokens": [5, 0, 7, 8],
        "turn": [0, 0, -1, 1],
        "weight_version": [4, 5, -1, 5],
        "behavior_logprobs": [-1.5, -0.25, 0.0, 0.0],
    } | changes
    return OpenSegment(
        SegmentHeader(task=2, sample=1, attempt=3, worker="main-0", incarnation="a", start=start),
        **{
            name: np.array(values, np.float32 if name == "behavior_logprobs" else np.int32)
            for name, values in arrays.items()
        },
    )


def scores(**changes: list[float]) -> Scores:
    arrays: dict[str, Any] = {
        "positions": [1, 2, 9],
        "weight_version": [4, 4, 0],
        "logprobs": [-2.5, 0.0, -0.125],
    } | changes
    return Scores(
        ScoreHeader(task=2, sample=1, sequence=17, worker="old-policy-0"),
        **{name: np.array(values, np.float32 if name == "logprobs" else np.int32) for name, values in arrays.items()},
    )


def equal(one: Any, other: Any) -> bool:
    return one.header == other.header and all(
        getattr(one, field.name).dtype == getattr(other, field.name).dtype
        and np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
        if field.name != "header"
    )


def test_messages_come_back_as_they_were() -> None:
    assert equal(decode_segment(encode_segment(segment())), segment())
    assert equal(decode_scores(encode_scores(scores())), scores())
    nothing = scores(positions=[], weight_version=[], logprobs=[])
    assert equal(decode_scores(encode_scores(nothing)), nothing), "a trajectory without a token to score has an answer"


BROKEN_SEGMENTS = {
    "lengths differ": ({"turn": [0, 0, -1]}, r"turn has shape \(3,\), must be \[4\] as tokens"),
    "no tokens": ({"tokens": [], "turn": [], "weight_version": [], "behavior_logprobs": []}, "no tokens"),
    "a token below 0": ({"tokens": [5, -1, 7, 8]}, "negative token id"),
    "a value that is not finite": (
        {"behavior_logprobs": [-1.5, NAN, 0.0, INF]},
        "2 behavior log-probabilities are not finite",
    ),
    "a probability above 1": ({"behavior_logprobs": [-1.5, 0.5, 0.0, 0.0]}, "0.5 is above 0"),
    "a model token without a version": ({"weight_version": [4, -1, -1, 5]}, "has no weight version"),
    "turns that fall": ({"turn": [1, 1, -1, 0]}, "turns of model tokens must never fall"),
}


@pytest.mark.parametrize(("changes", "said"), BROKEN_SEGMENTS.values(), ids=BROKEN_SEGMENTS)
def test_a_broken_segment_neither_leaves_nor_enters(
    changes: dict[str, list[float]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MalformedMessage, match=f"segment 2/1 from token 3: .*{said}"):
        encode_segment(segment(**changes))
    with monkeypatch.context() as unchecked:
        unchecked.setattr(segment_codec, "_check", lambda _: None)
        data = encode_segment(segment(**changes))
    with pytest.raises(MalformedMessage, match=said):
        decode_segment(data)


def test_a_trajectory_cannot_begin_with_a_model_token_and_a_later_segment_can() -> None:
    with pytest.raises(MalformedMessage, match="the first token is marked as a model token"):
        encode_segment(segment(start=0))
    assert decode_segment(encode_segment(segment(start=1))).turn[0] == 0


BROKEN_SCORES = {
    "lengths differ": ({"logprobs": [-1.0]}, r"logprobs has shape \(1,\), must be \[3\] as positions"),
    "positions that fall": ({"positions": [1, 9, 2]}, "positions must ascend"),
    "a position twice": ({"positions": [1, 1, 2]}, "positions must ascend"),
    "the first token": ({"positions": [0, 1, 2]}, "ascend from 1"),
    "a version below 0": ({"weight_version": [4, -1, 0]}, "negative weight version"),
    "values that are not finite": ({"logprobs": [NAN, -INF, -1.0]}, "2 values are not finite"),
    "a probability above 1": ({"logprobs": [-1.0, 0.25, -1.0]}, "0.25 is above 0"),
}


@pytest.mark.parametrize(("changes", "said"), BROKEN_SCORES.values(), ids=BROKEN_SCORES)
def test_broken_scores_neither_leave_nor_enter(
    changes: dict[str, list[float]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MalformedMessage, match=rf"scores of 2/1 \(message 17\): .*{said}"):
        encode_scores(scores(**changes))
    with monkeypatch.context() as unchecked:
        unchecked.setattr(score_codec, "_check", lambda _: None)
        data = encode_scores(scores(**changes))
    with pytest.raises(MalformedMessage, match=said):
        decode_scores(data)


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_log_probabilities_of_another_type_are_refused(kind: type[np.generic]) -> None:
    narrow = dataclasses.replace(scores(), logprobs=scores().logprobs.astype(kind))
    with pytest.raises(MalformedMessage, match=r"logprobs has type float.., must be float32"):
        encode_scores(narrow)
    behavior = segment().behavior_logprobs.astype(kind)
    with pytest.raises(MalformedMessage, match=r"behavior_logprobs has type float.., must be float32"):
        encode_segment(dataclasses.replace(segment(), behavior_logprobs=behavior))


def test_a_message_of_another_kind_and_no_message_at_all_are_refused() -> None:
    with pytest.raises(MalformedMessage, match="scores: tensors"):
        decode_scores(encode_segment(segment()))
    with pytest.raises(MalformedMessage, match="segment: tensors"):
        decode_segment(encode_scores(scores()))
    for data in (b"", b"no message", encode_segment(segment())[:40]):
        with pytest.raises(MalformedMessage, match="not a safetensors message"):
            decode_segment(data)
