"""Method test 27: with staleness bound 0 the asynchronous machinery yields the synchronous run, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.running import job, processes_naming, run, summary
from tests.e2e.synchronous_loop import synchronous_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
STEPS = 8


def unequal(recorded: Path, model: Path, spec: dict[str, object], *, delay: int) -> list[int]:
    """Versions whose recorded weights differ in any bit from those of the synchronous loop."""
    found = []
    for version, state in enumerate(synchronous_run(model, spec, delay=delay)):
        blob = load_file(recorded / f"1-{version}" / "weights.safetensors")
        assert sorted(blob) == sorted(state)
        if not all(torch.equal(blob[name], state[name]) for name in blob):
            found.append(version)
    return found


def test_with_bound_zero_every_version_equals_the_synchronous_loop_to_the_last_bit(tmp_path: Path) -> None:
    document = job(
        training__steps=STEPS,
        staleness={"maxVersions": 0},
        correction={"oldLogprobs": "Resident"},
        rolloutPools__0__maxConcurrentTrajectories=8,
        rolloutPools__0__engine={"simulated": {"batchInvariant": True}},
    )
    code, output = run(tmp_path, document, "--run-dir", str(tmp_path / "run"))
    assert code == 0, output
    seen = summary(tmp_path / "run")
    assert (seen["steps"], seen["stalenessMax"], seen["exactFraction"]) == (STEPS, 0, 1.0)
    workers = (tmp_path / "run" / "workers.jsonl").read_text()
    assert '"main-0"' in workers and '"main-1"' in workers

    recorded, model = tmp_path / "run" / "record" / "versions", tmp_path / "run" / "cache" / "trainer" / "model"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the run's processes: another number of threads sums in another order
    try:
        assert unequal(recorded, model, document["spec"], delay=0) == []
        # Negative control: the same loop, one version late in its sampling, is told apart from the first step on that
        # an asynchronous run could have got wrong.
        assert unequal(recorded, model, document["spec"], delay=1) == list(range(2, STEPS + 1))
    finally:
        torch.set_num_threads(threads)
    assert processes_naming(str(tmp_path)) == []
