"""The dev cluster is a real Kubernetes: what an operator and its pods need works, under the restricted level."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import rljob_api
from tests.cluster.cluster import (
    BUSYBOX_IMAGE,
    NATS_IMAGE,
    OPERATOR_IMAGE,
    RUNTIME_IMAGE,
    Cluster,
    KubectlError,
    Namespace,
    restricted_pod,
    restricted_pod_spec,
)

pytestmark = pytest.mark.timeout(180)

PYTHON = "/opt/rljob/bin/python"
SLEEP = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.2; done"]


def audit_lines(cluster: Cluster, marker: str) -> list[dict[str, Any]]:
    """Lines about an object named `marker`."""
    assert cluster.layout is not None
    lines = (json.loads(line) for line in cluster.layout.audit_log.read_text().splitlines())
    return [line for line in lines if line.get("objectRef", {}).get("name") == marker]


def test_nodes_are_ready_and_run_the_pinned_version(dev_cluster: Cluster) -> None:
    nodes = dev_cluster.get("nodes")["items"]
    assert nodes
    for node in nodes:
        conditions = {item["type"]: item["status"] for item in node["status"]["conditions"]}
        assert conditions["Ready"] == "True"
        assert node["status"]["nodeInfo"]["kubeletVersion"] == "v1.36.3"


def test_the_api_server_is_reached_from_this_process(dev_cluster: Cluster) -> None:
    with socket.create_connection(("172.30.0.2", 6443), timeout=5):
        pass


def test_the_restricted_level_refuses_a_host_path(namespace: Namespace) -> None:
    volume = {"name": "host", "hostPath": {"path": "/"}}
    with pytest.raises(KubectlError, match="violates PodSecurity"):
        namespace.apply(restricted_pod("host", BUSYBOX_IMAGE, SLEEP, volumes=[volume]))
    namespace.apply(restricted_pod("host", BUSYBOX_IMAGE, SLEEP))


def test_the_runtime_image_imports_torch_vllm_and_the_project_as_nobody(namespace: Namespace) -> None:
    code = (
        "import os, torch, vllm, rljob_runtime, rljob_protocol, rljob_api, importlib.metadata as m\n"
        "print(os.getuid(), torch.ones(2).sum().item(), vllm.__version__, m.version('rljob'), rljob_api.__file__)"
    )
    log = namespace.run_to_end(restricted_pod("imports", RUNTIME_IMAGE, [PYTHON, "-c", code]), timeout_seconds=120)
    uid, total, _, version, path = log.splitlines()[-1].split()
    assert (uid, total, version) == ("65534", "2.0", "0.1.0")
    assert path == "/opt/rljob/lib/python3.11/site-packages/rljob_api/__init__.py"


def test_the_project_in_the_image_is_this_checkout(namespace: Namespace) -> None:
    code = """
import hashlib, pathlib, rljob_api
for path in sorted(pathlib.Path(rljob_api.__file__).parent.glob("*.py")):
    print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
"""
    log = namespace.run_to_end(restricted_pod("checkout", RUNTIME_IMAGE, [PYTHON, "-c", code]))
    here = sorted(Path(rljob_api.__file__).parent.glob("*.py"))
    assert log.splitlines() == [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in here]


def test_the_images_entry_points_are_the_command_line(namespace: Namespace) -> None:
    pod = restricted_pod("help", RUNTIME_IMAGE, [])
    del pod["spec"]["containers"][0]["command"]
    pod["spec"]["containers"][0]["args"] = ["--help"]
    assert "usage: rljob" in namespace.run_to_end(pod)
    assert OPERATOR_IMAGE in node_images(namespace.cluster)


def node_images(cluster: Cluster) -> set[str]:
    nodes = cluster.get("nodes")["items"]
    return {name for node in nodes for image in node["status"]["images"] for name in image.get("names") or []}


def test_nats_runs_from_its_image_and_is_reached_by_a_service_name(namespace: Namespace) -> None:
    command = ["/bin/nats-server", "-js", "-sd", "/tmp"]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "nats"},
        "spec": {"selector": {"pod": "nats"}, "ports": [{"port": 4222}]},
    }
    namespace.apply(restricted_pod("nats", NATS_IMAGE, command), service)
    namespace.wait_for_phase("nats", "Running")
    code = """
import asyncio, nats
async def main():
    client = await nats.connect("nats://nats:4222", connect_timeout=5)
    stream = client.jetstream()
    await stream.add_stream(name="s", subjects=["s"])
    print("stored", (await stream.publish("s", b"x")).seq)
    await client.close()
asyncio.run(main())
"""
    assert namespace.run_to_end(restricted_pod("client", RUNTIME_IMAGE, [PYTHON, "-c", code])) == "stored 1\n"


def test_logs_and_exec_work_and_pass_the_exit_code_on(namespace: Namespace) -> None:
    namespace.apply(restricted_pod("shell", BUSYBOX_IMAGE, ["sh", "-c", "echo hello; sleep 60"]))
    namespace.wait_for_phase("shell", "Running")
    assert namespace.kubectl("logs", "shell") == "hello\n"
    assert namespace.kubectl("exec", "shell", "--", "id", "-u") == "65534\n"
    with pytest.raises(KubectlError, match="exit code 7"):
        namespace.kubectl("exec", "shell", "--", "sh", "-c", "exit 7")


def test_names_of_services_resolve_and_absent_ones_do_not(namespace: Namespace) -> None:
    code = (
        "import socket\n"
        "print(socket.gethostbyname('kubernetes.default'), socket.gethostbyname('kubernetes.default.svc.cluster.local'))\n"
        "try: socket.gethostbyname('absent.default.svc.cluster.local')\n"
        "except socket.gaierror: print('absent')"
    )
    log = namespace.run_to_end(restricted_pod("dns", RUNTIME_IMAGE, [PYTHON, "-c", code]))
    assert log.splitlines() == ["10.96.0.1 10.96.0.1", "absent"]


def test_a_claim_is_bound_by_the_default_class_and_keeps_what_nobody_writes(namespace: Namespace) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    namespace.apply(claim)
    namespace.cluster.wait_for(
        "the claim is bound", lambda: namespace.get("persistentvolumeclaim", "data")["status"].get("phase") == "Bound"
    )
    mounted: dict[str, Any] = {
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    namespace.run_to_end(restricted_pod("writer", BUSYBOX_IMAGE, ["sh", "-c", "echo kept > /data/f"], **mounted))
    mounted = {
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    log = namespace.run_to_end(restricted_pod("reader", BUSYBOX_IMAGE, ["cat", "/data/f"], **mounted))
    assert log == "kept\n"


def test_gpus_are_scheduled_by_count(namespace: Namespace) -> None:
    node = namespace.cluster.get("nodes")["items"][0]
    assert node["status"]["allocatable"]["nvidia.com/gpu"] == "8"
    one, nine = ({"limits": {"nvidia.com/gpu": number}} for number in ("1", "9"))
    namespace.apply(
        restricted_pod("fits", BUSYBOX_IMAGE, SLEEP, resources=one),
        restricted_pod("does-not", BUSYBOX_IMAGE, SLEEP, resources=nine),
    )
    namespace.wait_for_phase("fits", "Running")

    def refused() -> str:
        conditions = namespace.get("pod", "does-not")["status"].get("conditions", [])
        return "".join(item.get("message", "") for item in conditions if item["type"] == "PodScheduled")

    assert "Insufficient nvidia.com/gpu" in namespace.cluster.wait_for("the scheduler's word", refused)


def test_ranks_of_an_indexed_job_find_each_other_by_a_headless_service(namespace: Namespace) -> None:
    code = """
import os, socket, time
rank, deadline = int(os.environ["JOB_COMPLETION_INDEX"]), time.monotonic() + 30
if rank == 0:
    server = socket.create_server(("", 29500))
    server.settimeout(30)
    print("met", sorted(int(server.accept()[0].recv(8)) for _ in range(2)))
else:
    while True:
        try:
            socket.create_connection(("ranks-0.ranks", 29500), timeout=5).sendall(str(rank).encode())
            break
        except OSError:
            assert time.monotonic() < deadline, "rank 0 was not found"
            time.sleep(0.1)
"""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "ranks"},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": "ranks"}},
    }
    template = {"spec": {**restricted_pod_spec(RUNTIME_IMAGE, [PYTHON, "-c", code]), "subdomain": "ranks"}}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "ranks"},
        "spec": {
            "completionMode": "Indexed",
            "completions": 3,
            "parallelism": 3,
            "backoffLimit": 0,
            "template": template,
        },
    }
    namespace.apply(service, job)

    def ended() -> Any:
        status = namespace.get("job", "ranks")["status"]
        return [item["type"] for item in status.get("conditions", []) if item["type"] in ("Complete", "Failed")]

    assert namespace.cluster.wait_for("the job ends", ended, timeout_seconds=90) == ["Complete"]
    logs = namespace.kubectl("logs", "-l", "batch.kubernetes.io/job-completion-index=0")
    assert logs == "met [1, 2]\n"


def test_the_audit_log_has_bodies_of_our_objects_one_line_of_other_writes_and_no_reads(
    dev_cluster: Cluster, namespace: Namespace
) -> None:
    marker = f"audit-{time.time_ns()}"
    dev_cluster.apply(custom_resource_definition())
    dev_cluster.kubectl("wait", "--for=condition=Established", "crd/auditprobes.rljob.dev", "--timeout=30s")
    probe = {"apiVersion": "rljob.dev/v1", "kind": "AuditProbe", "metadata": {"name": marker}, "spec": {"secret": 7}}
    namespace.apply(probe)
    namespace.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": marker}, "data": {"a": "b"}})
    namespace.kubectl("get", "configmap", marker)

    lines = {line["objectRef"]["resource"]: line for line in audit_lines(dev_cluster, marker)}
    ours, other = lines["auditprobes"], lines["configmaps"]
    assert (ours["level"], ours["verb"], ours["requestObject"]["spec"]) == ("RequestResponse", "create", {"secret": 7})
    assert ours["responseObject"]["metadata"]["uid"]
    assert (other["level"], other["verb"], other["user"]["username"]) == ("Metadata", "create", "admin")
    assert "requestObject" not in other
    assert {line["verb"] for line in audit_lines(dev_cluster, marker)} == {"create"}


def custom_resource_definition() -> dict[str, Any]:
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "auditprobes.rljob.dev"},
        "spec": {
            "group": "rljob.dev",
            "scope": "Namespaced",
            "names": {"plural": "auditprobes", "singular": "auditprobe", "kind": "AuditProbe"},
            "versions": [version],
        },
    }


def test_owning_an_object_that_blocks_needs_the_right_to_its_owner_s_finalizers(namespace: Namespace) -> None:
    """OwnerReferencesPermissionEnforcement: what OpenShift has on, and kind and minikube have not."""
    namespace.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner"}})
    namespace.kubectl("create", "role", "maker", "--verb=create,get,patch", "--resource=configmaps")
    namespace.kubectl("create", "rolebinding", "maker", "--role=maker", f"--serviceaccount={namespace.name}:default")
    reference = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": "owner",
        "uid": namespace.get("configmap", "owner")["metadata"]["uid"],
        "blockOwnerDeletion": True,
    }
    child = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "child", "ownerReferences": [reference]}}
    impersonated = f"--as=system:serviceaccount:{namespace.name}:default"

    def create() -> str:
        return namespace.kubectl("create", impersonated, "--filename=-", text_input=json.dumps(child))

    with pytest.raises(KubectlError, match="cannot set blockOwnerDeletion"):
        create()
    namespace.kubectl("create", "role", "finalizer", "--verb=update", "--resource=configmaps/finalizers")
    namespace.kubectl("create", "rolebinding", "fin", "--role=finalizer", f"--serviceaccount={namespace.name}:default")
    assert namespace.cluster.wait_for("the new right counts", create)
