"""A cluster of its own, started, cut off in its start, and torn down: nothing of it is left on the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.devcluster import binaries, power, processes, teardown
from tools.devcluster.kubectl import Kubectl
from tools.devcluster.layout import REPOSITORY, Layout

from tests.cluster.cluster import Cluster

pytestmark = pytest.mark.timeout(300)

_NAME = "lifecycle"
_SYSCTLS = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops")


def command(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RLJOB_CLUSTER": _NAME}
    return subprocess.Popen(
        [sys.executable, "-m", "tools.devcluster", *words],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*words: str) -> str:
    with command(*words) as process:
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def layout() -> Iterator[Layout]:
    layout = Layout.from_environment({**os.environ, "RLJOB_CLUSTER": _NAME})
    run("down")
    yield layout
    run("down")


def machine() -> tuple[object, ...]:
    """What a cluster must not change: sysctls, the machine's interfaces and mounts (`ip netns` itself mounts one)."""
    sysctls = tuple(Path("/proc/sys", name).read_text() for name in _SYSCTLS)
    interfaces = tuple(sorted(path.name for path in Path("/sys/class/net").iterdir()))
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if " /run/netns" not in line]
    return sysctls, interfaces, tuple(mounts)


def mounts_of_node(layout: Layout) -> list[str]:
    """The mounts that the first node's namespace sees."""
    holder = processes.recorded(layout, "mounts-0")
    assert holder is not None
    return Path(f"/proc/{holder.pid}/mounts").read_text().splitlines()


def test_two_nodes_come_up_and_nothing_is_left_of_them(layout: Layout) -> None:
    before = machine()
    output = run("up", "--nodes", "2")
    assert f"kubeconfig: {layout.kubeconfig}" in output
    kubectl = Kubectl(layout, binaries.locate(layout)["kubectl"])
    assert [node["metadata"]["name"] for node in kubectl.get("nodes")["items"]] == ["node-0", "node-1"]
    counted = teardown.leftovers(layout)
    assert counted.processes >= 13, f"the count that is zero below sees a running cluster: {counted}"
    assert (counted.network_namespaces, counted.cgroups > 0, counted.files > 0) == (2, True, True)

    assert run("down").endswith(
        f"cluster {_NAME} is down; left: 0 processes, 0 mounts, 0 cgroups, 0 network namespaces, 0 files\n"
    )
    assert machine() == before


def test_taking_one_cluster_away_leaves_the_other_s_mounts(layout: Layout, dev_cluster: Cluster) -> None:
    """Removing a folder unmounts it in other namespaces: the fixed paths stay while any cluster is there."""
    assert dev_cluster.layout is not None
    before = mounts_of_node(dev_cluster.layout)
    assert any(" /var/lib/kubelet " in line for line in before)
    run("up")
    run("down")
    after = mounts_of_node(dev_cluster.layout)
    assert [line for line in after if " /var/lib/" in line] == [line for line in before if " /var/lib/" in line]


def test_a_node_without_power_is_lost_and_comes_back(layout: Layout) -> None:
    run("up", "--nodes", "2")
    built = binaries.locate(layout)
    kubectl, node = Kubectl(layout, built["kubectl"]), layout.node(1)
    power.off(node)
    kubectl("wait", "node/node-1", "--for=condition=Ready=Unknown", "--timeout=30s")
    kubectl("wait", "node/node-0", "--for=condition=Ready", "--timeout=1s")
    power.on(node, built)
    kubectl("wait", "node/node-1", "--for=condition=Ready", "--timeout=30s")


def test_a_second_up_keeps_the_cluster_and_adds_a_node(layout: Layout) -> None:
    run("up")
    first = {process.name: process for process in processes.all_recorded(layout)}
    run("up")
    assert {process.name: process for process in processes.all_recorded(layout)} == first
    run("up", "--nodes", "2")
    second = {process.name: process for process in processes.all_recorded(layout)}
    assert first.items() <= second.items()
    assert second.keys() - first.keys() == {"containerd-1", "kubelet-1", "mounts-1", "proxy-1"}


def test_a_start_that_was_killed_leaves_nothing_that_down_does_not_find(layout: Layout) -> None:
    with command("up") as starting:
        deadline = time.monotonic() + 60
        while processes.recorded(layout, "controller-manager") is None and time.monotonic() < deadline:
            time.sleep(0.02)
        starting.send_signal(signal.SIGKILL)
        starting.communicate(timeout=10)
    cut_off = teardown.leftovers(layout)
    assert cut_off.processes >= 4, f"the start was cut off while its processes ran: {cut_off}"
    assert not layout.record.exists()
    run("down")
    assert teardown.leftovers(layout).is_nothing()


def test_a_cluster_that_lost_a_process_is_made_anew(layout: Layout) -> None:
    run("up")
    lost = processes.recorded(layout, "scheduler")
    assert lost is not None
    processes.stop([lost], patience_seconds=0)
    run("up")
    assert all(process.is_alive() for process in processes.all_recorded(layout))
    assert processes.recorded(layout, "etcd") is not None
