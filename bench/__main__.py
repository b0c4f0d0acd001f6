"""`python -m bench`: every benchmark, one after the other; the table goes to docs/benchmarks.md.

Ends with 1 when a figure is outside its limit in ranges.yaml.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.measure import Figure, Range, machine, ranges

BENCHES = (
    "chunked_logprobs",
    "snapshots",
    "ewma_step",
    "exact_critical_path",
    "diagnostics",
    "pause",
    "worker_throughput",
    "async_over_sync",
)
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def main() -> int:
    """Run all, write the page, and say what is outside its limit."""
    figures = []
    for name in BENCHES:
        print(f"bench: {name}", flush=True)
        found = run(name)
        for figure in found:
            print(f"  {figure.name} {figure.value:.3f}: {figure.detail}", flush=True)
        figures += found
    limits = ranges()
    today = time.strftime("%Y-%m-%d", time.gmtime())
    PAGE.write_text(page(figures, limits, today, machine()))
    print(table(figures, limits))
    missed = outside(figures, limits)
    for name in missed:
        print(f"bench: {name} is outside its limit", file=sys.stderr)
    return 1 if missed else 0


def run(name: str) -> list[Figure]:
    """The figures of one benchmark, in a process of its own.

    Raises:
        CalledProcessError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}"], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return [Figure(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"name"')]


def outside(figures: Sequence[Figure], limits: Mapping[str, Range]) -> list[str]:
    """Figures that miss their limit, and limits without a figure."""
    found = [figure.name for figure in figures if not limits[figure.name].holds(figure.value)]
    return found + sorted(set(limits) - {figure.name for figure in figures})


def table(figures: Sequence[Figure], limits: Mapping[str, Range]) -> str:
    """The figures as a Markdown table."""
    lines = ["| Claim | Ratio | Spread | Goal | Limit | Behind it |", "|---|---|---|---|---|---|"]
    for figure in figures:
        limit = limits[figure.name]
        lines.append(
            f"| {limit.claim} | **{figure.value:.3f}** | {figure.low:.3f} – {figure.high:.3f} ({figure.spread}) "
            f"| {limit.goal} | {limit.limit} | {figure.detail} |"
        )
    return "\n".join(lines)


def page(figures: Sequence[Figure], limits: Mapping[str, Range], date: str, machine: str) -> str:
    """docs/benchmarks.md."""
    return f"""# Benchmarks

Written by `make bench`; do not edit. Each figure is a ratio of two things measured in turn within one run, because
machines differ and shared ones are noisy. A figure outside its limit (`bench/ranges.yaml`) fails `make bench`.

Measured on {date}: {machine}.

{table(figures, limits)}

How each is measured stands at the top of its file in `bench/`.
"""


if __name__ == "__main__":
    raise SystemExit(main())
