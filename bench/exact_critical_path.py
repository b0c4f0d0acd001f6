"""The critical path of the default exact chain, over source *current* with one update a step, on the steps of real runs.

Both train the same recorded batches, in turn; what counts is the CPU time of old log-probabilities, training and saving
the snapshot (`bench/routes/ways.py`). With one update a step *current* takes its reference from the training forward: a
base that costs nothing. What the chain scores ahead of the step and what in it is what the run did:

    exact_critical_path        a run whose trainer waits for its engines, and has time to score ahead
    exact_critical_path_busy   a run whose trainer never waits: every old log-probability is a forward in the step

The model is a random Llama of 5.5 million parameters. On the quickstart's own, 80 thousand, a step is Python's for the
most part; its figure stands in the details. More ways, and whole tables: docs/results.md.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from bench.measure import Figure
from bench.routes.replay import WIDE, random_model, replay
from bench.routes.stream import RECORDED, Stream, load_stream
from bench.routes.summaries import Summary, summarised
from bench.routes.ways import Way
from rljob_api.spec import RandomModel

STREAMS = {"exact_critical_path": "waiting", "exact_critical_path_busy": "busy"}
WIDE_STRIDE = 2
"""Every second group of a batch keeps the wide model busy enough; the first ones alone would have waited longest."""


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    for name, recorded in STREAMS.items():
        stream = load_stream(RECORDED / f"{recorded}.safetensors")
        small = _chain(stream, stream.spec.model.random)
        chain = _chain(_thinned(stream, WIDE_STRIDE), WIDE)
        ratio, steps = chain.over_base, len(stream.measured)
        detail = (
            f"CPU time of a step: training {chain.training:.2f} s, old log-probabilities {chain.old_logprobs * 1e3:.0f} ms, "
            f"snapshot {chain.upkeep * 1e3:.0f} ms; ahead of it {chain.overlapped:.2f} s; exact "
            f"{chain.exact_fraction:.0%}. On the quickstart's model {small.over_base.text()}"
        )
        spread = f"{steps} steps, 90 % bootstrap interval"
        Figure(name, ratio.value, ratio.low, ratio.high, spread, detail).print()


def _chain(stream: Stream, random: RandomModel | None) -> Summary:
    with tempfile.TemporaryDirectory() as folder:
        costs = replay(stream, random_model(random, Path(folder) / "model"), (Way.CURRENT, Way.SNAPSHOT))
    return next(summary for summary in summarised(costs) if summary.way is Way.SNAPSHOT)


def _thinned(stream: Stream, stride: int) -> Stream:
    return replace(stream, steps=tuple(replace(step, groups=step.groups[::stride]) for step in stream.steps))


if __name__ == "__main__":
    main()
