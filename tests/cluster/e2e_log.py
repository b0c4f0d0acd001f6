"""The dated log of a run on a cluster, as a page of the documents: each test, what it saw, how long it took."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

_HEAD = """# End-to-end log

Written by `make e2e-all`: a real etcd, kube-apiserver, controllers, scheduler, kubelet and containerd, the chart installed
with helm, real nats-server and torch; vLLM where a line says so, the simulated engine elsewhere. Namespaces enforce the
restricted Pod Security level. Below a test stands what it printed.

"""


def write(path: Path, reports: Sequence[pytest.TestReport]) -> None:
    """Replace the page."""
    seconds = sum(report.duration for report in reports)
    outcomes = [report.outcome for report in reports]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
    day = time.strftime("%Y-%m-%d", time.gmtime())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release().split('-')[0]}, no GPU"
    lines = [f"{day}, {machine}. {counts}, {seconds / 60:.0f} minutes.", ""]
    file = ""
    for report in reports:
        where, _, name = report.nodeid.partition("::")
        if where != file:
            file = where
            lines += ["", f"## {where}", ""]
        words = name.replace("test_", "", 1).replace("_", " ")
        lines.append(f"- {report.outcome}, {report.duration:.0f} s: {words}")
        lines += [f"  - {line}" for line in report.capstdout.splitlines() if line.startswith("seen: ")]
    path.write_text(_HEAD + "\n".join(lines) + "\n")
