"""The kubelet and kube-proxy of a node."""

from __future__ import annotations

import json

from tools.devcluster import processes
from tools.devcluster.binaries import Binaries
from tools.devcluster.layout import API_ADDRESS, DOMAIN, POD_NETWORK, Node
from tools.devcluster.mounts import inside_node


def start(node: Node, binaries: Binaries) -> None:
    """Start both; returns at once."""
    _start_kubelet(node, binaries)
    _start_proxy(node, binaries)


def _start_kubelet(node: Node, binaries: Binaries) -> None:
    # For pods that use the node's resolver: fail at once instead of hanging.
    (node.folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    config = node.folder / "kubelet.json"
    config.write_text(json.dumps(_kubelet_configuration(node), indent=1))
    root = node.folder / "kubelet"
    command = [
        *inside_node(node),
        binaries["kubelet"],
        f"--config={config}",
        f"--kubeconfig={node.layout.kubeconfig_of(node.name)}",
        f"--root-dir={root}",
        f"--cert-dir={root / 'pki'}",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
        f"--containerd={node.containerd_socket}",
    ]
    processes.start(node.layout, node.process("kubelet"), command)


def _kubelet_configuration(node: Node) -> dict[str, object]:
    pki = node.layout.certificates
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": node.cgroup,
        "containerRuntimeEndpoint": f"unix://{node.containerd_socket}",
        "address": node.address,
        "tlsCertFile": str(pki / f"{node.name}-server.crt"),
        "tlsPrivateKeyFile": str(pki / f"{node.name}-server.key"),
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "readOnlyPort": 0,
        "healthzBindAddress": "127.0.0.1",
        "clusterDNS": [API_ADDRESS],  # the DNS server is a process on node 0
        "clusterDomain": DOMAIN,
        "resolvConf": str(node.folder / "resolv.conf"),
        "podLogsDir": str(node.folder / "pod-logs"),
        "volumePluginDir": str(node.folder / "volume-plugins"),
        # Without CAP_SYS_RESOURCE neither a negative score nor more files can be had.
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        "failSwapOn": False,
        # Imported images cannot be pulled again: never collect them.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1Gi", "imagefs.available": "1Gi"},
        "serializeImagePulls": False,
        # A lost node is noticed within seconds.
        "nodeStatusUpdateFrequency": "2s",
        "nodeLeaseDurationSeconds": 8,
    }


def _start_proxy(node: Node, binaries: Binaries) -> None:
    configuration = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(node.layout.kubeconfig_of("proxy"))},
        "hostnameOverride": node.name,
        "bindAddress": node.address,
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "clusterCIDR": POD_NETWORK,
        "nodePortAddresses": ["primary"],
        # These sysctls are not writable in a network namespace.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
    config = node.folder / "kube-proxy.json"
    config.write_text(json.dumps(configuration, indent=1))
    command = [*inside_node(node), binaries["kube-proxy"], f"--config={config}"]
    processes.start(node.layout, node.process("proxy"), command)
