"""`rljob run` with real vLLM engines: what the quickstart does, a few steps of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.running import processes_naming, run, summary

pytestmark = [pytest.mark.e2e, pytest.mark.engine, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]


def test_the_quickstart_trains_on_real_engines_with_exact_old_logprobs(tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    document["spec"]["training"]["steps"] = 10
    code, output = run(tmp_path, document, "--run-dir", str(tmp_path / "run"), timeout=380)
    assert code == 0, output
    seen = summary(tmp_path / "run")
    assert seen["steps"] == 10
    assert seen["exactFraction"] == 1.0
    assert seen["partialsContinued"] >= 50
    assert seen["tokensLostToInterruptions"] == 0
    assert seen["conservation"]["problems"] == []
    reports = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    largest = max(
        bucket["maxAbsLogDiscrepancy"] for report in reports for bucket in report["discrepancyByStaleness"].values()
    )
    assert largest <= 1e-4  # fp32 on both sides: vLLM's log-probabilities are the trainer's, in every staleness bucket
    command = [sys.executable, "-m", "rljob.main", "verify", str(tmp_path / "run")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert processes_naming(str(tmp_path)) == []
