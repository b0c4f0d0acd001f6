"""The runtime's configuration: the RLJob as the pods are told it, in an immutable ConfigMap.

A trainer's is made once an attempt, a pool's once a hash. What is in the hash decides what a change does (docs/design.md,
7b): a field of the hash makes a new attempt or rolls the pool; a live field is in the content only, as it was when the
ConfigMap was made.
"""

from __future__ import annotations

import json
from typing import Any

from rljob_api import names
from rljob_api.spec import RLJobSpec
from rljob_operator.core.builders.metadata import hash_of, metadata
from rljob_operator.core.observed import Observed

CONFIG_KEY = "rljob.json"
_EVERYONE = ("model", "environment", "sampling", "correction", "messaging")


def trainer_hash(spec: RLJobSpec) -> str:
    """Changes exactly when the trainer needs a new attempt."""
    document = _as_meant(spec)
    return hash_of({field: document.get(field) for field in (*_EVERYONE, "storage", "training", "trainer")})


def pool_hash(spec: RLJobSpec, pool: str) -> str:
    """Changes exactly when the pool's pods must be replaced."""
    document = _as_meant(spec)
    used = {field: document.get(field) for field in _EVERYONE}
    used |= {"weights": document.get("storage", {}).get("weights"), "computeType": spec.training.compute_type.value}
    if pool == names.OLD_POLICY_POOL:
        own = document["oldPolicyPool"]
        used |= {"tokensPerMicroBatch": spec.training.tokens_per_micro_batch}  # it scores in the trainer's portions
    else:
        own = next(item for item in document["rolloutPools"] if item["name"] == pool)
    kept = {key: value for key, value in own.items() if key not in ("replicas", "minReplicas")}
    return hash_of({**used, "pool": kept})


def config_map(observed: Observed, spec: RLJobSpec, name: str, *, pool: str, attempt: int | None) -> dict[str, Any]:
    """The ConfigMap of that name, as the spec is now."""
    document = _as_sent(spec)
    for field in ("suspend", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "failurePolicy"):
        document.pop(field, None)
    for part in (document.get("trainer", {}), document.get("oldPolicyPool", {}), *document["rolloutPools"]):
        part.pop("template", None)  # may hold what the pods need not read
    content = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": observed.identity.name, "namespace": observed.identity.namespace},
        "spec": document,
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(observed.identity, name, pool=pool, attempt=attempt),
        "immutable": True,
        "data": {CONFIG_KEY: json.dumps(content, indent=1, sort_keys=True)},
    }


def _as_sent(spec: RLJobSpec) -> dict[str, Any]:
    document: dict[str, Any] = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return document


def _as_meant(spec: RLJobSpec) -> dict[str, Any]:
    """What differs from the defaults: a field that a newer operator knows, left at its default, changes no hash."""
    document: dict[str, Any] = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return document
