"""`python -m tools.devcluster up|down|status|images FILE|exec -- COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tools.devcluster import base_images, binaries, cluster, debian, images, locks, network, processes, teardown
from tools.devcluster.cluster import Record
from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import Layout
from tools.devcluster.python_files import Environment


def main() -> int:
    arguments = _parser().parse_args()
    try:
        layout = Layout.from_environment(os.environ)
        match arguments.command:
            case "up":
                return _up(layout, arguments.nodes)
            case "down":
                return _down(layout)
            case "status":
                return _status(layout)
            case "images":
                return _images(layout, arguments.archive)
            case _:
                return _exec(layout, arguments.words)
    except DevClusterError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return 1


def _up(layout: Layout, num_nodes: int) -> int:
    cluster.up(layout, num_nodes, _say)
    print(f"kubeconfig: {layout.kubeconfig}")
    print("The cluster is in a network namespace of its own: run a command there with")
    print("  python -m tools.devcluster exec -- kubectl get nodes")
    return 0


def _down(layout: Layout) -> int:
    with locks.of_cluster(layout):
        left = teardown.down(layout)
    _say(f"cluster {layout.name} is down; left: {left}")
    return 0 if left.is_nothing() else 1


def _status(layout: Layout) -> int:
    record = Record.read(layout)
    if record is None:
        print(f"cluster {layout.name} is not up; on the machine: {teardown.leftovers(layout)}")
        return 1
    for process in processes.all_recorded(layout):
        print(f"{process.name:20} {'running' if process.is_alive() else 'ended':8} pid {process.pid}")
    print(f"nodes: {record.num_nodes}")
    print(f"images: {', '.join((images.RUNTIME, images.OPERATOR, base_images.NATS, base_images.BUSYBOX))}")
    print(f"logs: {layout.logs}")
    print(f"kubeconfig: {layout.kubeconfig}")
    return 0 if all(process.is_alive() for process in processes.all_recorded(layout)) else 1


def _images(layout: Layout, archive: Path) -> int:
    debian.install_packages()
    images.export(Environment.of_this_interpreter(), layout.cache / "bytecode", archive.absolute())
    _say(f"wrote {archive} ({archive.stat().st_size / 1e9:.1f} GB)")
    return 0


def _exec(layout: Layout, words: list[str]) -> int:
    """Become the command, in node 0's network namespace, with the cluster's kubeconfig, kubectl and helm."""
    command = words[1:] if words[:1] == ["--"] else words
    if not command:
        raise DevClusterError("exec needs a command: python -m tools.devcluster exec -- kubectl get nodes")
    if Record.read(layout) is None:
        raise DevClusterError(f"cluster {layout.name} is not up: run `make cluster`.")
    search_path = binaries.locate(layout).search_path()
    network.enter(layout.node(0))
    environment = {
        **os.environ,
        "KUBECONFIG": str(layout.kubeconfig),
        "PATH": os.pathsep.join([search_path, os.environ.get("PATH", "")]),
    }
    try:
        os.execvpe(command[0], command, environment)
    except FileNotFoundError:
        raise DevClusterError(f"{command[0]} is neither on PATH nor among the cluster's binaries.") from None


def _say(line: str) -> None:
    print(f"devcluster: {line}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.devcluster", description=cluster.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="make the cluster usable; may be repeated")
    up.add_argument("--nodes", type=int, default=1, help="at least so many nodes (default 1)")
    commands.add_parser("down", help="take it away and count what is left")
    commands.add_parser("status", help="what runs, and where things are")
    export = commands.add_parser("images", help="write all images into an OCI archive, to load into another cluster")
    export.add_argument("archive", type=Path)
    execute = commands.add_parser(
        "exec", help="run a command in the cluster's network, with its kubeconfig and kubectl"
    )
    execute.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main())
