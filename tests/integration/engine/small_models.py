"""Small random models as weight versions, and what transformers computes with them: the engines' judge."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rljob_api.spec import Model, RandomModel
from rljob_api.weights import Blob, Probe, WeightManifest
from rljob_runtime.model_source import materialise
from rljob_runtime.rollout.engine import Generation

VOCAB = 16


@dataclass(frozen=True)
class Version:
    """One weight version on disk, with the network that judges it."""

    manifest: WeightManifest
    weights: Path
    network: Any

    def logprobs(self, tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
        """Log-probability of tokens[1:], by transformers."""
        with torch.inference_mode():
            logits_TV = self.network(torch.tensor([list(tokens)])).logits[0, :-1].float() / temperature
        return torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()

    def worst(self, prompt: Sequence[int], generation: Generation, temperature: float) -> float:
        """Largest difference between a generation's log-probabilities and this version's."""
        expected = self.logprobs((*prompt, *generation.tokens), temperature)[len(prompt) - 1 :]
        return max(abs(a - b) for a, b in zip(generation.logprobs, expected, strict=True))


@dataclass(frozen=True)
class SmallModel:
    """A model with unrelated versions, and the directory that an engine starts from (no weights in it)."""

    bare: Path
    versions: tuple[Version, ...]


def make_small_model(root: Path, *, tied: bool, architecture: str = "Llama", versions: int = 3) -> SmallModel:
    made = []
    for number in range(versions):
        spec = RandomModel.model_validate(
            {
                "architecture": architecture,
                "alphabet": "0123456789=+-",
                "heads": 4,
                "key_value_heads": 2,
                "max_positions": 512,
                "initializer_range": 0.15,  # logits that are not flat
                "tied_embeddings": tied,
                "seed": number,
            }
        )
        directory = materialise(Model(random=spec), root / f"{number}")
        weights = next(directory.glob("*.safetensors"))
        network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        made.append(Version(manifest(number), weights, network))
    bare = root / "bare"
    shutil.copytree(root / "0", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    return SmallModel(bare, tuple(made))


def manifest(version: int) -> WeightManifest:
    blob = Blob(name=f"w-{version}", sha256="0" * 64, num_bytes=1)
    probe = Probe(tokens=(1, 2), logprobs=(0.0,), compute_type="Float32")
    return WeightManifest(
        epoch=1,
        version=version,
        compute_type="Float32",
        blobs=(blob,),
        sha256="0" * 64,
        num_bytes=1,
        model_files=(),
        probe=probe,
    )


def without(version: Version, directory: Path, *names: str) -> Path:
    """The version's file without the tensors whose name holds one of `names`."""
    state = {name: tensor for name, tensor in load_file(version.weights).items() if not any(n in name for n in names)}
    path = directory / f"without-{'-'.join(names)}.safetensors"
    save_file(state, path)
    return path


def prompt(index: int, length: int = 12) -> tuple[int, ...]:
    """Some prompt, another for each index."""
    return tuple((index * 7 + position * 5 + index * position) % VOCAB for position in range(length))
