"""Take a cluster away, in whatever state it is: after a clean start, a crashed one, or none."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields
from pathlib import Path

from tools.devcluster import containerd, mounts, network, processes
from tools.devcluster.commands import wait_until
from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import Layout
from tools.devcluster.processes import Process

_KUBELET_PATIENCE_SECONDS = 5.0
_CONTAINERD_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What of a cluster is on the machine. All zero: nothing."""

    processes: int
    mounts: int
    cgroups: int
    network_namespaces: int
    files: int

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, item.name)} {item.name.replace('_', ' ')}" for item in fields(self))

    def is_nothing(self) -> bool:
        return not any(getattr(self, item.name) for item in fields(self))


def down(layout: Layout) -> Leftovers:
    """End every recorded process, then remove what they used. Logs are kept; a cluster that is not there is no error."""
    _keep_logs(layout)
    recorded = processes.all_recorded(layout)
    kubelets = _named(recorded, "kubelet-")
    runtimes = _named(recorded, "containerd-")
    holders = _named(recorded, "mounts-")
    others = [process for process in recorded if process not in (*kubelets, *runtimes, *holders)]
    # The kubelet first, or it starts again what is stopped. The API server would wait a minute for open watches.
    processes.stop(kubelets, patience_seconds=_KUBELET_PATIENCE_SECONDS)
    processes.stop(others, patience_seconds=0)
    what = f"the containers of cluster {layout.name} to end"
    wait_until(what, lambda: mounts.kill_in(mounts.cgroups(layout)), timeout_seconds=20)
    processes.stop(runtimes, patience_seconds=_CONTAINERD_PATIENCE_SECONDS)
    processes.stop(containerd.shims(layout), patience_seconds=0)
    processes.stop(holders, patience_seconds=0)
    network.delete_namespaces(layout)
    wait_until(f"the cgroups of cluster {layout.name} to be empty", lambda: _remove_cgroups(layout), timeout_seconds=20)
    _remove_state(layout)
    mounts.remove_fixed_paths()
    return leftovers(layout)


def leftovers(layout: Layout) -> Leftovers:
    """Counted from what the machine says, not from our records."""
    state = f"{layout.state}/"
    return Leftovers(
        processes=sum(1 for command in _command_lines() if state in command),
        mounts=sum(1 for line in Path("/proc/self/mounts").read_text().splitlines() if state in line),
        cgroups=len(mounts.cgroups(layout)),
        network_namespaces=len(network.existing_namespaces(layout)),
        files=sum(1 for _ in layout.state.rglob("*")) if layout.state.exists() else 0,
    )


def _named(recorded: tuple[Process, ...], prefix: str) -> list[Process]:
    return [process for process in recorded if process.name.startswith(prefix)]


def _remove_cgroups(layout: Layout) -> bool:
    for cgroup in mounts.cgroups(layout):
        inner = [path for path in cgroup.rglob("*") if path.is_dir()]
        for folder in [*sorted(inner, key=lambda path: len(path.parts), reverse=True), cgroup]:
            try:
                folder.rmdir()
            except OSError:  # still busy for a moment after the last process has ended
                continue
    return not mounts.cgroups(layout)


def _keep_logs(layout: Layout) -> None:
    if not layout.logs.is_dir():
        return
    shutil.rmtree(layout.kept_logs, ignore_errors=True)
    layout.kept_logs.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(layout.logs, layout.kept_logs)


def _remove_state(layout: Layout) -> None:
    def removed() -> bool:
        # The mounts of a dead namespace go away a moment after its last process.
        shutil.rmtree(layout.state, ignore_errors=True)
        return not layout.state.exists()

    _refuse_to_remove_through_mounts(layout)
    wait_until(f"{layout.state} to be removed", removed, timeout_seconds=10)


def _refuse_to_remove_through_mounts(layout: Layout) -> None:
    """Our mounts are invisible here; if one is not, removing files would reach what it shows."""
    state = f"{layout.state}/"
    seen = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if state in line]
    if seen:
        raise DevClusterError(f"mounted under {layout.state} and not by us: {', '.join(seen)}. Unmount them first.")


def _command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
