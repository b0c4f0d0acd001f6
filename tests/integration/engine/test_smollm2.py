"""A real vLLM engine on the real SmolLM2-135M weights (tied) against the trainer's own forward, in fp32."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.integration.engine.small_models import manifest
from transformers import AutoTokenizer

from rljob_api.spec import ComputeType
from rljob_api.weights import WeightManifest
from rljob_runtime.rollout.engine import GenerationRequest
from rljob_runtime.rollout.partial import PartialRollout
from rljob_runtime.rollout.vllm_engine import VllmEngine, VllmSettings
from rljob_runtime.trainer.distributed import distributed_world
from rljob_runtime.trainer.model import Policy, build_policy, full_state
from rljob_runtime.trainer.scoring import score

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

REQUESTS, MAX_TOKENS, TEMPERATURE = 32, 72, 0.9
BEFORE = 40
"""Tokens that a request may have before the interruption, at most: each has some on both sides of it."""


@dataclass(frozen=True)
class Published:
    """One version: its file, and the policy that scores it."""

    manifest: WeightManifest
    weights: Path
    policy: Policy

    def score(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        return score(self.policy, rows, temperature=TEMPERATURE, token_budget=4096)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "smollm2"
    tool = Path(__file__).parents[3] / "tools" / "convert_smollm2.py"
    subprocess.run([sys.executable, str(tool), str(directory)], check=True, timeout=300)
    return directory


def test_behavior_log_probabilities_are_the_trainers_before_and_after_an_interruption(
    smollm2: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(smollm2, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [
        tuple(tokenizer(f"Question {n}: what is {n} + {n * 7 % 10}, and why? Answer:")["input_ids"])
        for n in range(REQUESTS)
    ]
    with distributed_world("cpu", timeout_seconds=60) as world:

        def published(version: int, noise: float) -> Published:
            policy = build_policy(smollm2, compute_type=ComputeType.FLOAT32, device=world.device, mesh=world.mesh)
            generator = torch.Generator().manual_seed(version)
            with torch.no_grad():
                for parameter in policy.parameters():
                    local = parameter.to_local()  # type: ignore[attr-defined]
                    local.mul_(1 + noise * torch.randn(local.shape, generator=generator))
            weights = tmp_path / f"{version}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in full_state(policy).items()}, weights)
            return Published(manifest(version), weights, policy)

        versions = published(1, 0.0), published(2, 0.02)
        partials = asyncio.run(_roll_out(bare, versions, prompts))
        rows = [np.array(partial.tokens, np.int32) for partial in partials]
        scored = [version.score(rows) for version in versions]

    differences: dict[int, list[float]] = {1: [], 2: []}
    wrong_version = []
    for number, partial in enumerate(partials):
        trajectory = partial.trajectory(None)  # type: ignore[arg-type]
        assert trajectory.versions == (1, 2)
        for version, other in ((1, 2), (2, 1)):
            is_of = trajectory.weight_version == version
            behavior = trajectory.behavior_logprobs[is_of]
            differences[version] += list(np.abs(behavior - scored[version - 1][number][is_of]))
            wrong_version += list(np.abs(behavior - scored[other - 1][number][is_of]))
    assert sum(map(len, differences.values())) >= 2000
    for version, found in differences.items():
        assert len(found) >= REQUESTS, version
        assert np.quantile(found, 0.999) <= 1e-4, version
        assert max(found) <= 3e-4, version
    assert np.quantile(wrong_version, 0.5) > 1e-3  # control: the versions can be told apart


async def _roll_out(
    model_directory: Path, versions: tuple[Published, Published], prompts: list[tuple[int, ...]]
) -> list[PartialRollout]:
    """All requests under the first version, interrupted in their middle, and gone on with under the second."""
    engine = VllmEngine(
        model_directory,
        VllmSettings(max_model_len=256, max_num_seqs=REQUESTS, compute_type="Float32", kv_cache_bytes=512 << 20),
    )
    partials = []
    for prompt in prompts:
        partials.append(PartialRollout())
        partials[-1].observe(prompt)
        partials[-1].begin_turn()

    async def go_on(number: int, limit: int) -> None:
        partial = partials[number]
        room = limit - partial.num_model_tokens
        if room > 0:
            request = GenerationRequest(f"{number}-{len(partial)}", tuple(partial.tokens), room, TEMPERATURE, ())
            partial.take(await engine.generate(request))

    await engine.start()
    try:
        await engine.pause()
        await engine.apply(versions[0].manifest, versions[0].weights)
        await engine.resume()
        # Cut off in flight, again and again at the same version, until each has a few tokens of it.
        while min(partial.num_model_tokens for partial in partials) < BEFORE // 4:
            running = [asyncio.create_task(go_on(number, BEFORE)) for number in range(REQUESTS)]
            await asyncio.sleep(2.0)
            await engine.pause()
            await asyncio.gather(*running)
            await engine.resume()
        await engine.pause()
        await engine.apply(versions[1].manifest, versions[1].weights)
        await engine.resume()
        await asyncio.gather(*(go_on(number, MAX_TOKENS) for number in range(REQUESTS)))
    finally:
        await engine.shutdown()
    return partials
