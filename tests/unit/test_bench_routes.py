"""The replay behind the routes' table in docs/results.md: the stream it replays, and what it makes of costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench.pages import filled, table
from bench.routes import report
from bench.routes.replay import random_model, replay
from bench.routes.results import load_replay, save_replay
from bench.routes.stream import RECORDED, Stream, load_stream, made_step, save_stream
from bench.routes.summaries import paired_ratio, summarised
from bench.routes.ways import Cost, Way, key_of
from tests.fakes.trajectories import finished

from rljob_api.spec import RLJobSpec
from rljob_runtime.trajectory_codec import Trajectory

SPEC = RLJobSpec.model_validate(
    {
        "model": {"random": {"layers": 1}},
        "environment": {"name": "digit-copy"},
        "training": {"steps": 9, "tasksPerStep": 2, "learningRate": 1e-3},
        "staleness": {"maxVersions": 2},
        "rolloutPools": [{"name": "main"}],
    }
)


def trajectory(task: int, sample: int, version: int) -> Trajectory:
    header = finished(task, sample, turn_rewards=(0.25, 1.0)[: sample + 1], reward=0.5)
    turn = np.array([-1, 0, 0, -1, 1], np.int32)
    return Trajectory(
        header,
        np.array([3, 7, 11, 4, 9], np.int32),
        turn,
        np.where(turn < 0, -1, [0, version - 2, version - 1, 0, version]).astype(np.int32),
        np.where(turn < 0, 0, -0.5).astype(np.float32),
    )


def stream() -> Stream:
    ahead = np.array([False, True, False, False, False])
    steps = tuple(
        made_step(
            version, [(trajectory(10 * version + task, sample, version), ahead) for task in (0, 1) for sample in (0, 1)]
        )
        for version in range(40, 45)
    )
    return Stream(SPEC, steps)


def cost(step: int, way: Way, old_logprobs: float, **changes: float) -> Cost:
    values = {"upkeep": 0.0, "training": 1.0, "overlapped": 0.0, "exact_fraction": 1.0} | changes
    return Cost(step=step, way=way, old_logprobs=old_logprobs, held_bytes=100 * step, **values)


def test_a_stream_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    kept = stream()
    save_stream(kept, tmp_path / "stream.safetensors")
    found = load_stream(tmp_path / "stream.safetensors")
    assert found.spec == SPEC
    assert [step.version for step in found.steps] == [40, 41, 42, 43, 44]
    for one, other in zip(kept.steps, found.steps, strict=True):
        assert [len(group) for group in other.groups] == [2, 2]
        for row, again in zip(one.trajectories, other.trajectories, strict=True):
            assert again.header.turn_rewards == row.header.turn_rewards and again.header.reward == row.header.reward
            assert key_of(again) == key_of(row)
            for name in ("tokens", "turn", "weight_version", "behavior_logprobs"):
                assert np.array_equal(getattr(again, name), getattr(row, name)), name
            assert np.array_equal(other.ahead[key_of(again)], one.ahead[key_of(row)])


def test_a_window_measures_no_step_whose_tokens_reach_over_its_ends() -> None:
    assert list(stream().measured) == [2]


def test_recorded_streams_are_small_exact_runs_of_the_snapshot_route_with_tokens_up_to_the_bound() -> None:
    for path in RECORDED.glob("*.safetensors"):
        recorded = load_stream(path)
        assert path.stat().st_size < 1 << 20
        assert recorded.knows_what_was_ahead
        versions = [step.version for step in recorded.steps]
        assert versions == list(range(versions[0], versions[0] + len(versions)))
        staleness = np.concatenate(
            [step.version - row.weight_version[row.model_mask] for step in recorded.steps for row in step.trajectories]
        )
        assert staleness.min() >= 0
        assert recorded.lead - 1 <= staleness.max() <= recorded.lead


def test_a_way_is_charged_its_own_old_values_and_the_training_that_all_ways_of_the_step_have() -> None:
    # The second step is ten times as long, and the third way's training had bad luck there.
    costs = [
        cost(1, Way.CURRENT, 0.0),
        cost(2, Way.CURRENT, 0.0, training=10.0),
        cost(3, Way.CURRENT, 0.0),
        cost(1, Way.SNAPSHOT, 0.3, upkeep=0.1, overlapped=0.2),
        cost(2, Way.SNAPSHOT, 3.0, upkeep=1.0, training=10.0, overlapped=2.0),
        cost(3, Way.SNAPSHOT, 0.3, upkeep=0.1, overlapped=0.2),
        cost(1, Way.ENGINE, 0.0),
        cost(2, Way.ENGINE, 0.0, training=70.0),
        cost(3, Way.ENGINE, 0.0),
    ]
    current, snapshot, engine = summarised(costs)
    assert (engine.over_base.value, engine.own_training) == (1.0, 1.0)
    assert (current.way, current.over_base.value) == (Way.CURRENT, 1.0)
    assert (snapshot.over_base.value, snapshot.over_base.low, snapshot.over_base.high) == pytest.approx((1.4, 1.4, 1.4))
    assert snapshot.compute_over_base.value == pytest.approx(1.6)
    assert snapshot.held_bytes == 300


def test_the_interval_of_a_paired_ratio_holds_it() -> None:
    random = np.random.default_rng(3)
    base = random.uniform(1, 50, 30)
    found = paired_ratio((base * random.normal(1.2, 0.05, 30)).tolist(), base.tolist())
    assert found.low < 1.2 < found.high
    assert found.high - found.low < 0.1


def test_a_replay_comes_back_from_its_file(tmp_path: Path) -> None:
    costs = [cost(1, Way.CURRENT, 0.125), cost(1, Way.EWMA, 0.5)]
    save_replay("busy-wide", stream="busy", parameters=5, tokens=7, copy_bytes=20, costs=costs, folder=tmp_path)
    found = load_replay("busy-wide", tmp_path)
    assert list(found.costs) == costs
    assert (found.parameters, found.tokens, found.copy_bytes) == (5, 7, 20)


def test_a_table_is_filled_in_between_its_markers_and_an_unknown_one_is_refused() -> None:
    page = "a\n<!-- routes:x -->\nold\n<!-- end -->\n<!-- other:x -->\nkept\n<!-- end -->\n"
    assert filled(page, "routes", {"x": table(("h",), [("1",)])}) == page.replace("old", "| h |\n| --- |\n| 1 |")
    with pytest.raises(LookupError, match="asks for the table 'x'"):
        filled(page, "routes", {})


def test_the_page_holds_what_the_stored_replays_say() -> None:
    page = report.PAGE.read_text()
    assert filled(page, "routes", report.tables()) == page


@pytest.mark.timeout(240)
def test_every_way_replays_a_stream_and_only_those_that_say_so_work_beside_the_critical_path(tmp_path: Path) -> None:
    recorded = stream()
    costs = replay(recorded, random_model(SPEC.model.random, tmp_path / "model"), tuple(Way))
    assert {cost.step for cost in costs} == {43}
    found = {cost.way: cost for cost in costs}
    assert set(found) == set(Way)
    of_own_version = {way for way, cost in found.items() if cost.exact_fraction == 1.0}
    assert of_own_version == {
        Way.SNAPSHOT,
        Way.SNAPSHOT_NONE,
        Way.SNAPSHOT_ALL,
        Way.DEDICATED,
        Way.INTERRUPTION,
    }
    assert {way for way, cost in found.items() if cost.overlapped} == {Way.SNAPSHOT, Way.SNAPSHOT_ALL, Way.DEDICATED}
    assert {way for way, cost in found.items() if cost.held_bytes} == {
        Way.SNAPSHOT,
        Way.SNAPSHOT_NONE,
        Way.SNAPSHOT_ALL,
        Way.DEDICATED,
        Way.EWMA,
    }
    # A third of the model tokens is of the step's own version, in both other sources.
    assert found[Way.CURRENT].exact_fraction == found[Way.EWMA].exact_fraction == pytest.approx(1 / 3)
