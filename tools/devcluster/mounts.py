"""Each node's mount namespace and cgroups.

containerd and the kubelet of a node share a mount namespace that a sleeping process holds: all they mount (overlays,
secrets, pod network namespaces) goes away with it, even after a crash. Fixed paths that both would share with the
machine or with another node are bind mounts of folders of the node.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from tools.devcluster import locks, processes
from tools.devcluster.commands import wait_until
from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import Layout, Node
from tools.devcluster.network import any_cluster_exists, inside

CGROUPS = Path("/sys/fs/cgroup")
_FIXED_PATHS = (Path("/var/lib/kubelet"), Path("/var/lib/cni"), Path("/run/containerd"))
# The kubelet sets these three for the whole machine; in here it finds files that already hold what it wants.
_SYSCTLS = {"vm/overcommit_memory": "1", "kernel/panic": "10", "kernel/panic_on_oops": "1"}


@dataclass(frozen=True, slots=True)
class Mount:
    """A bind mount that the node's namespace starts with."""

    source: Path
    target: Path
    is_read_only: bool = False

    def command(self) -> str:
        source, target = shlex.quote(str(self.source)), shlex.quote(str(self.target))
        bind = f"mount --bind {source} {target}"
        return f"{bind} && mount -o remount,bind,ro {target}" if self.is_read_only else bind


def create(node: Node, further: tuple[Mount, ...]) -> None:
    """Start the holder of the node's mount namespace, with the fixed paths, the sysctls and `further` mounted."""
    with locks.of_fixed_paths():
        _start_holder(node, [*_fixed_mounts(node), *_sysctl_mounts(node), *further])
    for hierarchy in hierarchies():
        (hierarchy / node.cgroup.lstrip("/")).mkdir(exist_ok=True)


def _start_holder(node: Node, mounts: list[Mount]) -> None:
    ready = node.folder / "mounted"
    script = " && ".join(
        [
            *(mount.command() for mount in mounts),
            f"touch {shlex.quote(str(ready))}",
            f"exec tail -f {shlex.quote(str(ready))}",
        ]
    )
    holder = processes.start(
        node.layout, node.process("mounts"), ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    )
    wait_until(
        f"the mounts of {node.name}",
        lambda: ready.exists() or not holder.is_alive(),
        timeout_seconds=10,
        every_seconds=0.01,
    )
    if not ready.exists():
        said = processes.log_tail(node.layout, holder.name)
        raise DevClusterError(f"the mounts of {node.name} failed: {said}. Root with CAP_SYS_ADMIN is needed.")


def inside_node(node: Node) -> tuple[str | Path, ...]:
    """Prefix of a command that runs in the node's mount and network namespaces."""
    holder = processes.recorded(node.layout, node.process("mounts"))
    if holder is None:
        return inside(node)
    return ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", f"--net={node.network_namespace_path}")


def hierarchies() -> tuple[Path, ...]:
    """The cgroup hierarchies: one on cgroup v2, one per controller on v1."""
    if (CGROUPS / "cgroup.controllers").exists():
        return (CGROUPS,)
    return tuple(sorted(path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()))


def cgroups(layout: Layout) -> tuple[Path, ...]:
    return tuple(path for hierarchy in hierarchies() for path in sorted(hierarchy.glob(f"{layout.prefix}[0-9]")))


def cgroups_of(node: Node) -> tuple[Path, ...]:
    return tuple(path for path in cgroups(node.layout) if path.name == node.cgroup.lstrip("/"))


def kill_in(folders: tuple[Path, ...]) -> bool:
    """SIGKILL all processes in these cgroups, which only a kubelet fills; True when there was none."""
    pids: set[int] = set()
    for folder in folders:
        for path in folder.rglob("cgroup.procs"):
            try:
                pids.update(map(int, path.read_text().split()))
            except OSError:  # removed meanwhile
                continue
    found = [(pid, processes.start_ticks(pid)) for pid in pids]
    alive = [processes.Process(f"container-{pid}", pid, ticks) for pid, ticks in found if ticks is not None]
    processes.stop(alive, patience_seconds=0)
    return not alive


def remove_fixed_paths() -> None:
    """Remove the folders that were made to be mounted on, unless another cluster has its mounts there."""
    with locks.of_fixed_paths():
        if any_cluster_exists():
            return
        for path in _FIXED_PATHS:
            try:
                path.rmdir()
            except OSError:  # not empty: somebody else's
                continue


def _fixed_mounts(node: Node) -> list[Mount]:
    mounts = []
    for path in _FIXED_PATHS:
        source = node.folder / "fixed" / path.relative_to("/")
        source.mkdir(parents=True, exist_ok=True)
        path.mkdir(parents=True, exist_ok=True)
        mounts.append(Mount(source, path))
    return mounts


def _sysctl_mounts(node: Node) -> list[Mount]:
    folder = node.folder / "sysctls"
    folder.mkdir(parents=True, exist_ok=True)
    mounts = []
    for name, value in _SYSCTLS.items():
        source = folder / name.replace("/", ".")
        source.write_text(f"{value}\n")
        mounts.append(Mount(source, Path("/proc/sys") / name))
    return mounts
