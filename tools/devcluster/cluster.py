"""Bring a cluster up: from nothing, or from whatever there is, to a usable one. Read this first.

`up` may be repeated: an intact cluster is kept (the project's images are renewed, used volumes emptied, nodes added);
one that is not, because a start was cut off, a process died or pins changed, is torn down and made anew.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.devcluster import (
    base_images,
    binaries,
    certificates,
    containerd,
    control_plane,
    debian,
    dns,
    images,
    kubelet,
    locks,
    mounts,
    network,
    objects,
    processes,
    teardown,
)
from tools.devcluster.binaries import Binaries
from tools.devcluster.commands import wait_until
from tools.devcluster.errors import DevClusterError
from tools.devcluster.image_store import ImageStore, open_or_build
from tools.devcluster.kubectl import Kubectl
from tools.devcluster.layout import MAX_NODES, Layout, Node
from tools.devcluster.oci import Image, write_archive
from tools.devcluster.python_files import Environment

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Record:
    """What a complete cluster was made of."""

    num_nodes: int
    made_from: str  # binaries and base images
    project_layer: str

    @classmethod
    def read(cls, layout: Layout) -> Record | None:
        try:
            return cls(**json.loads(layout.record.read_text()))
        except FileNotFoundError:
            return None

    def write(self, layout: Layout) -> None:
        partial = layout.record.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.rename(layout.record)


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything a start needs, built and in the cache."""

    layout: Layout
    binaries: Binaries
    programs: Path  # of containerd
    store: ImageStore
    environment: Environment

    @property
    def made_from(self) -> str:
        return " ".join([*sorted({str(folder) for folder in self.binaries.folders.values()}), self.store.key])

    @property
    def kubectl(self) -> Kubectl:
        return Kubectl(self.layout, self.binaries["kubectl"])


def up(layout: Layout, num_nodes: int, say: Say) -> None:
    """A usable cluster with at least `num_nodes` nodes. When the start fails, nothing but its logs is left."""
    if not 1 <= num_nodes <= MAX_NODES:
        raise DevClusterError(f"{num_nodes} nodes: between 1 and {MAX_NODES} can be had.")
    check_machine()
    with locks.of_cluster(layout):
        parts = prepare(layout, say)
        record = Record.read(layout)
        if record is None or not _is_intact(parts, record):
            teardown.down(layout)
            record = None
        layout.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            _start(parts, record, num_nodes, say)
        except BaseException:
            teardown.down(layout)
            raise


def prepare(layout: Layout, say: Say) -> Parts:
    """Install, build and unpack what is not in the cache."""
    debian.install_packages()
    programs = debian.containerd_folder(layout)
    for module in binaries.missing(layout):
        say(f"building {', '.join(module.binaries)} (once; all of them take about 12 minutes on 2 cores)")
    built = binaries.build(layout)
    environment = Environment.of_this_interpreter()
    begin = time.monotonic()
    say("looking for the images of the installed environment (a few minutes when it has changed)")
    store = open_or_build(layout, environment, programs)
    say(f"base images are there ({time.monotonic() - begin:.1f} s)")
    return Parts(layout, built, programs, store, environment)


def check_machine() -> None:
    """Refuse what cannot work, before anything is built."""
    if os.geteuid() != 0:
        raise DevClusterError("a dev cluster needs root: it makes namespaces and cgroups. Or use KUBECONFIG.")
    if os.uname().machine != "x86_64":
        raise DevClusterError(f"the dev cluster's images are for x86_64, this machine is {os.uname().machine}.")
    if not mounts.hierarchies():
        raise DevClusterError(f"no cgroups under {mounts.CGROUPS}: the kubelet needs them.")


def _is_intact(parts: Parts, record: Record) -> bool:
    recorded = processes.all_recorded(parts.layout)
    return record.made_from == parts.made_from and bool(recorded) and all(process.is_alive() for process in recorded)


def _start(parts: Parts, record: Record | None, num_nodes: int, say: Say) -> None:
    begin = time.monotonic()
    layout, kubectl = parts.layout, parts.kubectl
    project_images = images.build_project(parts.environment, parts.store.python_layers, layout.state / "layers")
    project_layer = project_images[0].layers[-1].digest
    old = [layout.node(index) for index in range(record.num_nodes if record else 0)]
    new = [layout.node(index) for index in range(len(old), num_nodes)]

    now = datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
    certificates.issue_control_plane(layout, now)
    for node in new:
        _make_namespaces(parts, node, now)
    control_plane.start_api_server(layout, parts.binaries)
    for node in new:
        containerd.start(node, parts.programs, base_images.PAUSE)
    for node in [*old, *new]:
        if node in new or record is None or record.project_layer != project_layer:
            _import_project(parts, node, project_images)
    say(f"[{time.monotonic() - begin:4.1f} s] containerd runs, images of this checkout are imported")

    control_plane.wait_for_api_server(layout, kubectl)
    say(f"[{time.monotonic() - begin:4.1f} s] the API server is ready")
    control_plane.start_controllers(layout, parts.binaries)
    dns.start(layout, parts.binaries)
    for node in new:
        kubelet.start(node, parts.binaries)
    objects.provide_volumes(layout, kubectl)
    _wait_until_usable(kubectl, [*old, *new])
    for node in [*old, *new]:
        objects.advertise_gpus(node, kubectl)
    Record(len(old) + len(new), parts.made_from, project_layer).write(layout)
    say(f"[{time.monotonic() - begin:4.1f} s] {len(old) + len(new)} node(s) ready, with {objects.NUM_VOLUMES} volumes")


def _make_namespaces(parts: Parts, node: Node, now: datetime.datetime) -> None:
    node.folder.mkdir(exist_ok=True)
    certificates.issue_node(node, now)
    network.create(node)
    mounts.create(node, parts.store.seed(node))


def _import_project(parts: Parts, node: Node, project_images: tuple[Image, Image]) -> None:
    containerd.wait_until_ready(node, parts.programs)
    unpacked = {layer.digest for layer in parts.store.python_layers}
    containerd.import_archive(
        mounts.inside_node(node),
        parts.programs,
        node.containerd_socket,
        lambda out: write_archive(project_images, out, without=unpacked),
    )


def _wait_until_usable(kubectl: Kubectl, nodes: list[Node]) -> None:
    """Ready is not enough: pods are refused until the taint is gone and the namespace has its account and authority."""
    wait_until(
        f"{len(nodes)} node(s) ready and free of taints",
        lambda: all(_takes_pods(kubectl, node) for node in nodes),
        timeout_seconds=90,
        every_seconds=0.2,
    )
    wait_until(
        "the default service account and the authority's certificate in namespace default",
        lambda: kubectl.exists("serviceaccount", "default") and kubectl.exists("configmap", "kube-root-ca.crt"),
        timeout_seconds=60,
    )


def _takes_pods(kubectl: Kubectl, node: Node) -> bool:
    if not kubectl.exists("node", node.name):
        return False
    found = kubectl.get("node", node.name)
    conditions = {item["type"]: item["status"] for item in found["status"].get("conditions", [])}
    return conditions.get("Ready") == "True" and not found["spec"].get("taints")
