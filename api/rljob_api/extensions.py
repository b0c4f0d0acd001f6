"""What the models tell Kubernetes beyond JSON schema: lists that are maps, and objects whose fields it need not know.

Given to fields as `json_schema_extra`; `openapi.py` carries them into the CRD.
"""

from __future__ import annotations

from pydantic import JsonValue

MAX_CONTAINERS = 64
MAX_CONTAINER_NAME = 63

LIST_MAP_BY_NAME: dict[str, JsonValue] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
LIST_MAP_BY_TYPE: dict[str, JsonValue] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}

OPEN_OBJECT: dict[str, JsonValue] = {"x-kubernetes-preserve-unknown-fields": True}
"""Fields that Kubernetes keeps as they are, without looking at them."""

OPEN_POD_SPEC: dict[str, JsonValue] = {
    **OPEN_OBJECT,
    "properties": {
        "containers": {
            "type": "array",
            "description": "Containers by name; further fields are those of a Kubernetes container.",
            "maxItems": MAX_CONTAINERS,
            **LIST_MAP_BY_NAME,
            "items": {
                "type": "object",
                "description": "A container.",
                **OPEN_OBJECT,
                "required": ["name"],
                "properties": {
                    "name": {
                        "type": "string",
                        "description": "Name of the container.",
                        "minLength": 1,
                        "maxLength": MAX_CONTAINER_NAME,
                    }
                },
            },
        }
    },
}
"""A pod spec of which only the container names are declared: they key the list, so that server-side apply can merge it.

The full schema, once for each pool, would be near the size that etcd takes."""
