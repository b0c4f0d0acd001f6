"""Tables of results that are one document each: Proposition 1, and simulated device time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.pages import table
from bench.staleness.proposition import table_4


def proposition_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Over all steps: largest difference of a parameter (relative) and of the reward, and tokens across a threshold."""
    rows = []
    for run in runs:
        for name in ("moved", "as they were"):
            rewards = [abs(a - b) for a, b in zip(run["reward"][name], run["reward"]["log-linear"], strict=True)]
            crossed = run["crossed"][name]
            rows.append(
                [
                    run["trainer"],
                    run["seed"],
                    name,
                    f"{max(run['difference'][name]):.0e}",
                    f"{max(rewards):.3f}",
                    "–" if crossed["first_step"] is None else crossed["first_step"],
                    crossed["tokens"],
                ]
            )
    head = ("trainer", "seed", "thresholds on the total ratio", "parameters", "reward")
    return table((*head, "first token across, at step", "tokens across"), rows)


def table_4_table() -> str:
    """The thresholds that linear interpolation amounts to."""
    return table(("n", "mask low", "mask high", "clip low", "clip high"), table_4())


def device_time_table(document: Mapping[str, Any]) -> str:
    """Simulated seconds a step."""
    rows = [
        [
            ratio,
            f"{of_batches:.0%}",
            f"{single:g}",
            f"{overlapped:g}",
            *(f"{found:.0f} ({found / single - 1:+.1%})" for found in simulated),
        ]
        for ratio, of_batches, single, overlapped, *simulated in document["table"]
    ]
    ideal = [[ratio, f"{single:.3f}", f"{dedicated:.3f}"] for ratio, single, dedicated in document["ideal"]]
    head = ("pool : trainer", "spread of batches", "single", "overlapped (paper)")
    return "\n\n".join(
        (
            table((*head, "in step (simulated)", "queued (simulated)"), rows),
            table(("pool : trainer", "single", "dedicated, no overhead"), ideal),
        )
    )
