"""The exact routes to old log-probabilities are one and the same training run, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.integration.trainer.routes import STEPS, run_checks
from tests.integration.trainer.test_ranks import torchrun
from tests.integration.trainer.toy import make_model

from rljob_runtime.trainer.distributed import distributed_world

pytestmark = pytest.mark.timeout(300)

CASES = ("one update", "two updates")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Findings of one rank and of two."""
    folder = tmp_path_factory.mktemp("routes")
    make_model(folder / "flat", sharpness=0.05)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operations this small are much slower on several, the more so on a busy machine
    try:
        with distributed_world("cpu", timeout_seconds=60) as world:
            run_checks(folder, world)
    finally:
        torch.set_num_threads(threads)
    torchrun(folder, "routes.py")
    return folder


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def findings(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"world-{request.param}" / "findings.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_all_exact_routes_give_the_same_parameters_step_by_step(findings: dict[str, Any], case: str) -> None:
    figures = findings["figures"]
    for route, source in (("pool", "pool"), ("barrier", "pool"), ("dedicated", "dedicated")):
        differences = [figures[f"{case}: {route}: parameters {step}"] for step in range(STEPS)]
        assert max(differences) <= 1e-9
        assert figures[f"{case}: {route}: missing"] == 0
        # What the snapshot route reloads, these had before; both have the same tokens at staleness 0.
        assert figures[f"{case}: {route}: {source} tokens"] == figures[f"{case}: snapshot: snapshot tokens"] > 20
        assert figures[f"{case}: {route}: resident tokens"] == figures[f"{case}: snapshot: resident tokens"] > 20
    # Negative control: the stream has stale tokens that another reference would train otherwise.
    assert figures[f"{case}: current: parameters {STEPS - 1}"] > 1e-5


@pytest.mark.parametrize("case", CASES)
def test_every_route_gives_each_token_the_value_of_its_own_version_at_the_time_it_was_made(
    findings: dict[str, Any], case: str
) -> None:
    figures = findings["figures"]
    assert figures[f"{case}: snapshot: against recorded"] <= 1e-12
    for route in ("pool", "barrier", "dedicated"):
        assert figures[f"{case}: {route}: against snapshot"] <= 1e-12
    assert figures[f"{case}: current: against recorded"] > 1e-3


def test_in_float32_pool_and_snapshot_differ_by_rounding(findings: dict[str, Any]) -> None:
    assert findings["figures"]["float32: pool against snapshot"] <= 1e-5


def test_scoring_between_gradients_and_update_changes_no_bit_of_weights_and_optimizer(findings: dict[str, Any]) -> None:
    assert all(len(of_rank) == 8 for of_rank in findings["hook"])
    assert [claim for of_rank in findings["hook"] for claim, holds in of_rank.items() if not holds] == []


@pytest.mark.parametrize("case", CASES)
def test_one_rank_and_two_end_with_the_same_parameters(folder: Path, case: str) -> None:
    one, two = (load_file(folder / f"world-{size}" / f"{case}.safetensors") for size in (1, 2))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-9
