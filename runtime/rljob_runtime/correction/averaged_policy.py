"""The policy of the averaged weights, beside a policy that trains (revised PPO-EWMA).

Each process averages its own shards of the fp32 masters, once a published version: fp32, on their device, so 4 bytes a
parameter there. All processes make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rljob_api.base import FrozenModel
from rljob_api.correction import Correction, Ewma, Fallback, OldLogprobs
from rljob_api.messages import EwmaReport
from rljob_runtime.correction.ewma import WeightEwma
from rljob_runtime.correction.ewma_monitor import EwmaMonitor, StepStatistics
from rljob_runtime.correction.published import PublishedParameters, local_shard

NEGLIGIBLE_SHARE = 1e-4
"""Of a version in the average, over the newest one's: older ones are forgotten, in `version_weights` alone."""


class AverageState(FrozenModel):
    """What a checkpoint keeps of the average besides its tensors; the same on every process."""

    decay: float
    weight: float
    aged_weight: float
    shares: tuple[float, ...]
    monitor: EwmaMonitor


class AveragedPolicy:
    """Averages a policy's published versions, lets the policy hold the average, and resets it when it fell behind.

    A step goes: `held` while it is scored, `observe` what came of it, `published` once its version is out.
    """

    def __init__(self, settings: Ewma) -> None:
        self._settings = settings
        self._monitor = EwmaMonitor()
        self._average = WeightEwma(self._monitor.decay(settings))
        self._shares: tuple[float, ...] = ()
        self._is_reset_due = False
        self._distance = 0.0

    def start(self, policy: PublishedParameters) -> None:
        """Begin with the policy's present weights and no memory.

        Raises:
            ValueError: the masters are narrower than float32.
        """
        masters = _masters(policy)
        for name, tensor in masters.items():
            if tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"the master of {name} is {tensor.dtype}: keep masters in float32 or wider to average them"
                )
        self._monitor, self._is_reset_due = EwmaMonitor(), False
        self._average.decay = self._monitor.decay(self._settings)
        self._average.reset(masters)
        self._shares = (1.0,)
        self._distance = _relative_distance(policy, self._average)

    def observe(self, step: StepStatistics) -> None:
        """Learn from a step that was scored with the average: the decay, and whether to reset, from the next version on.

        The statistics must be those of all processes together, the same on each.
        """
        self._monitor, self._is_reset_due = self._monitor.after(step, self._settings)

    def published(self, policy: PublishedParameters) -> None:
        """Take the weights of a new version in, or start anew from them. Collective."""
        self._average.decay = self._monitor.decay(self._settings)
        if self._is_reset_due:
            self._average.reset(_masters(policy))
            self._shares, self._is_reset_due = (1.0,), False
        else:
            self._average.update(_masters(policy))
            aged = (self._average.decay * share for share in self._shares)
            self._shares = (1.0, *(share for share in aged if share >= NEGLIGIBLE_SHARE))
        self._distance = _relative_distance(policy, self._average)

    @contextmanager
    def held(self, policy: PublishedParameters) -> Iterator[None]:
        """Let the policy hold the average inside the block; afterwards its masters are bit for bit as before.

        Masters and average change places, so no third copy is needed: inside the block the average is not to be had.
        Forwards inside must run without gradient, and the optimizer must not step.
        """
        masters, changed = _masters(policy), []
        try:
            for name, master in masters.items():
                _exchange(master, self._average.params[name])
                changed.append(name)
            yield
        finally:
            for name in changed:
                _exchange(masters[name], self._average.params[name])

    def report(self) -> EwmaReport:
        """The average as it stands after the last published version."""
        return EwmaReport(
            decay=self._average.decay,
            weight=self._average.weight,
            center_of_mass=self._average.center_of_mass,
            relative_distance=self._distance,
            resets=self._monitor.resets,
            steps_since_reset=self._monitor.steps_since_reset,
            low_streak=self._monitor.low_streak,
            staleness_gap=self._monitor.mean_staleness - self._average.center_of_mass,
        )

    def version_weights(self) -> tuple[float, ...]:
        """Share of each version in the average, newest first, whatever the decays were; their sum is 1."""
        total = sum(self._shares)
        return tuple(share / total for share in self._shares)

    def tensors(self, policy: PublishedParameters) -> dict[str, Tensor]:
        """The average, sharded as the policy's parameters are: its own memory, to save it from and load it into."""
        return {name: _like(self._average.params[name], parameter) for name, parameter in policy.published_parameters()}

    def state(self) -> AverageState:
        """The rest of what a checkpoint needs. To be taken after `published`: a reset that is due is not in it."""
        saved = self._average.state_dict()
        return AverageState(
            decay=saved["decay"],
            weight=saved["weight"],
            aged_weight=saved["aged_weight"],
            shares=self._shares,
            monitor=self._monitor,
        )

    def restore(self, state: AverageState, policy: PublishedParameters) -> None:
        """Go on from a checkpoint, after its tensors were loaded into `tensors` and its weights into the policy. Collective."""
        self._average.load_state_dict(
            {**state.model_dump(include={"decay", "weight", "aged_weight"}), "params": self._average.params}
        )
        self._monitor, self._shares, self._is_reset_due = state.monitor, state.shares, False
        self._distance = _relative_distance(policy, self._average)


def averaged_policy(correction: Correction, policy: PublishedParameters) -> AveragedPolicy | None:
    """The average that a job's route or fallback needs, started; None where neither does. Collective."""
    if OldLogprobs.EWMA is not correction.old_logprobs and Fallback.EWMA is not correction.fallback:
        return None
    average = AveragedPolicy(correction.ewma)
    average.start(policy)
    return average


def _masters(policy: PublishedParameters) -> dict[str, Tensor]:
    """This process's shards, sharing their memory."""
    return {name: local_shard(parameter) for name, parameter in policy.published_parameters()}


def _like(local: Tensor, parameter: nn.Parameter) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _exchange(one: Tensor, other: Tensor) -> None:
    held = one.clone()
    one.copy_(other)
    other.copy_(held)


def _relative_distance(policy: PublishedParameters, average: WeightEwma) -> float:
    """|θ - average| / |θ|, of all shards together. Collective where the policy is sharded."""
    squares = [
        torch.stack(
            [torch.linalg.vector_norm(master - average.params[name]), torch.linalg.vector_norm(master)]
        ).double()
        ** 2
        for name, master in _masters(policy).items()
    ]
    sums = torch.stack(squares).sum(dim=0)
    if any(isinstance(parameter, DTensor) for _, parameter in policy.published_parameters()):
        dist.all_reduce(sums)
    difference, weights = sums.tolist()
    return float((difference / weights) ** 0.5) if weights else 0.0
