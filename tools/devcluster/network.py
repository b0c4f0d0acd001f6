"""Each node's network namespace. The machine's own interfaces, routes and packet filter stay untouched.

Node 0's namespace holds a bridge with the node's address; each further node's bridge hangs on it by a veth pair. Pod
networks are routed between the nodes. The default route leads to an address that nobody has: no packet leaves.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from tools.devcluster.commands import run
from tools.devcluster.layout import GATEWAY_ADDRESS, NAMESPACES, PREFIX, Layout, Node

_CLONE_NEWNET = 0x40000000
_SYSCTLS = ("net.ipv4.ip_forward", "net.bridge.bridge-nf-call-iptables")


def inside(node: Node) -> tuple[str | Path, ...]:
    """Prefix of a command that runs in the node's network namespace (`ip netns exec` would hide /sys/fs/cgroup)."""
    return ("nsenter", f"--net={node.network_namespace_path}")


def enter(node: Node) -> None:
    """Move the calling thread, and every process it starts from now on, into the node's network namespace."""
    descriptor = os.open(node.network_namespace_path, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(node.network_namespace_path))
    finally:
        os.close(descriptor)


def create(node: Node) -> None:
    """Make the namespace and wire it to those of the nodes before it, unless it exists."""
    if node.network_namespace_path.exists():
        return
    run(["ip", "netns", "add", node.network_namespace], hint="Network namespaces need root.")
    here = inside(node)
    run([*here, "ip", "link", "set", "lo", "up"])
    run([*here, "ip", "link", "add", "node0", "type", "bridge"])
    if node.index > 0:
        _plug_into_first(node)
    run([*here, "ip", "address", "add", f"{node.address}/24", "dev", "node0"])
    run([*here, "ip", "link", "set", "node0", "up"])
    for index in range(node.index):
        other = node.layout.node(index)
        run([*here, "ip", "route", "add", other.pod_network, "via", other.address])
        run([*inside(other), "ip", "route", "add", node.pod_network, "via", node.address])
    # Without a default route a Service's address is unreachable before it is translated.
    run([*here, "ip", "route", "add", "default", "via", GATEWAY_ADDRESS, "dev", "node0"])
    for name in _SYSCTLS:
        run([*here, "sysctl", "-q", "-w", f"{name}=1"])


def _plug_into_first(node: Node) -> None:
    first = node.layout.node(0)
    port = f"port{node.index}"
    peer = ["peer", "name", port, "netns", first.network_namespace]
    run([*inside(node), "ip", "link", "add", "uplink", "type", "veth", *peer])
    run([*inside(node), "ip", "link", "set", "uplink", "master", "node0", "up"])
    run([*inside(first), "ip", "link", "set", port, "master", "node0", "up"])


def existing_namespaces(layout: Layout) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in NAMESPACES.glob(f"{layout.prefix}[0-9]")))


def any_cluster_exists() -> bool:
    """On this machine, whatever its cache and name."""
    return any(NAMESPACES.glob(f"{PREFIX}*"))


def delete_namespaces(layout: Layout) -> None:
    for name in existing_namespaces(layout):
        run(["ip", "netns", "delete", name])
