"""CPU time of a training step with the average of weights, over the same step with another old log-probability.

Every token is stale, so the average scores every row: its worst case. Two comparisons, of one update a step each:

    recompute   the reference is a forward pass of its own of the present policy: decoupled PPO as it is usually done.
                The average replaces the weights in that pass, and adds only its upkeep
    detached    the reference is the training forward itself, which costs nothing: what an update of its own would save
                a job that asked for source *current*; here the average adds a whole forward pass

The average's part is all of it: exchange of weights and back, scoring, statistics, update, distance. A Llama of random
weights, one process, one thread: CPU time, because nothing in a step waits. All ways in turn, on the same batch.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.made_steps import made_trajectory, update_settings
from bench.measure import Figure, repeated
from rljob_api.correction import Ewma, OldLogprobs
from rljob_api.spec import Advantage, ComputeType, Training
from rljob_runtime.correction.averaged_policy import AveragedPolicy
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.trainer.batch import TrainBatch, build_batch
from rljob_runtime.trainer.distributed import World, distributed_world
from rljob_runtime.trainer.model import Policy, build_policy
from rljob_runtime.trainer.optimizer import build_optimizer
from rljob_runtime.trainer.scoring import score
from rljob_runtime.trainer.step_statistics import step_statistics
from rljob_runtime.trainer.update import resolve_batch, train_on
from rljob_runtime.trajectory_codec import Trajectory

WORDS, WIDTH, LAYERS = 4096, 256, 6
GROUPS, SAMPLES, PROMPT, SAMPLED = 4, 4, 16, 80
ROUNDS = 7
RATE = 1e-6
SETTINGS = update_settings(route=OldLogprobs.EWMA, token_budget=2048)
BASELINE = replace(SETTINGS, route=OldLogprobs.CURRENT)


class Steps:
    """One policy and the three ways to make a step of the same batch."""

    def __init__(self, policy: Policy, world: World) -> None:
        self._policy, self._world = policy, world
        self._optimizer = build_optimizer(policy, Training(steps=1, tasks_per_step=GROUPS, learning_rate=RATE))
        self._average = AveragedPolicy(Ewma())
        self._average.start(policy)
        self._store = SnapshotStore(torch.float32)
        self._batch = _batch()

    def ewma(self) -> None:
        old = resolve_batch(self._policy, self._batch, self._store, SETTINGS, self._world, self._average)
        update = train_on(self._policy, self._optimizer, self._batch, old, SETTINGS, self._world, rate=RATE)
        self._average.observe(step_statistics(self._batch, update, SETTINGS, {}))
        self._average.published(self._policy)

    def upkeep(self) -> None:
        """What the average adds to a step that makes a pass of its own anyway, but for statistics."""
        with self._average.held(self._policy):
            pass
        self._average.published(self._policy)

    def recompute(self) -> None:
        old = resolve_batch(self._policy, self._batch, self._store, BASELINE, self._world)
        scored = score(self._policy, [row.tokens for row in self._batch.rows], temperature=1.0, token_budget=2048)
        for index, logprobs in enumerate(scored):
            unstepped = np.isnan(old[index].logprobs)
            old[index].logprobs[unstepped] = logprobs[unstepped]
        train_on(self._policy, self._optimizer, self._batch, old, BASELINE, self._world, rate=RATE)

    def detached(self) -> None:
        old = resolve_batch(self._policy, self._batch, self._store, BASELINE, self._world)
        train_on(self._policy, self._optimizer, self._batch, old, BASELINE, self._world, rate=RATE)


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder, distributed_world("cpu", timeout_seconds=60) as world:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        LlamaForCausalLM(_config()).save_pretrained(folder)
        policy = build_policy(Path(folder), compute_type=ComputeType.FLOAT32, device=world.device, mesh=world.mesh)
        steps = Steps(policy, world)
        ways = (steps.ewma, steps.recompute, steps.detached)
        for way in ways:
            way()  # the optimizer's state, and the libraries' own buffers
        seconds = np.array([[_seconds(way) for way in ways] for _ in range(ROUNDS)])
        upkeep = float(np.median([_seconds(steps.upkeep) for _ in range(ROUNDS)]))
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    tokens = GROUPS * SAMPLES * (PROMPT + SAMPLED)
    figure = partial(
        _figure, f"{tokens:,} tokens, {parameters / 1e6:.1f} M parameters; upkeep of the average {upkeep * 1e3:.0f} ms"
    )
    figure("ewma_step", seconds[:, 0], seconds[:, 1])
    figure("ewma_step_over_detached", seconds[:, 0], seconds[:, 2])


def _figure(behind: str, name: str, one: np.ndarray, other: np.ndarray) -> None:
    value, low, high = repeated((one / other).tolist())
    detail = f"{np.median(one):.2f} over {np.median(other):.2f} s of CPU time a step, {behind}"
    Figure(name, value, low, high, f"{ROUNDS} rounds, smallest and largest", detail).print()


def _seconds(way: Callable[[], None]) -> float:
    started = time.process_time()
    way()
    return time.process_time() - started


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=704,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )


def _batch() -> TrainBatch:
    """Tokens one and two versions old, half of each trajectory."""
    random = np.random.default_rng(0)
    turn = np.repeat([-1, 0], [PROMPT, SAMPLED]).astype(np.int32)
    versions = np.repeat([-1, 0, 1], [PROMPT, SAMPLED // 2, SAMPLED // 2]).astype(np.int32)
    logprobs = np.where(turn >= 0, -np.log(WORDS), 0).astype(np.float32)

    def trajectory(task: int, sample: int) -> Trajectory:
        return made_trajectory(
            task,
            sample,
            float(random.uniform()),
            tokens=random.integers(2, WORDS, len(turn)),
            turn=turn,
            weight_version=versions,
            behavior_logprobs=logprobs,
        )

    groups = [[trajectory(task, sample) for sample in range(SAMPLES)] for task in range(GROUPS)]
    return build_batch(groups, version=2, max_versions=4, advantage=Advantage())


if __name__ == "__main__":
    main()
