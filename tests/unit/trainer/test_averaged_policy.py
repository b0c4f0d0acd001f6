"""What the average of weights decides from a step's statistics, and that a policy can hold it and come back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from rljob_api.correction import Correction, Ewma, EwmaReset, Fallback, OldLogprobs
from rljob_runtime.correction.averaged_policy import AveragedPolicy, AverageState, averaged_policy
from rljob_runtime.correction.ewma_monitor import EwmaMonitor, StepStatistics

FIXED = Ewma(decay=0.5)


class TwoWeights(nn.Module):
    """Two parameters, one of them empty as a shard can be."""

    def __init__(self, *values: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values, dtype=dtype))
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=dtype))

    def published_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [("weight", self.weight), ("empty", self.empty)]

    def hold(self, *values: float) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.tensor(values))

    @property
    def values(self) -> list[float]:
        return self.weight.tolist()


def step(
    keep: float = 1.0,
    exact: float = 1.0,
    *,
    ewma: int = 10,
    exact_tokens: int = 10,
    tokens: int = 20,
    mean: float = 1.0,
) -> StepStatistics:
    return StepStatistics(
        tokens=tokens,
        mean_staleness=mean,
        ewma_tokens=ewma,
        ewma_keep_fraction=keep,
        exact_tokens=exact_tokens,
        exact_keep_fraction=exact,
    )


def reset_when(threshold: float = 0.9, patience: int = 1, is_absolute: bool = False) -> Ewma:
    return Ewma(decay=0.5, reset=EwmaReset(threshold=threshold, patience=patience, is_absolute=is_absolute))


@pytest.mark.parametrize(
    ("claim", "settings", "steps", "resets_at"),
    [
        ("at once, with patience 1", reset_when(), [step(0.89)], [0]),
        ("never at the threshold itself", reset_when(), [step(0.9)] * 3, []),
        ("after as many low steps as patience says", reset_when(patience=3), [step(0.5)] * 7, [2, 5]),
        ("a good step ends the streak", reset_when(patience=2), [step(0.5), step(0.95), step(0.5), step(0.5)], [3]),
        ("relative to exact tokens", reset_when(), [step(0.50, 0.55), step(0.49, 0.55)], [1]),
        ("engine noise alone does nothing", reset_when(), [step(0.1, 0.1)] * 3, []),
        ("an engine that keeps nothing proves nothing", reset_when(), [step(0.0, 0.0)] * 3, []),
        ("absolute, engine noise counts", reset_when(is_absolute=True), [step(0.8, 0.8)], [0]),
        ("threshold 0 never resets", reset_when(threshold=0), [step(0.0)] * 9, []),
        ("threshold 1 resets on any loss", reset_when(threshold=1), [step(1.0), step(0.999)], [1]),
        (
            "without exact tokens: those of the last step that had some",
            reset_when(),
            [step(0.5, 0.5), step(0.46, 1.0, exact_tokens=0), step(0.44, 1.0, exact_tokens=0)],
            [2],
        ),
        ("no exact tokens yet: as if all were kept", reset_when(), [step(0.89, 0.0, exact_tokens=0)], [0]),
        (
            "a step without tokens of the average leaves the streak as it is",
            reset_when(patience=2),
            [step(0.5), step(0.0, ewma=0), step(0.0, ewma=0), step(0.5)],
            [3],
        ),
    ],
)
def test_the_average_is_reset(
    claim: str, settings: Ewma, steps: Sequence[StepStatistics], resets_at: Sequence[int]
) -> None:
    monitor, found = EwmaMonitor(), []
    for number, statistics in enumerate(steps):
        monitor, is_due = monitor.after(statistics, settings)
        if is_due:
            found.append(number)
        last = found[-1] if found else -1
        assert (monitor.resets, monitor.steps_since_reset) == (len(found), number - last), claim
    assert found == list(resets_at), claim


@pytest.mark.parametrize(
    ("claim", "settings", "steps", "decay"),
    [
        ("nothing seen: only the newest weights", Ewma(), [], 0.0),
        ("the mean staleness", Ewma(), [step(mean=1.5)], 0.6),
        ("weighted by tokens", Ewma(), [step(mean=0.0, tokens=30), step(mean=4.0, tokens=10)], 0.5),
        ("a step without tokens says nothing", Ewma(), [step(mean=1.5), step(mean=0.0, tokens=0)], 0.6),
        ("over the last 32 steps", Ewma(), [step(mean=9.0)] * 5 + [step(mean=1.0)] * 32, 0.5),
        ("and not fewer", Ewma(), [step(mean=17.0)] + [step(mean=1.0)] * 31, 0.6),
        ("the window, whatever the staleness", Ewma(window=3), [step(mean=9.0)], 0.6),
        ("fixed, whatever the staleness", FIXED, [step(mean=9.0)], 0.5),
    ],
)
def test_the_decay_follows(claim: str, settings: Ewma, steps: Sequence[StepStatistics], decay: float) -> None:
    monitor = EwmaMonitor()
    for statistics in steps:
        monitor, _ = monitor.after(statistics, settings)
    assert monitor.decay(settings) == pytest.approx(decay, abs=1e-12), claim


def test_the_monitor_survives_json_to_the_bit() -> None:
    monitor = EwmaMonitor()
    for number in range(40):
        monitor, _ = monitor.after(step(0.1 + 0.02 * number, 1 / 3, mean=number / 7), Ewma())
    assert EwmaMonitor.model_validate_json(monitor.model_dump_json(by_alias=True)) == monitor


def test_published_versions_are_averaged_and_the_first_is_the_start() -> None:
    policy, average = TwoWeights(1.0, -2.0), AveragedPolicy(FIXED)
    average.start(policy)
    policy.hold(4.0, 4.0)
    average.published(policy)
    with average.held(policy):
        assert policy.values == pytest.approx([3.0, 2.0])  # (θ_1 + θ_0 / 2) / 1.5
    report = average.report()
    assert (report.decay, report.weight, report.resets) == (0.5, 1.5, 0)
    assert report.center_of_mass == pytest.approx(1 / 3)
    assert report.relative_distance == pytest.approx((1 + 4) ** 0.5 / 32**0.5)
    assert report.staleness_gap == pytest.approx(-1 / 3)


def test_the_policy_has_its_own_weights_and_the_average_its_own_after_each_hold() -> None:
    values = [0.1, 1e-30, -3.3e7]
    policy, average = TwoWeights(1.0, 2.0, 3.0), AveragedPolicy(FIXED)
    average.start(policy)
    policy.hold(*values)
    average.published(policy)
    masters = policy.weight.detach().clone()
    expected = average.tensors(policy)["weight"].clone()
    for _ in range(2):
        with average.held(policy):
            assert torch.equal(policy.weight, expected) and not torch.equal(policy.weight, masters)
        assert torch.equal(policy.weight, masters)
    with pytest.raises(RuntimeError, match="in the middle"), average.held(policy):
        raise RuntimeError("in the middle")
    assert torch.equal(policy.weight, masters)
    assert torch.equal(average.tensors(policy)["weight"], expected)


def test_a_reset_takes_the_next_version_alone() -> None:
    policy, average = TwoWeights(1.0), AveragedPolicy(reset_when())
    average.start(policy)
    policy.hold(3.0)
    average.published(policy)
    average.observe(step(0.5))
    policy.hold(7.0)
    average.published(policy)
    with average.held(policy):
        assert policy.values == [7.0]
    report = average.report()
    assert (report.resets, report.steps_since_reset, report.weight, report.relative_distance) == (1, 0, 1.0, 0.0)
    policy.hold(1.0)
    average.published(policy)  # once: the next version is averaged again
    assert average.report().weight == 1.5


def test_version_weights_are_those_of_the_decays_that_were() -> None:
    """Weights 1, 10, 100 ... spell the shares out."""
    policy, average = TwoWeights(1.0, dtype=torch.float64), AveragedPolicy(Ewma())
    average.start(policy)
    decays = []
    for version in range(1, 6):
        average.observe(step(mean=float(version % 3)))
        policy.hold(10.0**version)
        average.published(policy)
        decays.append(average.report().decay)
    assert len(set(decays)) == 3
    weights = average.version_weights()
    products = [math.prod(decays[len(decays) - age :]) for age in range(6)]
    assert weights == pytest.approx([product / sum(products) for product in products])
    averaged = average.tensors(policy)["weight"].item()
    assert averaged == pytest.approx(sum(share * 10.0 ** (5 - age) for age, share in enumerate(weights)))
    assert average.report().center_of_mass == pytest.approx(sum(age * share for age, share in enumerate(weights)))


def test_the_decay_of_a_version_is_that_of_the_steps_before_it() -> None:
    policy, average = TwoWeights(0.0), AveragedPolicy(Ewma())
    average.start(policy)
    average.observe(step(mean=1.0))
    policy.hold(3.0)
    average.published(policy)
    with average.held(policy):
        assert policy.values == pytest.approx([2.0])  # decay 1/2
    assert average.report().decay == 0.5


def test_an_average_restored_from_a_checkpoint_goes_on_to_the_bit() -> None:
    def go_on(average: AveragedPolicy, policy: TwoWeights) -> tuple[object, list[float]]:
        average.observe(step(0.5, mean=1.3))
        policy.hold(0.3, 0.7)
        average.published(policy)
        return average.report(), average.tensors(policy)["weight"].tolist()

    settings = Ewma(reset=EwmaReset(patience=3))
    policy, average = TwoWeights(1.0, 2.0), AveragedPolicy(settings)
    average.start(policy)
    for number in range(5):
        average.observe(step(0.5, mean=number / 3))
        policy.hold(0.1 * number, 0.2)
        average.published(policy)

    state = AverageState.model_validate_json(average.state().model_dump_json(by_alias=True))
    other_policy, other = TwoWeights(*policy.values), AveragedPolicy(settings)
    other.start(other_policy)
    for name, tensor in other.tensors(other_policy).items():
        tensor.copy_(average.tensors(policy)[name])
    other.restore(state, other_policy)
    assert other.report() == average.report()
    assert go_on(other, other_policy) == go_on(average, policy)


def test_starting_again_forgets_everything() -> None:
    policy, average = TwoWeights(1.0), AveragedPolicy(reset_when(patience=2))
    average.start(policy)
    policy.hold(2.0)
    average.observe(step(0.1))
    average.published(policy)
    average.start(policy)
    fresh = AveragedPolicy(reset_when(patience=2))
    fresh.start(policy)
    assert average.report() == fresh.report() and average.state() == fresh.state()


def test_masters_narrower_than_float32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"master of weight is torch.bfloat16: keep masters in float32 or wider"):
        AveragedPolicy(FIXED).start(TwoWeights(1.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("correction", "is_there"),
    [
        (Correction(old_logprobs=OldLogprobs.EWMA), True),
        (Correction(fallback=Fallback.EWMA), True),
        (Correction(), False),
    ],
)
def test_an_average_is_kept_only_where_route_or_fallback_needs_it(correction: Correction, is_there: bool) -> None:
    assert (averaged_policy(correction, TwoWeights(1.0)) is not None) is is_there
