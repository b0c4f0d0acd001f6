"""The pod template of a runtime pod: the user's, with what the operator owns put in, and safe defaults under both.

Owned: the runtime container's command, probes, RLJOB_* variables and /dev/shm; restartPolicy. Default, where the user says
nothing: the image, a writable home in a read-only image, the restricted security context, no API token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rljob_api import names
from rljob_api.pools import PodTemplate
from rljob_operator.core.builders.config import CONFIG_KEY

SCRATCH = "/var/lib/rljob"
CONFIG_FOLDER = "/etc/rljob"
CHECKPOINT_FOLDER = "/var/lib/rljob-checkpoints"
WEIGHTS_FOLDER = "/var/lib/rljob-weights"
CREDENTIALS_FOLDER = "/etc/rljob-nats"
CREDENTIALS_KEY = "nats.creds"

_NOBODY = 65534
_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": _NOBODY,
    "runAsGroup": _NOBODY,
    "fsGroup": _NOBODY,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the operator puts into the runtime container and its pod."""

    container: str
    image: str
    image_pull_policy: str
    command: tuple[str, ...]
    config_map: str
    restart_policy: str
    grace_seconds: int
    environment: tuple[Mapping[str, Any], ...]
    volumes: tuple[Mapping[str, Any], ...] = ()
    mounts: tuple[Mapping[str, Any], ...] = ()
    probes: Mapping[str, Any] | None = None
    pod: Mapping[str, Any] | None = None
    """Further fields of the pod spec that the operator owns."""


def pod_template(
    user: PodTemplate | None, runtime: Runtime, labels: Mapping[str, str], annotations: Mapping[str, str]
) -> dict[str, Any]:
    """The template; the user's objects are not changed."""
    own = _plain(user.metadata) if user is not None and user.metadata is not None else {}
    spec = _plain(user.spec) if user is not None and user.spec is not None else {}
    containers = list(spec.get("containers") or [])
    if not any(container.get("name") == runtime.container for container in containers):
        containers.append({"name": runtime.container})
    spec["containers"] = [_container(item, runtime) for item in containers]
    if spec.get("initContainers"):
        spec["initContainers"] = [_container(item, runtime) for item in spec["initContainers"]]
    spec["volumes"] = [*(spec.get("volumes") or []), *_volumes(runtime)]
    spec["securityContext"] = {**_POD_SECURITY, **(spec.get("securityContext") or {})}
    spec.setdefault("automountServiceAccountToken", False)
    spec.setdefault("enableServiceLinks", False)
    # The kernel keeps a SIGTERM from process 1 until it has a handler: a pod deleted in its first moments would live to
    # the end of its grace period. So the sandbox's own process is number 1.
    spec.setdefault("shareProcessNamespace", True)
    spec.setdefault("terminationGracePeriodSeconds", runtime.grace_seconds)
    spec["restartPolicy"] = runtime.restart_policy
    spec.update(runtime.pod or {})
    return {
        "metadata": {
            **own,
            "labels": {**(own.get("labels") or {}), **labels},
            "annotations": {**(own.get("annotations") or {}), **annotations},
        },
        "spec": spec,
    }


def environment(variables: Mapping[str, str]) -> list[dict[str, Any]]:
    """Variables with a value."""
    return [{"name": name, "value": value} for name, value in variables.items()]


def from_field(name: str, path: str) -> dict[str, Any]:
    """A variable that the kubelet fills in from the pod's own metadata."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def messaging(url: str, credentials_secret: str | None) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
    """(environment, volumes, mounts) by which a pod reaches NATS."""
    variables = environment({names.ENV_NATS_URL: url})
    if credentials_secret is None:
        return variables, [], []
    volume = {"name": "rljob-nats", "secret": {"secretName": credentials_secret, "defaultMode": 0o440}}
    mount = {"name": "rljob-nats", "mountPath": CREDENTIALS_FOLDER, "readOnly": True}
    variables += environment({names.ENV_NATS_CREDENTIALS: f"{CREDENTIALS_FOLDER}/{CREDENTIALS_KEY}"})
    return variables, [volume], [mount]


def claim(name: str, claim_name: str, mount_path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(volume, mount) of a PersistentVolumeClaim."""
    volume = {"name": name, "persistentVolumeClaim": {"claimName": claim_name}}
    return volume, {"name": name, "mountPath": mount_path}


def _container(given: Mapping[str, Any], runtime: Runtime) -> dict[str, Any]:
    # Every container of the pod gets the restricted defaults, or a sidecar would keep the whole pod out.
    security = {**_CONTAINER_SECURITY, **(given.get("securityContext") or {})}
    if given.get("name") != runtime.container:
        return {**given, "securityContext": security}
    base = environment({"HOME": SCRATCH, "TMPDIR": "/tmp", "PYTHONUNBUFFERED": "1"})
    if _asks_for_gpu(given):
        base += environment({"NCCL_DEBUG": "WARN"})  # else a collective that fails says nothing of the network
    owned = [
        *environment(
            {
                names.ENV_CONFIG: f"{CONFIG_FOLDER}/{CONFIG_KEY}",
                names.ENV_CACHE_DIR: f"{SCRATCH}/cache",
            }
        ),
        *runtime.environment,
        *environment({names.ENV_ACCELERATOR: "cuda"} if _asks_for_gpu(given) else {}),
    ]
    return {
        "image": runtime.image,
        "imagePullPolicy": runtime.image_pull_policy,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **given,
        "command": list(runtime.command),
        "env": _merged(base, given.get("env") or (), owned),
        "volumeMounts": [*(given.get("volumeMounts") or []), *_mounts(runtime)],
        "securityContext": security,
        **(runtime.probes or {}),
    }


def _asks_for_gpu(container: Mapping[str, Any]) -> bool:
    resources = container.get("resources") or {}
    return any("nvidia.com/gpu" in (resources.get(kind) or {}) for kind in ("limits", "requests"))


def _merged(*lists: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Variables of later lists replace those of earlier ones, in their place: `$(NAME)` refers to earlier ones only."""
    found: dict[str, dict[str, Any]] = {}
    for variables in lists:
        for variable in variables:
            found[str(variable.get("name"))] = dict(variable)
    return list(found.values())


def _volumes(runtime: Runtime) -> list[Mapping[str, Any]]:
    return [
        {"name": "rljob-config", "configMap": {"name": runtime.config_map}},
        {"name": "rljob-scratch", "emptyDir": {}},
        {"name": "rljob-tmp", "emptyDir": {}},
        # torch's workers and vLLM's processes share tensors there; a container's own default is 64 MiB.
        {"name": "rljob-shm", "emptyDir": {"medium": "Memory"}},
        *runtime.volumes,
    ]


def _mounts(runtime: Runtime) -> list[Mapping[str, Any]]:
    return [
        {"name": "rljob-config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "rljob-scratch", "mountPath": SCRATCH},
        {"name": "rljob-tmp", "mountPath": "/tmp"},
        {"name": "rljob-shm", "mountPath": "/dev/shm"},
        *runtime.mounts,
    ]


def _plain(value: Any) -> Any:
    """Frozen JSON as dicts and lists of our own."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
