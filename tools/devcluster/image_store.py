"""The base images, unpacked once and shared by all nodes of all clusters.

Importing gigabytes at each start would take a minute. So a short-lived containerd unpacks them once; of what it leaves,
a node copies the two small databases and mounts each unpacked layer read-only in its own mount namespace. A layer in
use is never written: pods write to an overlay above it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tools.devcluster import base_images, containerd, processes
from tools.devcluster.commands import run
from tools.devcluster.layout import Layout, Node
from tools.devcluster.mounts import Mount
from tools.devcluster.oci import Image, Layer, write_archive
from tools.devcluster.python_files import Environment
from tools.devcluster.readiness import wait_for_process

_DATABASES = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
_SNAPSHOTS = "io.containerd.snapshotter.v1.overlayfs/snapshots"
_BLOBS = "io.containerd.content.v1.content/blobs/sha256"
_PROCESS = "image-store"
_USED_STORE = "image-store"


@dataclass(frozen=True, slots=True)
class ImageStore:
    """A containerd root that nobody writes any more, and the layers under the Python images."""

    root: Path
    python_layers: tuple[Layer, ...]

    @property
    def key(self) -> str:
        return self.root.name

    def seed(self, node: Node) -> tuple[Mount, ...]:
        """Give the node's containerd the store's images; the mounts are for the node's mount namespace."""
        (node.layout.state / _USED_STORE).write_text(self.key)
        root = containerd.root_of(node)
        for name in (*_DATABASES, _BLOBS, _SNAPSHOTS):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
        for name in _DATABASES:
            shutil.copyfile(self.root / name, root / name)
        (root / _BLOBS).mkdir(exist_ok=True)
        for blob in (self.root / _BLOBS).iterdir():
            os.link(blob, root / _BLOBS / blob.name)
        mounts = []
        for layer in sorted((self.root / _SNAPSHOTS).iterdir()):
            target = root / _SNAPSHOTS / layer.name
            target.mkdir(parents=True, mode=0o700)
            mounts.append(Mount(layer, target, is_read_only=True))
        return tuple(mounts)


def open_or_build(layout: Layout, environment: Environment, programs: Path) -> ImageStore:
    """The store of this environment; building it takes minutes once, and stores that no cluster uses are removed."""
    key = base_images.base_key(environment)
    root = layout.cache / "images" / key
    if not root.is_dir():
        _build(layout, root, environment, programs)
        _remove_unused(layout, keep=key)
    layers = json.loads((root / "python-layers.json").read_text())
    return ImageStore(root, tuple(Layer(layer["digest"], layer["num_bytes"], None) for layer in layers))


def _build(layout: Layout, root: Path, environment: Environment, programs: Path) -> None:
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    layers = partial / "layers"
    base = base_images.build_base(environment, layers, layout.cache / "bytecode")
    _unpack(layout, partial, programs, base)
    shutil.rmtree(layers)
    (python,) = (image for image in base if image.name == base_images.PYTHON_BASE)
    described = [{"digest": layer.digest, "num_bytes": layer.num_bytes} for layer in python.layers]
    (partial / "python-layers.json").write_text(json.dumps(described))
    partial.rename(root)


def _unpack(layout: Layout, root: Path, programs: Path, base: tuple[Image, ...]) -> None:
    state = layout.state / "store"
    state.mkdir(parents=True, exist_ok=True)
    socket = state / "c.sock"
    config = state / "containerd.toml"
    config.write_text(containerd.configuration(root, state, socket, base_images.PAUSE))
    # A mount namespace of its own: what unpacking mounts goes away with the process.
    separate: list[str | Path] = ["unshare", "--mount", "--propagation", "private"]
    process = processes.start(layout, _PROCESS, [*separate, programs / "containerd", "--config", config])
    try:
        wait_for_process(
            layout,
            _PROCESS,
            "containerd for the image store",
            lambda: containerd.answers((), programs, socket),
            timeout_seconds=30,
        )
        containerd.import_archive((), programs, socket, lambda out: write_archive(base, out))
        # The packed layers are not needed any more: collect them now, not some time later.
        control: list[str | Path] = [programs / "ctr", "--address", str(socket), "--namespace", containerd.NAMESPACE]
        run([*control, "content", "prune", "references"], timeout_seconds=120)
    finally:
        processes.stop([process], patience_seconds=20)


def _remove_unused(layout: Layout, *, keep: str) -> None:
    used = {path.read_text() for path in (layout.cache / "clusters").glob(f"*/{_USED_STORE}")}
    for store in (layout.cache / "images").iterdir():
        if store.name not in used | {keep}:
            shutil.rmtree(store)
