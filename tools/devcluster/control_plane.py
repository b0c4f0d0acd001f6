"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler: processes in node 0's network namespace."""

from __future__ import annotations

import json
from pathlib import Path

from tools.devcluster import processes
from tools.devcluster.binaries import Binaries
from tools.devcluster.kubectl import Kubectl
from tools.devcluster.layout import API_ADDRESS, DOMAIN, SERVICE_NETWORK, Layout
from tools.devcluster.network import inside
from tools.devcluster.readiness import wait_for_process

_ETCD = "http://127.0.0.1:2379"
_ETCD_PEERS = "http://127.0.0.1:2380"
COMPONENTS = ("etcd", "apiserver", "controller-manager", "scheduler")

# Pods leave a lost node after seconds, not minutes: what an operator does about it can then be tested.
_TOLERATION_SECONDS = 3
_NODE_GRACE_SECONDS = 8

# The request and answer of every write to our own objects, one line for any other write, nothing for reads.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {
            "level": "RequestResponse",
            "verbs": ["create", "update", "patch", "delete", "deletecollection"],
            "resources": [{"group": "rljob.dev"}],
        },
        {"level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"]},
        {"level": "None"},
    ],
}


def start_api_server(layout: Layout, binaries: Binaries) -> None:
    """Start etcd and the API server beside each other; returns at once."""
    _start(layout, "etcd", binaries["etcd"], _etcd_flags(layout))
    _start(layout, "apiserver", binaries["kube-apiserver"], _api_server_flags(layout))


def wait_for_api_server(layout: Layout, kubectl: Kubectl) -> None:
    wait_for_process(layout, "apiserver", "the API server", kubectl.api_server_is_ready, timeout_seconds=60)


def start_controllers(layout: Layout, binaries: Binaries) -> None:
    _start(layout, "controller-manager", binaries["kube-controller-manager"], _controller_manager_flags(layout))
    _start(layout, "scheduler", binaries["kube-scheduler"], _scheduler_flags(layout))


def _start(layout: Layout, name: str, binary: Path, flags: dict[str, str | Path]) -> None:
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    processes.start(layout, name, [*inside(layout.node(0)), binary, *arguments])


def _etcd_flags(layout: Layout) -> dict[str, str | Path]:
    return {
        "name": "dev",
        "data-dir": layout.state / "etcd",
        "unsafe-no-fsync": "true",  # a cluster that does not outlive its machine
        "listen-client-urls": _ETCD,
        "advertise-client-urls": _ETCD,
        "listen-peer-urls": _ETCD_PEERS,
        "initial-advertise-peer-urls": _ETCD_PEERS,
        "initial-cluster": f"dev={_ETCD_PEERS}",
        "log-level": "warn",
    }


def _api_server_flags(layout: Layout) -> dict[str, str | Path]:
    pki = layout.certificates
    policy = layout.state / "audit-policy.json"
    policy.write_text(json.dumps(AUDIT_POLICY, indent=1))
    return {
        "etcd-servers": _ETCD,
        "advertise-address": API_ADDRESS,
        "secure-port": "6443",
        "service-cluster-ip-range": SERVICE_NETWORK,
        "cert-dir": layout.state / "apiserver",
        "tls-cert-file": pki / "apiserver.crt",
        "tls-private-key-file": pki / "apiserver.key",
        "client-ca-file": pki / "ca.crt",
        "authorization-mode": "Node,RBAC",
        # Clusters with OwnerReferencesPermissionEnforcement (OpenShift) refuse owner references whose `finalizers`
        # subresource the writer may not update: the operator's RBAC is tested against it.
        "enable-admission-plugins": "NodeRestriction,OwnerReferencesPermissionEnforcement",
        "allow-privileged": "true",
        "service-account-issuer": f"https://kubernetes.default.svc.{DOMAIN}",
        "service-account-key-file": pki / "service-accounts.pub",
        "service-account-signing-key-file": pki / "service-accounts.key",
        "kubelet-client-certificate": pki / "apiserver-kubelet-client.crt",
        "kubelet-client-key": pki / "apiserver-kubelet-client.key",
        "kubelet-certificate-authority": pki / "ca.crt",
        "kubelet-preferred-address-types": "InternalIP",
        # Without a front proxy's authority, scheduler and controller manager log an error a minute.
        "requestheader-client-ca-file": pki / "ca.crt",
        "requestheader-allowed-names": "front-proxy-client",
        "requestheader-username-headers": "X-Remote-User",
        "requestheader-group-headers": "X-Remote-Group",
        "requestheader-extra-headers-prefix": "X-Remote-Extra-",
        "default-not-ready-toleration-seconds": str(_TOLERATION_SECONDS),
        "default-unreachable-toleration-seconds": str(_TOLERATION_SECONDS),
        "audit-policy-file": policy,
        "audit-log-path": layout.audit_log,
        "audit-log-mode": "blocking",  # a line is there when its request has been answered
        "profiling": "false",
    }


def _controller_manager_flags(layout: Layout) -> dict[str, str | Path]:
    pki = layout.certificates
    return {
        **_client_flags(layout, "controller-manager"),
        # Its own user may not do what its controllers do: without this the not-ready taint never goes away.
        "use-service-account-credentials": "true",
        "service-account-private-key-file": pki / "service-accounts.key",
        "root-ca-file": pki / "ca.crt",
        "cluster-signing-cert-file": pki / "ca.crt",
        "cluster-signing-key-file": pki / "ca.key",
        "node-monitor-period": "1s",
        "node-monitor-grace-period": f"{_NODE_GRACE_SECONDS}s",
    }


def _scheduler_flags(layout: Layout) -> dict[str, str | Path]:
    return _client_flags(layout, "scheduler")


def _client_flags(layout: Layout, name: str) -> dict[str, str | Path]:
    kubeconfig = layout.kubeconfig_of(name)
    return {
        "kubeconfig": kubeconfig,
        "authentication-kubeconfig": kubeconfig,
        "authorization-kubeconfig": kubeconfig,
        # The defaults (20 requests a second) make the start 4.5 s slower and cap pods at 20 a second.
        "kube-api-qps": "300",
        "kube-api-burst": "500",
        "leader-elect": "false",
        "bind-address": "127.0.0.1",
        "cert-dir": layout.state / name,
        "profiling": "false",
    }
