"""Entry point of a trainer pod: torchrun for this node's ranks, and the true reason when they end.

torchrun alone turns every failure into exit code 1 and says nothing to Kubernetes. Each rank leaves a file; the earliest
failure is the cause, the others follow from it. A gang that was stopped in order before all steps were trained ends with
143, so that no Job counts it as complete.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rljob_api import names
from rljob_runtime import termination
from rljob_runtime.termination import STOPPED, Termination

ADDRESS_SECONDS = 600.0
"""How long the first pod's address may take to resolve: its node may still pull the image."""
SHUTDOWN_SECONDS = 100
"""torchrun's patience with its ranks after SIGTERM; within the pod's grace period."""
EXIT_STOPPED = 143
EXIT_NO_ADDRESS = 71


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this node's ranks to their end; the exit code is that of the rank that failed first."""
    # The kernel keeps a SIGTERM from process 1 of a container as long as it has no handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
    options = _parser().parse_args(arguments)
    path = Path(os.environ.get(names.ENV_TERMINATION_FILE) or termination.KUBERNETES_FILE)
    node = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
    if options.nodes > 1 and not _resolves(options.main_address, ADDRESS_SECONDS):
        end = Termination(
            "RendezvousFailed",
            EXIT_NO_ADDRESS,
            _now(),
            f"the address of the first trainer pod, {options.main_address}, did not resolve within {ADDRESS_SECONDS:g} s: "
            "look at that pod, and at the cluster's DNS",
        )
        termination.write(end, path)
        return end.exit_code
    with tempfile.TemporaryDirectory(prefix="rljob-ranks-") as folder:
        code, was_stopped = _run(options, node, Path(folder))
        ends = _read(Path(folder))
    why = cause(code, ends, was_stopped=was_stopped)
    if why is None:
        return 0
    termination.write(why, path)
    return why.exit_code


def cause(code: int, ends: Sequence[Termination], *, was_stopped: bool) -> Termination | None:
    """Why the node's ranks ended: the earliest failure; None when all trained to the last step."""
    failures = [end for end in ends if end.reason not in (STOPPED, "")]
    if failures:
        return min(failures, key=lambda end: (end.time, end.rank or 0))
    stopped = [end for end in ends if end.reason == STOPPED]
    if stopped or (was_stopped and code != 0):
        return Termination(STOPPED, EXIT_STOPPED, _now(), "the trainer checkpointed and stopped, as it was told to")
    if code == 0:
        return None
    # No rank could say why: it was killed.
    killed = -code if code < 0 else code
    return Termination(
        "TrainerFailed", code if code > 0 else 128 - code, _now(), f"torchrun ended with {killed}; see the log"
    )


def _run(options: argparse.Namespace, node: int, folder: Path) -> tuple[int, bool]:
    """(torchrun's exit code, whether it was told to stop)."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=static", "--max-restarts=0"),
        *(f"--nnodes={options.nodes}", f"--node-rank={node}", f"--nproc-per-node={options.processes}"),
        *(f"--master-addr={options.main_address if options.nodes > 1 else '127.0.0.1'}",),
        *(
            f"--master-port={options.main_port}",
            f"--shutdown-timeout={SHUTDOWN_SECONDS}",
            f"--log-dir={folder / 'logs'}",
        ),
        *("-m", "rljob_runtime.trainer.main"),
    ]
    told: list[int] = []
    child = subprocess.Popen(command, env={**os.environ, names.ENV_RANK_ENDS: str(folder)})

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    return child.wait(), bool(told)


def _read(folder: Path) -> list[Termination]:
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            found.append(Termination.from_json(path.read_text()))
        except (OSError, ValueError):
            continue
    return found


def _resolves(address: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(address, None)
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        else:
            return True


def _now() -> str:
    return termination.text_of(time.time())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rljob_runtime.trainer.launch", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True, help="trainer pods")
    parser.add_argument("--processes", type=int, required=True, help="ranks in each pod")
    parser.add_argument("--main-address", required=True, help="host name of the first pod")
    parser.add_argument("--main-port", type=int, required=True)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
