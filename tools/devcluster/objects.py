"""What an admin provides on a cluster: GPUs that are not there, and volumes with a default StorageClass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

from tools.devcluster.kubectl import Kubectl
from tools.devcluster.layout import GPUS_PER_NODE, Layout, Node

STORAGE_CLASS = "premade"
NUM_VOLUMES = 40
VOLUME_SIZE = "20Gi"  # nominal: a folder has no quota


def advertise_gpus(node: Node, kubectl: Kubectl) -> None:
    """The kubelet keeps them over its own updates and restarts; pods that ask for them get no device."""
    gpus = {"nvidia.com/gpu": str(GPUS_PER_NODE)}
    patch = json.dumps({"status": {"capacity": gpus, "allocatable": gpus}})
    kubectl("patch", "node", node.name, "--subresource=status", "--type=merge", f"--patch={patch}")


def storage_class() -> dict[str, Any]:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": STORAGE_CLASS, "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "Immediate",
        "reclaimPolicy": "Retain",
    }


def volume(layout: Layout, index: int) -> dict[str, Any]:
    """A folder of this machine; all nodes share it, so any access mode is honest."""
    name = f"premade-{index}"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": VOLUME_SIZE},
            "accessModes": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": STORAGE_CLASS,
            "hostPath": {"path": str(layout.volumes / name), "type": "Directory"},
        },
    }


def provide_volumes(layout: Layout, kubectl: Kubectl) -> None:
    """Make every volume that is not there, and make those anew whose claim is gone."""
    phases = {item["metadata"]["name"]: _phase(item) for item in kubectl.get("persistentvolumes")["items"]}
    released = [
        name for name, phase in phases.items() if name.startswith("premade-") and phase in {"Released", "Failed"}
    ]
    if released:
        kubectl("delete", "persistentvolume", *released)
    for name in released:
        shutil.rmtree(layout.volumes / name, ignore_errors=True)
    kept = phases.keys() - set(released)
    wanted = [volume(layout, index) for index in range(NUM_VOLUMES)]
    absent = [item for item in wanted if item["metadata"]["name"] not in kept]
    for item in absent:
        folder = layout.volumes / item["metadata"]["name"]
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # fsGroup does not reach a hostPath volume, and pods are not root
    kubectl.apply([storage_class(), *absent])


def _phase(item: Mapping[str, Any]) -> str:
    return str(item.get("status", {}).get("phase", ""))
