"""Wait for a component, and say what its log says when it dies instead."""

from __future__ import annotations

from collections.abc import Callable

from tools.devcluster import processes
from tools.devcluster.commands import wait_until
from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import Layout


def wait_for_process(
    layout: Layout, name: str, what: str, is_ready: Callable[[], bool], *, timeout_seconds: float
) -> None:
    def ready_or_dead() -> bool:
        process = processes.recorded(layout, name)
        if process is None or not process.is_alive():
            raise DevClusterError(f"{what} ended at its start; {layout.logs / f'{name}.log'} ends with:\n{tail()}")
        return is_ready()

    def tail() -> str:
        return processes.log_tail(layout, name)

    wait_until(
        what,
        ready_or_dead,
        timeout_seconds=timeout_seconds,
        every_seconds=0.05,
        hint=f"Its log: {layout.logs / f'{name}.log'}.",
    )
