"""The average of weights with one and two ranks: what it scores, and that it survives a checkpoint of either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.integration.trainer.average_ranks import STEPS, check_resume, run_checks
from tests.integration.trainer.test_ranks import torchrun
from tests.integration.trainer.toy import make_model

from rljob_runtime.trainer.distributed import distributed_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Findings of one rank, then of two, then of one that goes on from the checkpoint of two."""
    folder = tmp_path_factory.mktemp("average")
    make_model(folder / "flat", sharpness=0.05)
    with distributed_world("cpu", timeout_seconds=60) as world:
        run_checks(folder, world)
        torchrun(folder, "average_ranks.py")
        (folder / "one-from-two.json").write_text(json.dumps(check_resume(folder, world, load_from=2)))
    return folder


def findings(folder: Path, size: int) -> dict[str, Any]:
    return json.loads((folder / f"average-{size}.json").read_text())


@pytest.mark.parametrize("size", [1, 2])
def test_stale_tokens_are_scored_by_the_average_and_the_policy_keeps_its_weights(folder: Path, size: int) -> None:
    of_ranks = findings(folder, size)["claims"]
    assert len(of_ranks) == size
    for claims in of_ranks:
        assert len(claims) == 2 * 5 + 3
        assert [claim for claim, holds in claims.items() if not holds] == []


@pytest.mark.parametrize(("size", "came_from"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_a_resumed_average_is_the_uninterrupted_one(folder: Path, size: int, came_from: int) -> None:
    resumes = findings(folder, size)["resumes"]
    whole = resumes["uninterrupted"]
    assert whole["restored"]["weight"] > 1.3 and whole["restored"]["relative_distance"] > 1e-3  # there is one to lose
    assert whole["figures"]["steps_since_reset"] == STEPS + 1
    if (size, came_from) == (1, 2):
        resumed = json.loads((folder / "one-from-two.json").read_text())
    else:
        resumed = resumes[f"from {came_from}"]
    assert resumed["restored"] == pytest.approx(whole["restored"], rel=1e-6)
    assert resumed["figures"] == pytest.approx(whole["figures"], rel=1e-6)
    if size == came_from:
        assert resumed["digests"] == whole["digests"] and resumed["restored"] == whole["restored"]
