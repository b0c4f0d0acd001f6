"""A cluster as the tests see it, and the pods they make on it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.devcluster.layout import Layout

RUNTIME_IMAGE = "localhost/rljob-runtime:dev"
OPERATOR_IMAGE = "localhost/rljob-operator:dev"
BUSYBOX_IMAGE = "localhost/busybox:dev"
NATS_IMAGE = "localhost/nats:dev"

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
_NOBODY = {"runAsNonRoot": True, "runAsUser": 65534, "fsGroup": 65534, "seccompProfile": {"type": "RuntimeDefault"}}
_CONFINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


class KubectlError(Exception):
    """kubectl ended with another code than 0; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A reachable cluster. `layout` is None when it is not our dev cluster but one given by KUBECONFIG."""

    kubeconfig: Path
    kubectl_binary: str
    search_path: str
    layout: Layout | None

    def kubectl(self, *arguments: str, text_input: str | None = None, timeout_seconds: float = 60) -> str:
        command = [self.kubectl_binary, f"--kubeconfig={self.kubeconfig}", *arguments]
        result = subprocess.run(
            command, input=text_input, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
        if result.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {result.stderr.strip() or result.stdout.strip()}")
        return result.stdout

    def get(self, *arguments: str) -> Any:
        """The object, or the list under `items`."""
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def apply(self, *objects: dict[str, Any]) -> None:
        manifest = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--filename=-", text_input=json.dumps(manifest))

    def wait_for(self, what: str, holds: Callable[[], Any], *, timeout_seconds: float = 60) -> Any:
        """The first truthy answer of `holds`; a kubectl error counts as not yet."""
        deadline = time.monotonic() + timeout_seconds
        last: object = None
        while time.monotonic() < deadline:
            try:
                last = holds()
            except KubectlError as error:
                last = error
            else:
                if last:
                    return last
            time.sleep(0.1)
        raise AssertionError(f"{what}: not within {timeout_seconds:g} s; last answer: {last}")


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace of one test, under the restricted Pod Security level; kubectl in it."""

    cluster: Cluster
    name: str

    def kubectl(self, *arguments: str, text_input: str | None = None, timeout_seconds: float = 60) -> str:
        where = f"--namespace={self.name}"
        return self.cluster.kubectl(where, *arguments, text_input=text_input, timeout_seconds=timeout_seconds)

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def apply(self, *objects: dict[str, Any]) -> None:
        manifest = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--filename=-", text_input=json.dumps(manifest))

    def wait_for_phase(self, pod: str, *phases: str, timeout_seconds: float = 60) -> dict[str, Any]:
        def reached() -> Any:
            found = self.get("pod", pod)
            return found if found["status"].get("phase") in phases else None

        found: dict[str, Any] = self.cluster.wait_for(f"pod {pod} {phases}", reached, timeout_seconds=timeout_seconds)
        return found

    def run_to_end(self, pod: dict[str, Any], *, timeout_seconds: float = 60) -> str:
        """Apply the pod and return its log; a pod that fails is an error with its log."""
        name = pod["metadata"]["name"]
        self.apply(pod)
        found = self.wait_for_phase(name, "Succeeded", "Failed", timeout_seconds=timeout_seconds)
        log = self.kubectl("logs", name)
        assert found["status"]["phase"] == "Succeeded", f"{found['status']}\n{log}"
        return log


def restricted_pod_spec(image: str, command: list[str], **container: Any) -> dict[str, Any]:
    """A pod spec that the restricted level admits: nobody, read-only root, a scratch folder at /tmp."""
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 2,
        "securityContext": _NOBODY,
        "volumes": [{"name": "tmp", "emptyDir": {}}, *container.pop("volumes", [])],
        "containers": [
            {
                "name": "main",
                "image": image,
                "command": command,
                "securityContext": _CONFINED,
                "env": [{"name": "HOME", "value": "/tmp"}, *container.pop("env", [])],
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, *container.pop("volumeMounts", [])],
                **container,
            }
        ],
    }


def restricted_pod(name: str, image: str, command: list[str], **container: Any) -> dict[str, Any]:
    spec = restricted_pod_spec(image, command, **container)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"pod": name}}, "spec": spec}
