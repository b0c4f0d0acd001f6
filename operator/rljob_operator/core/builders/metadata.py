"""Names, labels and the owner of a child; the hash of what went into it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rljob_api import names
from rljob_operator.core.observed import Identity

HASH_CHARACTERS = 10


def metadata(
    identity: Identity,
    name: str,
    *,
    pool: str,
    attempt: int | None = None,
    hashed: str = "",
) -> dict[str, Any]:
    """Metadata of a child, owned by the RLJob: Kubernetes deletes it with its owner."""
    return {
        "name": name,
        "namespace": identity.namespace,
        "labels": labels(identity, pool, attempt),
        **({"annotations": {names.ANNOTATION_HASH: hashed}} if hashed else {}),
        "ownerReferences": [
            {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "name": identity.name,
                "uid": identity.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def labels(identity: Identity, pool: str, attempt: int | None = None) -> dict[str, str]:
    """`kubectl logs -l rljob.dev/name=…,rljob.dev/pool=…` works by these."""
    found = {names.LABEL_NAME: identity.name, names.LABEL_POOL: pool, names.LABEL_MANAGED_BY: names.MANAGED_BY}
    if attempt is not None:
        found[names.LABEL_ATTEMPT] = str(attempt)
    return found


def hash_of(value: Any) -> str:
    """Short digest of JSON data; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARACTERS]
