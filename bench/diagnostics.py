"""Time of a training step with its diagnostics, over the same step without: forward, backward, update, then all figures.

The step is that of a small task: 96 trajectories of 24 to 96 tokens, versions up to 4 back, on the random digit model.
Larger models only make the share smaller: the diagnostics cost the same for every model. Both parts are timed in each
round, one after the other, and a round's figure is their sum over the step alone. What a real step has besides (waiting,
scoring of old versions, publishing) is left out.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.made_steps import made_trajectory, update_settings
from bench.measure import Figure, repeated
from rljob_api.correction import OldLogprobs
from rljob_api.spec import Advantage, ComputeType, Model, RandomModel, Training
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.correction.step_diagnostics import step_diagnostics
from rljob_runtime.model_source import materialise
from rljob_runtime.trainer.batch import TrainBatch, build_batch
from rljob_runtime.trainer.distributed import World, distributed_world
from rljob_runtime.trainer.model import build_policy
from rljob_runtime.trainer.optimizer import build_optimizer
from rljob_runtime.trainer.step_tokens import step_tokens, thresholds_of
from rljob_runtime.trainer.update import resolve_batch, train_on

TASKS, SAMPLES = 12, 8
STALENESS = 4
ROUNDS = 15
SETTINGS = update_settings(route=OldLogprobs.CURRENT, token_budget=8192)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with distributed_world("cpu", timeout_seconds=60) as world:
        times = _measure(world)
    value, low, high = repeated([(step + extra) / step for step, extra in times])
    step, extra = sorted(times, key=lambda one: one[1] / one[0])[len(times) // 2]
    detail = (
        f"{extra * 1e3:.2f} ms of diagnostics after a step of {step * 1e3:.0f} ms, {TASKS * SAMPLES} trajectories of 24 to "
        f"96 tokens"
    )
    Figure("diagnostics", value, low, high, f"{ROUNDS} rounds, smallest and largest", detail).print()


def _measure(world: World) -> list[tuple[float, float]]:
    """Seconds of the step and of its diagnostics, of each round."""
    with tempfile.TemporaryDirectory(prefix="rljob-bench-") as folder:
        model = materialise(Model(random=RandomModel(max_positions=128)), Path(folder) / "model")
        policy = build_policy(model, compute_type=ComputeType.FLOAT32, device=world.device, mesh=world.mesh)
    optimizer = build_optimizer(policy, Training(steps=1, tasks_per_step=TASKS, learning_rate=1e-3))
    store, batch = SnapshotStore(torch.float32), _batch()
    times = []
    for number in range(ROUNDS + 1):
        started = time.perf_counter()
        old = resolve_batch(policy, batch, store, SETTINGS, world)
        update = train_on(policy, optimizer, batch, old, SETTINGS, world, rate=1e-3)
        trained = time.perf_counter()
        step_diagnostics(step_tokens(batch, update.records), thresholds_of(SETTINGS)).model_dump_json()
        if number:  # the first round warms up
            times.append((trained - started, time.perf_counter() - trained))
    return times


def _batch() -> TrainBatch:
    """Prompt, a turn, an observation, a turn; most trajectories span two versions."""
    generator = np.random.default_rng(0)
    groups = []
    for task in range(TASKS):
        group = []
        for sample in range(SAMPLES):
            length = int(generator.integers(24, 97))
            turn = np.array([-1] * 8 + [0] * (length // 2 - 8) + [-1] * 4 + [1] * (length - length // 2 - 4), np.int32)
            first = STALENESS - int(generator.integers(0, STALENESS + 1))
            version = first + (np.arange(length) > generator.integers(0, length)) * (first < STALENESS)
            group.append(
                made_trajectory(
                    task,
                    sample,
                    float(generator.random()),
                    tokens=generator.integers(3, 13, length),
                    turn=turn,
                    weight_version=np.where(turn >= 0, version, -1),
                    behavior_logprobs=np.where(turn >= 0, -np.log(10) + 0.01 * generator.standard_normal(length), 0),
                )
            )
        groups.append(group)
    return build_batch(groups, version=STALENESS, max_versions=STALENESS, advantage=Advantage())


if __name__ == "__main__":
    main()
