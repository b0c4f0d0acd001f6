"""The session's cluster: our dev cluster, made if need be, or the one that KUBECONFIG names.

A dev cluster is in a network namespace of its own; the fixture moves this process into it, so pods, Services and the
API server can be reached directly, by this process and by all it starts.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.devcluster import binaries, network
from tools.devcluster.layout import REPOSITORY, Layout

from tests.cluster import e2e_log
from tests.cluster.cluster import RESTRICTED, Cluster, Namespace
from tests.cluster.rljobs import SYSTEM, install, uninstall

_UP_TIMEOUT_SECONDS = 3600  # the first time, everything is built


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    given = os.environ.get("KUBECONFIG")
    if given:
        kubectl = shutil.which("kubectl")
        assert kubectl is not None, "KUBECONFIG is set and kubectl is not on PATH: install it, or unset KUBECONFIG"
        return Cluster(Path(given), kubectl, os.environ["PATH"], None)
    layout = Layout.from_environment(os.environ)
    up = [sys.executable, "-m", "tools.devcluster", "up"]
    subprocess.run(up, cwd=REPOSITORY, check=True, timeout=_UP_TIMEOUT_SECONDS)
    network.enter(layout.node(0))
    built = binaries.locate(layout)
    search_path = os.pathsep.join([built.search_path(), os.environ["PATH"]])
    return Cluster(layout.kubeconfig, str(built["kubectl"]), search_path, layout)


@pytest.fixture(scope="session")
def dev_cluster(cluster: Cluster) -> Cluster:
    assert cluster.layout is not None, "this test looks at the dev cluster itself: unset KUBECONFIG"
    return cluster


_reports: list[pytest.TestReport] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test failed: a run takes long, and the summary comes at its end."""
    if report.when == "call" or report.outcome != "passed":
        _reports.append(report)
    if report.failed:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        print("\n" + "\n".join(lines[:40] or report.longreprtext.splitlines()[-40:]), flush=True)


def pytest_sessionfinish() -> None:
    """Where RLJOB_E2E_LOG names a file, what was run and seen goes there."""
    path = os.environ.get("RLJOB_E2E_LOG")
    if path:
        e2e_log.write(Path(path), _reports)


_numbers = itertools.count()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[Namespace]:
    """A fresh namespace that admits only restricted pods. It is deleted without waiting: that takes 5 s and more."""
    name = f"test-{os.getpid()}-{next(_numbers)}"
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}})
    own = Namespace(cluster, name)
    cluster.wait_for("the namespace's service account", lambda: own.kubectl("get", "serviceaccount", "default"))
    yield own
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def operator(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster with the chart; at the end of the session it is taken away, and nothing of it may be left."""
    install(cluster)
    yield cluster
    cluster.kubectl("delete", "rljobs", "--all", "--all-namespaces", "--timeout=120s", timeout_seconds=150)
    uninstall(cluster)
    left = cluster.kubectl("get", "clusterroles,clusterrolebindings,crds", "--output=name").split()
    own = [name for name in left if "rljob-" in name or name.endswith("/rljobs.rljob.dev")]
    assert own == [], own
    cluster.kubectl("delete", "namespace", SYSTEM, "--wait=false")


@pytest.fixture
def team(operator: Cluster, namespace: Namespace) -> Namespace:
    """A namespace for one test's jobs."""
    return namespace
