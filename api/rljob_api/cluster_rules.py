"""Rules that hold on a cluster only: checkpoints that outlive a pod, and what the operator owns in a pod template."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydantic import JsonValue

from rljob_api.extensions import MAX_CONTAINER_NAME, MAX_CONTAINERS
from rljob_api.names import OLD_POLICY_CONTAINER, ROLLOUT_CONTAINER, TRAINER_CONTAINER
from rljob_api.pools import PodTemplate
from rljob_api.rule import Finding, Rule
from rljob_api.spec import RLJobSpec

_OWNED_FIELDS = ("command", "args", "livenessProbe", "readinessProbe", "startupProbe")
_OWNED_PREFIX = "RLJOB_"


def _restarts_keep_checkpoints(spec: RLJobSpec) -> Iterator[Finding]:
    restarts = spec.failure_policy.max_restarts
    if restarts > 0 and spec.storage.checkpoint.persistent_volume_claim is None:
        yield Finding("storage.checkpoint.persistentVolumeClaim", None, f"failurePolicy.maxRestarts is {restarts}")


def _items(holder: object, key: str, at: str) -> Iterator[tuple[str, dict[str, JsonValue]]]:
    """(path, object) of a list of objects inside free JSON; another shape is the apiserver's to refuse."""
    listed = holder.get(key) if isinstance(holder, dict) else None
    for index, item in enumerate(listed if isinstance(listed, tuple) else ()):
        if isinstance(item, dict):
            yield f"{at}.{key}[{index}]", item


def _owned_fields(container_name: str) -> Callable[[PodTemplate], Iterator[Finding]]:
    def check(template: PodTemplate) -> Iterator[Finding]:
        if template.spec is not None and "restartPolicy" in template.spec:
            yield Finding("spec.restartPolicy", template.spec["restartPolicy"])
        for path, container in _items(template.spec, "containers", "spec"):
            if container.get("name") != container_name:
                continue
            for field in _OWNED_FIELDS:
                if field in container:
                    yield Finding(f"{path}.{field}", container[field])
            for place, variable in _items(container, "env", path):
                name = variable.get("name")
                if isinstance(name, str) and name.startswith(_OWNED_PREFIX):
                    yield Finding(f"{place}.name", name)
            for place, mount in _items(container, "volumeMounts", path):
                if mount.get("mountPath") == "/dev/shm":
                    yield Finding(f"{place}.mountPath", "/dev/shm")

    return check


def _unnamed_containers(template: PodTemplate) -> Iterator[Finding]:
    listed: object = template.spec.get("containers") if template.spec is not None else None
    if listed is None:
        return
    if not isinstance(listed, tuple) or len(listed) > MAX_CONTAINERS:
        yield Finding("spec.containers", listed)
        return
    for index, container in enumerate(listed):
        name = container.get("name") if isinstance(container, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= MAX_CONTAINER_NAME:
            yield Finding(f"spec.containers[{index}]", container)


def _repeated_containers(template: PodTemplate) -> Iterator[Finding]:
    seen: set[JsonValue] = set()
    for kind in ("initContainers", "containers"):
        for path, container in _items(template.spec, kind, "spec"):
            name = container.get("name")
            if isinstance(name, str):
                if name in seen:
                    yield Finding(f"{path}.name", name)
                seen.add(name)


def _template_rules(pool: str, scope: str, container: str) -> tuple[Rule, ...]:
    return (
        Rule(
            f"{pool}-template-owned-fields",
            scope,
            f"belongs to the operator (in the container `{container}`: {', '.join(_OWNED_FIELDS)}, "
            f"{_OWNED_PREFIX}* environment, /dev/shm; in the pod: restartPolicy)",
            "Remove it.",
            _owned_fields(container),
        ),
        Rule(
            f"{pool}-template-containers",
            scope,
            f"must be a list of at most {MAX_CONTAINERS} containers, each with a name of at most "
            f"{MAX_CONTAINER_NAME} characters",
            f"Write each container after `- name: `, the runtime's own as `- name: {container}`.",
            _unnamed_containers,
        ),
        Rule(
            f"{pool}-template-container-names",
            scope,
            "is the name of another container of the pod",
            "Give each container its own name.",
            _repeated_containers,
        ),
    )


CLUSTER_RULES: tuple[Rule, ...] = (
    Rule(
        "restarts-keep-checkpoints",
        "spec",
        "is required while failurePolicy.maxRestarts is above 0: a new trainer pod finds no checkpoint of the old one",
        "Name a claim, or set failurePolicy.maxRestarts to 0.",
        _restarts_keep_checkpoints,
    ),
    *_template_rules("trainer", "spec.trainer.template", TRAINER_CONTAINER),
    *_template_rules("rollout", "spec.rolloutPools[*].template", ROLLOUT_CONTAINER),
    *_template_rules("old-policy", "spec.oldPolicyPool.template", OLD_POLICY_CONTAINER),
)
