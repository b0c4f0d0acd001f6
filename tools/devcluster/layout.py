"""Where everything lives, and the names and addresses a cluster uses. Every path of this package is made here.

$RLJOB_CACHE (default ~/.cache/rljob)
  bin/MODULE-KEY/        binaries, by what they are built from
  debian/VERSION/        containerd
  layers/ bytecode/      parts of images
  images/KEY/            a containerd root with the large images unpacked; nodes mount its layers read-only
  clusters/NAME/         one running cluster; `down` removes it
  logs/NAME/             the logs of that name's last cluster
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.devcluster.errors import DevClusterError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DOMAIN = "cluster.local"
SERVICE_NETWORK = "10.96.0.0/16"
KUBERNETES_SERVICE_ADDRESS = "10.96.0.1"
POD_NETWORK = "10.244.0.0/16"
API_ADDRESS = "172.30.0.2"
GATEWAY_ADDRESS = "172.30.0.1"  # nobody has it: no packet leaves a cluster
API_SERVER = f"https://{API_ADDRESS}:6443"
GPUS_PER_NODE = 8
MAX_NODES = 4
NAMESPACES = Path("/run/netns")
PREFIX = "rljob-"

# The longest path of a socket that containerd makes under a node's folder must fit into sockaddr_un.
_LONGEST_SOCKET = "node-0/containerd.sock.ttrpc"
_SOCKET_PATH_LIMIT = 107


@dataclass(frozen=True, slots=True)
class Layout:
    """All paths of one cluster."""

    cache: Path
    name: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Layout:
        """`RLJOB_CACHE` moves the cache, `RLJOB_CLUSTER` names the cluster: several can run side by side."""
        cache = Path(environ.get("RLJOB_CACHE") or Path.home() / ".cache" / "rljob").absolute()
        name = environ.get("RLJOB_CLUSTER") or "dev"
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,15}", name):
            raise DevClusterError(
                f"RLJOB_CLUSTER is {name!r}: use at most 16 lower-case letters, digits and dashes, a letter first."
            )
        layout = cls(cache, name)
        length = len(str(layout.state / _LONGEST_SOCKET))
        if length > _SOCKET_PATH_LIMIT:
            raise DevClusterError(
                f"{layout.state} makes a socket path of {length} characters, the limit is {_SOCKET_PATH_LIMIT}: "
                "set RLJOB_CACHE to a shorter path."
            )
        return layout

    @property
    def state(self) -> Path:
        return self.cache / "clusters" / self.name

    @property
    def lock(self) -> Path:
        return self.cache / "clusters" / f"{self.name}.lock"

    @property
    def record(self) -> Path:
        """Written when the cluster is complete; without it a start was cut off."""
        return self.state / "cluster.json"

    @property
    def certificates(self) -> Path:
        return self.state / "certificates"

    @property
    def processes(self) -> Path:
        return self.state / "processes"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def audit_log(self) -> Path:
        return self.logs / "audit.log"

    @property
    def kept_logs(self) -> Path:
        return self.cache / "logs" / self.name

    @property
    def volumes(self) -> Path:
        return self.state / "volumes"

    @property
    def kubeconfig(self) -> Path:
        return self.kubeconfig_of("admin")

    def kubeconfig_of(self, user: str) -> Path:
        return self.certificates / f"{user}.kubeconfig"

    @property
    def prefix(self) -> str:
        """Names of network namespaces and cgroups begin with it."""
        return f"{PREFIX}{self.name}-"

    def node(self, index: int) -> Node:
        return Node(self, index)


@dataclass(frozen=True, slots=True)
class Node:
    """One node: its addresses, its namespace and its folder."""

    layout: Layout
    index: int

    @property
    def name(self) -> str:
        return f"node-{self.index}"

    @property
    def address(self) -> str:
        return f"172.30.0.{2 + self.index}"

    @property
    def pod_network(self) -> str:
        return f"10.244.{self.index}.0/24"

    @property
    def network_namespace(self) -> str:
        return f"{self.layout.prefix}{self.index}"

    @property
    def network_namespace_path(self) -> Path:
        return NAMESPACES / self.network_namespace

    @property
    def cgroup(self) -> str:
        return f"/{self.layout.prefix}{self.index}"

    @property
    def folder(self) -> Path:
        return self.layout.state / self.name

    @property
    def containerd_socket(self) -> Path:
        return self.folder / "containerd.sock"

    def process(self, component: str) -> str:
        """The name under which a component of this node is recorded."""
        return f"{component}-{self.index}"
