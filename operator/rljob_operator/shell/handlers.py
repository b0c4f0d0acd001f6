"""The only use of kopf: its process, login and watch of RLJobs. Its events are triggers, never data.

No timers, daemons, indexes and no handlers that set finalizers or annotations: they write to the object (docs/design.md, 7c).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import kopf

from rljob_operator.shell.kinds import RLJOB

Trigger = Callable[[str, str], None]


def registry(trigger: Trigger) -> kopf.OperatorRegistry:
    """Handlers that ask for a pass."""
    made = kopf.OperatorRegistry()

    @kopf.on.event("rljob.dev", "v1alpha1", RLJOB.plural, registry=made)  # type: ignore[untyped-decorator]
    async def changed(namespace: str | None, name: str | None, **_: Any) -> None:
        if namespace and name:
            trigger(namespace, name)

    @kopf.on.login(registry=made)  # type: ignore[untyped-decorator]
    async def logged_in(**arguments: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)

    @kopf.on.startup(registry=made)  # type: ignore[untyped-decorator]
    async def configured(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False
        settings.scanning.disabled = True  # else a namespaced operator is deaf on its first 403
        settings.networking.request_timeout = 30
        settings.networking.connect_timeout = 5
        settings.watching.server_timeout = 300
        settings.watching.connect_timeout = 5
        settings.execution.max_workers = 1

    return made


async def run(trigger: Trigger, namespace: str | None, stop: asyncio.Event) -> None:
    """Kopf's operator, until `stop`."""
    await kopf.operator(
        registry=registry(trigger),
        clusterwide=namespace is None,
        namespaces=() if namespace is None else (namespace,),
        standalone=True,
        stop_flag=stop,
    )
