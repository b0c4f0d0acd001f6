"""The cluster's DNS: CoreDNS as a plain process on node 0's address, where the kubelets point their pods."""

from __future__ import annotations

from tools.devcluster import processes
from tools.devcluster.binaries import Binaries
from tools.devcluster.layout import API_ADDRESS, DOMAIN, Layout
from tools.devcluster.network import inside


def start(layout: Layout, binaries: Binaries) -> None:
    config = layout.state / "Corefile"
    config.write_text(corefile(layout))
    processes.start(layout, "dns", [*inside(layout.node(0)), binaries["coredns"], "-conf", config])


def corefile(layout: Layout) -> str:
    """No cache, and answers that live one second: a rank that looks up its peer before its record exists is not told
    for long that there is none. in-addr.arpa, because torch looks up its peers' names and warns when it cannot."""
    zones = f"{DOMAIN} in-addr.arpa"
    return f"""{DOMAIN}:53 in-addr.arpa:53 {{
  bind {API_ADDRESS}
  errors
  ready 127.0.0.1:8181
  kubernetes {zones} {{
    kubeconfig {layout.kubeconfig_of("dns")}
    ttl 1
  }}
}}
"""
