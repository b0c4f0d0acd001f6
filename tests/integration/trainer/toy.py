"""A tiny random Llama and made-up batches, the same in every process."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tests.fakes.trajectories import finished
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from rljob_api.correction import Fallback, OldLogprobs
from rljob_api.spec import Advantage, ComputeType, Training
from rljob_runtime.trainer.batch import TrainBatch, build_batch
from rljob_runtime.trainer.distributed import World
from rljob_runtime.trainer.model import Policy, build_policy, full_state
from rljob_runtime.trainer.update import UpdateSettings
from rljob_runtime.trajectory_codec import Trajectory

VOCAB = 24
TRAINING = Training(steps=10, tasks_per_step=4, learning_rate=5e-3, warmup_steps=0)
SETTINGS = UpdateSettings(
    route=OldLogprobs.SNAPSHOT,
    fallback=Fallback.DROP,
    temperature=0.8,
    token_budget=96,
    mini_batches=1,
    epochs=1,
    clip_low=0.2,
    clip_high=0.2,
    discrepancy_low=0.5,
    discrepancy_high=2.0,
    granularity="token",
    discrepancy_weight="none",
    weight_cap=2.0,
    entropy_coefficient=0.01,
    gradient_clip=1.0,
)


def make_model(directory: Path, *, tied: bool = False, sharpness: float = 0.3) -> Path:
    """A model directory with random weights; `sharpness` is their standard deviation."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=sharpness,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def publish(policy: Policy, like: Path, directory: Path) -> Path:
    """Rank 0 writes the policy's published weights as a model directory. Collective, and others must wait for it."""
    state = full_state(policy)
    if state:
        directory.mkdir(parents=True)
        shutil.copy(like / "config.json", directory)
        save_file(state, directory / "model.safetensors", {"format": "pt"})
    torch.distributed.barrier()
    return directory


def make_policy(directory: Path, world: World, compute_type: ComputeType = ComputeType.FLOAT32) -> Policy:
    return build_policy(directory, compute_type=compute_type, device=world.device, mesh=world.mesh)


def make_batch(
    seed: int, *, version: int, groups: int = 4, samples: int = 3, max_staleness: int = 2, max_versions: int = 2
) -> TrainBatch:
    """Trajectories of very different lengths, with two turns and up to `max_staleness` versions in each."""
    random = np.random.default_rng(seed)
    made = []
    for task in range(groups):
        group = []
        for sample in range(samples):
            prompt, first, observation, second = random.integers((1, 1, 1, 1), (6, 14, 4, 20)).tolist()
            turn = np.repeat([-1, 0, -1, 1], [prompt, first, observation, second]).astype(np.int32)
            stale = np.sort(random.integers(0, max_staleness + 1, len(turn)))[::-1]
            versions = np.where(turn >= 0, np.maximum(version - stale, 0), -1).astype(np.int32)
            logprobs = np.where(turn >= 0, -random.uniform(2.4, 4.0, len(turn)), 0).astype(np.float32)
            header = finished(task, sample, reward=float(random.uniform()))
            tokens = random.integers(2, VOCAB, len(turn)).astype(np.int32)
            group.append(Trajectory(header, tokens, turn, versions, logprobs))
        made.append(group)
    return build_batch(made, version=version, max_versions=max_versions, advantage=Advantage())


def settings(**changes: Any) -> UpdateSettings:
    return dataclasses.replace(SETTINGS, **changes)


def local_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of this rank's masters and optimizer state."""
    tensors = {f"master {name}": parameter for name, parameter in policy.named_parameters()}
    names = {parameter: name for name, parameter in policy.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{key} {names[parameter]}": value for key, value in state.items()}
    return {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        if one[name].ndim
        else one[name].item() == other[name].item()
        for name in one
    )
