"""The headless Service by which the trainer's ranks find each other."""

from __future__ import annotations

from typing import Any

from rljob_api import names
from rljob_operator.core.builders.metadata import labels, metadata
from rljob_operator.core.builders.trainer_job import RENDEZVOUS_PORT
from rljob_operator.core.observed import Observed


def trainer_service(observed: Observed) -> dict[str, Any]:
    """One for all attempts: the host names hold the attempt."""
    identity = observed.identity
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(identity, names.trainer_service_name(identity.name), pool=names.TRAINER_POOL),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # ranks look each other up before any of them is ready
            "selector": labels(identity, names.TRAINER_POOL),
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }
