"""Every way on one stream: in turn within each step, in an order that rotates, so that noise hits all alike."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from bench.routes.stream import Stream
from bench.routes.ways import Cost, Replay, Way
from rljob.record import Record
from rljob_api.spec import Model, RandomModel
from rljob_runtime.model_source import materialise
from rljob_runtime.trainer.distributed import distributed_world

WIDE = RandomModel(hidden_size=256, intermediate_size=704, layers=6, heads=4, head_dim=64)
"""A hundred times the quickstart's parameters: there, less of a step is Python's."""


def replay(stream: Stream, model: Path, ways: Sequence[Way]) -> list[Cost]:
    """Costs of the measured steps. `model` is a model directory: all ways begin with its weights."""
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, distributed_world("cpu", timeout_seconds=600) as world:
        replays = [Replay(way, stream, model, world, Path(folder)) for way in ways]
        costs = []
        for index in range(stream.measured.stop):
            # Steps before the measured ones bring versions, and the last of them warms everything up.
            num_groups = None if index >= stream.lead - 1 else 1
            for place in range(len(replays)):
                gc.collect()  # garbage of one way is not swept up at another's expense
                cost = replays[(place + index) % len(replays)].train(index, num_groups=num_groups)
                if index in stream.measured:
                    costs.append(cost)
        return costs


def random_model(random: RandomModel | None, directory: Path) -> Path:
    """A model directory of random weights."""
    return materialise(Model(random=random), directory)


def recorded_model(record: Path, version: int, directory: Path) -> Path:
    """A model directory with the weights of a recorded version.

    Raises:
        ValueError: the version is recorded as a difference to another one.
    """
    found = Record(record)
    recorded = found.versions()[version]
    if recorded.manifest.base is not None:
        raise ValueError(f"{recorded.weights} is a difference to version {recorded.manifest.base}: replay another run")
    directory.mkdir()
    for file in found.model.iterdir():
        shutil.copy(file, directory)
    shutil.copy(recorded.weights, directory / "model.safetensors")
    return directory
