"""An operator that runs beside the tests, not in a pod, so that they can end it at a chosen moment or change its code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.devcluster.layout import REPOSITORY

from tests.cluster.cluster import RUNTIME_IMAGE, Cluster
from tests.cluster.rljobs import SYSTEM

PORT = 18099


def environment(cluster: Cluster, identity: str = "local") -> dict[str, str]:
    """What the chart would set; NATS by its address, since this process is in no pod."""
    address = cluster.get("service", "rljob-nats", f"--namespace={SYSTEM}")["spec"]["clusterIP"]
    return {
        **os.environ,
        "KUBECONFIG": str(cluster.kubeconfig),
        "RLJOB_OPERATOR_NAMESPACE": SYSTEM,
        "RLJOB_RUNTIME_IMAGE": RUNTIME_IMAGE,
        "RLJOB_NATS_URL": f"nats://{address}:4222",
        "RLJOB_POD_NAME": identity,
        "RLJOB_OPERATOR_PORT": str(PORT),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def start(cluster: Cluster, *words: str, log: Path) -> subprocess.Popen[bytes]:
    """Start `python -m WORDS`; its output goes to the end of the log."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *words], env=environment(cluster), stdout=file, stderr=file, cwd=REPOSITORY
        )


@contextmanager
def instead_of_the_chart(cluster: Cluster) -> Iterator[None]:
    """The chart's own operator stands still meanwhile."""
    where = f"--namespace={SYSTEM}"
    selector = "--selector=app.kubernetes.io/component=operator"
    cluster.kubectl("scale", "deployment/rljob-operator", "--replicas=0", where)
    try:
        cluster.wait_for("the chart's operator to be gone", lambda: not cluster.get("pods", where, selector)["items"])
        assert not _holder(cluster), (
            f"an operator that is stopped in order gives its lease up, not so {_holder(cluster)}"
        )
        yield
    finally:
        cluster.kubectl("scale", "deployment/rljob-operator", "--replicas=1", where)
        cluster.kubectl("rollout", "status", "deployment/rljob-operator", where, "--timeout=60s", timeout_seconds=90)
        cluster.wait_for("its lease", lambda: _holder(cluster).startswith("rljob-operator"))


def _holder(cluster: Cluster) -> str:
    spec = cluster.get("lease", "rljob-operator", f"--namespace={SYSTEM}")["spec"]
    return str(spec.get("holderIdentity") or "")


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait(timeout=10)
