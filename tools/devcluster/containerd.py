"""containerd on a node: its configuration, its start, and the import of images."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tools.devcluster import processes
from tools.devcluster.commands import run
from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import Layout, Node
from tools.devcluster.mounts import inside_node
from tools.devcluster.readiness import wait_for_process

_DISABLED = (
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.internal.v1.tracing",
    "io.containerd.nri.v1.nri",
)
NAMESPACE = "k8s.io"


def root_of(node: Node) -> Path:
    return node.folder / "containerd"


def start(node: Node, programs: Path, pause_image: str) -> None:
    """Start containerd with its pods' network; returns at once."""
    _write_pod_network(node)
    config = node.folder / "containerd.toml"
    config.write_text(configuration(root_of(node), node.folder, node.containerd_socket, pause_image))
    # The shim is looked up on PATH.
    environment: list[str | Path] = [
        "env",
        f"PATH={programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]
    command = [*inside_node(node), *environment, programs / "containerd", "--config", config]
    processes.start(node.layout, node.process("containerd"), command)


def wait_until_ready(node: Node, programs: Path) -> None:
    wait_for_process(
        node.layout,
        node.process("containerd"),
        f"containerd of {node.name}",
        lambda: answers(inside_node(node), programs, node.containerd_socket),
        timeout_seconds=30,
    )


def answers(prefix: tuple[str | Path, ...], programs: Path, socket: Path) -> bool:
    try:
        run([*prefix, programs / "ctr", "--address", str(socket), "version"], timeout_seconds=10)
    except DevClusterError:
        return False
    return True


def import_archive(
    prefix: tuple[str | Path, ...], programs: Path, socket: Path, write: Callable[[IO[bytes]], None]
) -> None:
    """Stream an OCI archive, as `write` writes it, into containerd and unpack it. Layers unpacked before may be absent."""
    command = [*map(str, prefix), str(programs / "ctr"), "--address", str(socket), "--namespace", NAMESPACE]
    # --local: the client's own import, which needs no layer that is already unpacked.
    command += ["images", "import", "--local", "--discard-unpacked-layers", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        cut_short = False
        try:
            write(process.stdin)
            process.stdin.close()
        except BrokenPipeError:
            cut_short = True
        said = process.stderr.read().decode(errors="replace").strip()
        code = process.wait(timeout=600)
    if code != 0 or cut_short:
        raise DevClusterError(f"containerd refused an image archive: {said}")


def configuration(root: Path, state: Path, socket: Path, pause_image: str) -> str:
    """containerd.toml, version 3. TOML strings are written as JSON strings, which they include."""
    q = json.dumps
    return f"""version = 3
root = {q(str(root))}
state = {q(str(state / "containerd-state"))}
disabled_plugins = {q(list(_DISABLED))}
[grpc]
  address = {q(str(socket))}
[plugins."io.containerd.internal.v1.opt"]
  path = {q(str(state / "containerd-opt"))}
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = {q(pause_image)}
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true        # no CAP_SYS_RESOURCE on some machines
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        SystemdCgroup = false
        Root = {q(str(state / "runc"))}
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = {q(str(state / "cni"))}
"""


def shims(layout: Layout) -> tuple[processes.Process, ...]:
    """containerd's shims, which outlive it. They are ours when they serve a containerd socket under our state folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if not words[0].endswith("containerd-shim-runc-v2") or "-address" not in words[:-1]:
            continue
        address = Path(words[words.index("-address") + 1])
        pid = int(folder.name)
        ticks = processes.start_ticks(pid)
        if address.is_relative_to(layout.state) and ticks is not None:
            found.append(processes.Process(f"shim-{pid}", pid, ticks))
    return tuple(found)


def _write_pod_network(node: Node) -> None:
    folder = node.folder / "cni"
    folder.mkdir(parents=True, exist_ok=True)
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(node.folder / "cni-addresses"),
            "ranges": [[{"subnet": node.pod_network}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    network = {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}
    (folder / "10-pods.conflist").write_text(json.dumps(network, indent=1))
