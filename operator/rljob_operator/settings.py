"""What the operator's pod tells it: environment variables, set by the chart."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rljob_api.errors import BadInput
from rljob_operator.core.observed import Settings


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """Settings of one operator process."""

    core: Settings
    namespace: str
    """Where the operator and its lease live."""
    watched_namespace: str | None
    """None: all."""
    identity: str
    port: int
    nats_credentials: Path | None
    workers: int = 4

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> OperatorSettings:
        """
        Raises:
            BadInput: a variable is missing or is no number; names all that are.
        """
        required = ("RLJOB_OPERATOR_NAMESPACE", "RLJOB_RUNTIME_IMAGE", "RLJOB_NATS_URL")
        missing = [name for name in required if not environ.get(name)]
        if missing:
            raise BadInput(
                f"the operator needs the environment variables {', '.join(missing)}: the chart sets them (charts/rljob)"
            )
        port = environ.get("RLJOB_OPERATOR_PORT") or "8080"
        if not port.isascii() or not port.isdigit():
            raise BadInput(f"RLJOB_OPERATOR_PORT is {port[:20]!r}: it must be a number")
        credentials = environ.get("RLJOB_NATS_CREDENTIALS")
        return cls(
            core=Settings(
                runtime_image=environ["RLJOB_RUNTIME_IMAGE"],
                nats_url=environ["RLJOB_NATS_URL"],
                image_pull_policy=environ.get("RLJOB_IMAGE_PULL_POLICY") or "IfNotPresent",
            ),
            namespace=environ["RLJOB_OPERATOR_NAMESPACE"],
            watched_namespace=environ.get("RLJOB_WATCHED_NAMESPACE") or None,
            identity=environ.get("RLJOB_POD_NAME") or socket.gethostname(),
            port=int(port),
            nats_credentials=Path(credentials) if credentials else None,
        )
