"""The simulation behind docs/results.md: what it claims to sample, to score and to leave unchanged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.pages import filled
from bench.staleness import proposition, report, summaries, sweeps, task
from bench.staleness.delays import Delay
from bench.staleness.device_time import ideal_table, in_step_seconds, queued_seconds
from bench.staleness.learner import Batch, Learner
from bench.staleness.llama import Cache, Shape, logits, random_llama, stacked
from bench.staleness.results import Run, append, load, missing
from bench.staleness.rollout import generate, score
from bench.staleness.settings import ARMS, Arm, Settings
from bench.staleness.simulation import run
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rljob_api.spec import RandomModel

SMALL = Settings(
    arm="exact",
    cap=2,
    delay="variable",
    seed=0,
    discrepancy_bound=1.02,
    digits=3,
    steps=6,
    groups=4,
    group_size=6,
    evaluate_every=3,
    evaluation_prompts=8,
)


def drifted(shape_seed: int, versions: int) -> tuple[Shape, dict[int, dict[str, Tensor]]]:
    """Versions of a model that differ by noise, so that no two say the same of a token."""
    shape, weights = random_llama(RandomModel(seed=shape_seed, initializer_range=0.1))
    generator = torch.Generator().manual_seed(shape_seed)
    history = {0: weights}
    for version in range(1, versions):
        history[version] = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in history[version - 1].items()
        }
    return shape, history


def reference(weights: dict[str, Tensor]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )
    )
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def test_the_stacked_forward_is_that_of_transformers_for_each_version() -> None:
    shape, history = drifted(3, 2)
    tokens_VRT = torch.randint(0, 16, (2, 20, 9), generator=torch.Generator().manual_seed(0))
    ours = logits(stacked([history[0], history[1]]), tokens_VRT, shape)
    for version in (0, 1):
        theirs = reference(history[version])(tokens_VRT[version]).logits
        assert (ours[version] - theirs).abs().max() < 1e-5
        assert (ours[1 - version] - theirs).abs().max() > 1e-2


@torch.no_grad()
def test_the_engine_in_bfloat16_is_that_of_transformers_to_the_bit() -> None:
    shape, history = drifted(3, 1)
    tokens_RT = torch.randint(0, 16, (20, 9), generator=torch.Generator().manual_seed(0))
    model = reference(history[0])
    inverse_frequencies = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    model.model.rotary_emb.inv_freq = inverse_frequencies  # the cast rounds the angles as well
    ours = logits(stacked([history[0]], torch.bfloat16), tokens_RT[None], shape)[0]
    assert torch.equal(ours, model(tokens_RT).logits)


@torch.no_grad()
def test_a_forward_with_a_cache_gives_what_one_without_gives() -> None:
    shape, history = drifted(4, 2)
    weights, cache = stacked([history[0], history[1]]), Cache()
    tokens_VRT = torch.randint(0, 16, (2, 5, 9), generator=torch.Generator().manual_seed(0))
    pieces = [logits(weights, tokens_VRT[..., :5], shape, cache)]
    pieces += [logits(weights, tokens_VRT[..., i : i + 1], shape, cache) for i in range(5, 9)]
    assert (torch.cat(pieces, dim=2) - logits(weights, tokens_VRT, shape)).abs().max() < 1e-5


def test_variable_delays_draw_each_staleness_equally_often_and_move_on_by_one_version() -> None:
    delay, generator = Delay("variable", 4), torch.Generator().manual_seed(0)
    boundaries = set()
    for step in range(10, 30):
        staleness_NK = step - delay.versions(step, 100, 4, generator)
        assert torch.bincount(staleness_NK[:, 0]).tolist() == [20] * 5
        steps_NK = staleness_NK[:, :-1] - staleness_NK[:, 1:]
        assert set(steps_NK.unique().tolist()) <= {0, 1}
        assert steps_NK.sum() == 40  # half of the 80 that have a newer version to go on under
        changed = steps_NK.any(dim=0).nonzero()[:, 0].tolist()
        assert len(changed) == 1  # a version lands at one token of the batch
        boundaries |= set(changed)
    assert boundaries == {0, 1, 2}


def test_fixed_delays_are_the_cap_and_no_version_is_below_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    assert Delay("fixed", 4).versions(10, 6, 3, generator).unique().tolist() == [6]
    assert Delay("fixed", 4).versions(1, 6, 3, generator).unique().tolist() == [0]
    assert int(Delay("variable", 4).versions(1, 60, 3, generator).min()) == 0


def test_the_recorded_version_of_each_token_is_the_one_that_sampled_it() -> None:
    shape, history = drifted(5, 4)
    generator = torch.Generator().manual_seed(1)
    prompts_NP = task.prompts(torch.randint(0, 10, (60, 4), generator=generator))
    versions_NK = Delay("variable", 3).versions(3, 60, 4, generator)
    uniform_NK = torch.rand(60, 4, generator=generator)
    answers_NK, behavior_NK = generate(history, shape, prompts_NP, versions_NK, uniform_NK, engine_type=torch.float32)
    assert versions_NK.unique().tolist() == [0, 1, 2, 3]

    def apart(recorded_NK: Tensor) -> Tensor:
        return (score(history, shape, prompts_NP, answers_NK, recorded_NK) - behavior_NK).abs()

    assert apart(versions_NK).max() < 1e-5
    assert (apart((versions_NK - 1).clamp(min=0))[versions_NK > 0] > 1e-3).float().mean() > 0.9


def test_a_token_depends_on_its_own_random_number_and_not_on_how_rows_are_grouped() -> None:
    shape, history = drifted(6, 2)
    generator = torch.Generator().manual_seed(1)
    prompts_NP = task.prompts(torch.randint(0, 10, (12, 3), generator=generator))
    versions_NK, uniform_NK = (
        torch.tensor([0, 1]).repeat(6)[:, None].expand(12, 3),
        torch.rand(12, 3, generator=generator),
    )

    def answers(rows: Tensor) -> Tensor:
        return generate(
            history, shape, prompts_NP[rows], versions_NK[rows], uniform_NK[rows], engine_type=torch.float32
        )[0]

    order = torch.randperm(12, generator=generator)
    assert torch.equal(answers(torch.arange(12))[order], answers(order))
    assert torch.equal(answers(torch.arange(12))[5:6], answers(torch.tensor([5])))


def final_weights(settings: Settings) -> dict[str, Tensor]:
    kept: dict[str, Learner] = {}
    run(settings, on_step=lambda _step, learner, _batch: kept.update(learner=learner))
    return {name: tensor.detach() for name, tensor in kept["learner"].weights.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("arm", ["current", "ewma", "ewma-no-reset"])
def test_without_staleness_every_old_policy_is_the_resident_one(arm: Arm) -> None:
    fresh = replace(SMALL, cap=0)
    assert equal(final_weights(replace(fresh, arm=arm)), final_weights(fresh))
    assert not equal(final_weights(replace(SMALL, arm=arm)), final_weights(SMALL))


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    def record(seed: int) -> dict[str, object]:
        found = run(replace(SMALL, arm="ewma", seed=seed))
        del found["cpu_seconds"]
        return found

    assert record(0) == record(0)
    assert record(0) != record(1)


def test_arms_of_a_seed_see_the_same_questions_and_delays() -> None:
    def seen(arm: Arm) -> list[Tensor]:
        batches: list[Tensor] = []
        run(
            replace(SMALL, arm=arm), on_step=lambda _s, _l, batch: batches.extend((batch.prompts_NP, batch.versions_NK))
        )
        return batches

    assert all(torch.equal(one, other) for one, other in zip(seen("exact"), seen("current"), strict=True))


def test_with_an_engine_in_float32_the_exact_discrepancy_is_nothing_at_any_staleness() -> None:
    settings = replace(SMALL, engine="float32", learning_rate=5e-3)

    def largest(arm: Arm) -> dict[int, float]:
        buckets = run(replace(settings, arm=arm))["buckets"]
        return {n: max(b["rms_used"] for b in buckets if b["staleness"] == n) for n in range(3)}

    assert max(largest("exact").values()) < 2e-6
    current = largest("current")
    assert current[0] < 2e-6
    assert current[2] > 1e-2


def test_the_average_is_reset_when_the_mask_shuts_it_out_and_only_then() -> None:
    settings = replace(SMALL, arm="ewma", learning_rate=5e-3)
    assert run(settings)["resets"]
    assert run(replace(settings, arm="ewma-no-reset"))["resets"] == []
    assert run(replace(settings, discrepancy_bound=1e6))["resets"] == []


def test_a_log_linear_reference_is_the_total_ratio_with_moved_thresholds() -> None:
    """Proposition 1, on one recorded stream; with the thresholds as they were the same run goes elsewhere."""
    found = proposition.compare(replace(SMALL, arm="log-linear"))
    assert max(found["difference"]["moved"]) < 1e-3
    assert found["difference"]["as they were"][-1] > 0.1


def test_in_float64_a_log_linear_run_and_its_moved_thresholds_part_by_rounding_alone() -> None:
    found = proposition.compare(replace(SMALL, arm="log-linear", trainer="float64"))
    assert max(found["difference"]["moved"]) < 1e-10
    assert found["crossed"]["moved"] == {"first_step": None, "tokens": 0}
    assert found["crossed"]["as they were"]["tokens"] > 0


def test_the_drift_is_what_the_policy_moved_since_the_last_version() -> None:
    """With an engine in float32, where log mu is log pi_old."""
    moved: list[Tensor] = []

    def note(step: int, learner: Learner, batch: Batch) -> None:
        difference_NK = learner.target_logprobs(batch).detach() - batch.behavior_logprobs_NK
        moved.append(difference_NK[step - batch.versions_NK == 1])

    found = run(replace(SMALL, engine="float32"), on_step=note)
    assert found["rms_drift_per_version"] == pytest.approx(float(torch.cat(moved).square().mean().sqrt()), rel=2e-3)
    assert found["rms_engine_discrepancy"] < 2e-6
    assert run(replace(SMALL, cap=0))["rms_drift_per_version"] is None


def test_a_warm_run_starts_from_the_weights_of_a_run_without_staleness_whatever_its_arm_and_mask() -> None:
    def start(settings: Settings) -> dict[str, Tensor]:
        kept: list[dict[str, Tensor]] = []
        run(settings, on_step=lambda _step, learner, _batch: kept.append(learner.history[0]) if not kept else None)
        return kept[0]

    warm = replace(SMALL, warm_steps=10, learning_rate=1e-4)
    without = final_weights(replace(SMALL, cap=0, delay="fixed", discrepancy_bound=2.0, steps=10, evaluate_every=10))
    assert equal(start(warm), without)
    assert equal(start(replace(warm, arm="ewma", discrepancy_bound=1.5)), without)
    assert not equal(start(SMALL), without)


@pytest.mark.parametrize("seconds", [in_step_seconds, queued_seconds])
def test_side_by_side_stages_take_the_slower_one_and_the_overhead(seconds: Callable[..., float]) -> None:
    assert seconds(243, 272, overhead=11, spread=0) == pytest.approx(283)
    assert seconds(243, 206, overhead=11, spread=0) == pytest.approx(254)


def test_uneven_batches_cost_stages_in_step_more_than_queued_ones() -> None:
    in_step = in_step_seconds(250, 250, overhead=0, spread=0.3)
    queued = [queued_seconds(250, 250, overhead=0, spread=0.3, ahead=ahead) for ahead in (1, 4)]
    assert 250 < queued[1] < queued[0] < in_step


def test_with_perfect_scaling_a_split_never_beats_all_devices_together() -> None:
    for _, single, dedicated in ideal_table(1, 3, ((1, 1), (1, 2), (1, 3), (1, 4), (2, 3))):
        assert dedicated >= single
    assert ideal_table(1, 3, ((1, 3),)) == [["1:3", 1.0, 1.0]]


def test_a_sweep_that_was_cut_off_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    wanted = list(sweeps.calibration())
    append("calibration", wanted[1], {"reward": [0.5]}, tmp_path)
    assert list(missing(wanted, "calibration", tmp_path)) == [wanted[0], wanted[2]]
    assert load("calibration", tmp_path) == [Run(wanted[1], {"reward": [0.5]})]


def test_a_run_with_any_other_setting_is_another_run(tmp_path: Path) -> None:
    append("calibration", SMALL, {}, tmp_path)
    assert list(missing([SMALL], "calibration", tmp_path)) == []
    for other in (replace(SMALL, clip=0.3), replace(SMALL, steps=12), replace(SMALL, decay=0.6)):
        assert list(missing([other], "calibration", tmp_path)) == [other]


def test_the_sweeps_hold_every_arm_and_every_pair_of_thresholds_for_each_seed() -> None:
    of_fixed = {(its.arm, its.cap, its.seed) for its in sweeps.fixed(1.01)}
    assert of_fixed == set(itertools.product(ARMS, sweeps.CAPS, sweeps.SEEDS))
    settings = list(itertools.chain(sweeps.variable(1.01), sweeps.open_mask(1.01), sweeps.thresholds(1.01)))
    assert len({its.key for its in settings}) == len(settings)
    pairs = {
        (its.discrepancy_bound, its.clip, its.seed)
        for its in settings
        if its.arm == "exact" and its.cap == sweeps.ABLATION_CAP
    }
    assert pairs == set(itertools.product(sweeps.mask_bounds(1.01), sweeps.CLIPS, sweeps.SEEDS))


def test_three_seeds_order_two_arms_only_where_all_agree() -> None:
    def runs(*rewards: float) -> list[Run]:
        return [Run(replace(SMALL, seed=seed), {"reward": [reward]}) for seed, reward in enumerate(rewards)]

    def said(*rewards: float) -> str:
        return summaries.verdict(summaries.paired(runs(*rewards), runs(0.5, 0.6, 0.7), summaries.last_mean))

    assert said(0.6, 0.7, 0.8) == "above in every seed"
    assert said(0.4, 0.5, 0.6) == "below in every seed"
    assert said(0.6, 0.7, 0.6) == "not told apart"


def test_a_result_is_the_mean_of_the_last_evaluations_and_not_the_best() -> None:
    assert summaries.last_mean(Run(SMALL, {"reward": [0.0, 0.9, 0.3, 0.2, 0.4]})) == pytest.approx(0.3)


def test_early_is_the_first_half_of_the_evaluations() -> None:
    assert summaries.early_mean(Run(SMALL, {"reward": [0.1, 0.3, 0.8, 0.9]})) == pytest.approx(0.2)


def test_the_tables_on_the_page_are_those_of_the_stored_runs() -> None:
    page = report.PAGE.read_text()
    assert filled(page, "staleness", report.tables()) == page
    assert "<!-- staleness:variable-8 -->" in page
