"""A node's power switch, for tests of what happens when a node is lost."""

from __future__ import annotations

from tools.devcluster import kubelet, mounts, processes
from tools.devcluster.binaries import Binaries
from tools.devcluster.commands import wait_until
from tools.devcluster.layout import Node


def off(node: Node) -> None:
    """End the kubelet and all containers at once, as a power cut does: nobody tells the API server."""
    names = (node.process("kubelet"), node.process("proxy"))
    found = [process for name in names if (process := processes.recorded(node.layout, name)) is not None]
    processes.stop(found, patience_seconds=0)
    wait_until(
        f"the containers of {node.name} to end", lambda: mounts.kill_in(mounts.cgroups_of(node)), timeout_seconds=20
    )


def on(node: Node, binaries: Binaries) -> None:
    """Start kubelet and kube-proxy again; containerd and the images are still there."""
    kubelet.start(node, binaries)
