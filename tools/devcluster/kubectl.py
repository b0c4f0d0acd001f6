"""kubectl as the cluster's admin, in node 0's network namespace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.devcluster.commands import run
from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import Layout
from tools.devcluster.network import inside


@dataclass(frozen=True, slots=True)
class Kubectl:
    """Calls the binary; an error carries what kubectl said."""

    layout: Layout
    binary: Path

    def __call__(self, *arguments: str, text_input: str | None = None, timeout_seconds: float = 60) -> str:
        command = [*inside(self.layout.node(0)), self.binary, f"--kubeconfig={self.layout.kubeconfig}", *arguments]
        return run(command, text_input=text_input, timeout_seconds=timeout_seconds)

    def apply(self, objects: Sequence[dict[str, Any]]) -> None:
        manifest = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self("apply", "--server-side", "--force-conflicts", "--filename=-", text_input=json.dumps(manifest))

    def get(self, *arguments: str) -> Any:
        """The object, or the list under `items`."""
        return json.loads(self("get", *arguments, "--output=json"))

    def exists(self, *arguments: str) -> bool:
        return bool(self("get", *arguments, "--ignore-not-found", "--output=name").strip())

    def api_server_is_ready(self) -> bool:
        try:
            return self("get", "--raw=/readyz", "--request-timeout=2s", timeout_seconds=10).strip() == "ok"
        except DevClusterError:
            return False
