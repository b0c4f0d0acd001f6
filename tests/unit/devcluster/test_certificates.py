"""Certificates say who their holder is, in the words that Kubernetes' authorizers expect."""

from __future__ import annotations

import datetime
import ipaddress
import json
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from tools.devcluster import certificates
from tools.devcluster.layout import API_SERVER, Layout

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path, "unit")
    certificates.issue_control_plane(layout, NOW)
    certificates.issue_node(layout.node(0), NOW)
    return layout


def load(layout: Layout, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((layout.certificates / f"{name}.crt").read_bytes())


@pytest.mark.parametrize(
    ("file", "subject"),
    [
        ("admin", "O=system:masters,CN=admin"),
        ("apiserver-kubelet-client", "O=system:masters,CN=kube-apiserver-kubelet-client"),
        ("controller-manager", "CN=system:kube-controller-manager"),
        ("scheduler", "CN=system:kube-scheduler"),
        ("proxy", "CN=system:kube-proxy"),
        ("front-proxy-client", "CN=front-proxy-client"),
        ("node-0", "O=system:nodes,CN=system:node:node-0"),
        ("node-0-server", "CN=node-0"),
        ("apiserver", "CN=kube-apiserver"),
    ],
)
def test_a_subject_is_the_user_and_the_group_that_kubernetes_knows(layout: Layout, file: str, subject: str) -> None:
    parts = reversed(load(layout, file).subject.rfc4514_string().split(","))
    assert ",".join(parts) == subject


def test_all_certificates_are_signed_by_the_cluster_s_authority(layout: Layout) -> None:
    authority = load(layout, "ca").public_key()
    assert isinstance(authority, ec.EllipticCurvePublicKey)
    signed = [path for path in layout.certificates.glob("*.crt") if path.stem != "ca"]
    assert len(signed) == len(certificates.CONTROL_PLANE) + len(certificates.USERS) + 2
    for path in signed:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        authority.verify(certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256()))


def test_a_server_is_no_client_and_a_client_no_server(layout: Layout) -> None:
    def usage(name: str) -> list[x509.ObjectIdentifier]:
        return list(load(layout, name).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)

    assert usage("apiserver") == usage("node-0-server") == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert usage("admin") == usage("node-0") == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_the_api_server_answers_under_its_service_s_names_and_addresses(layout: Layout) -> None:
    names = load(layout, "apiserver").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "kubernetes.default.svc.cluster.local" in names.get_values_for_type(x509.DNSName)
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert addresses == {"127.0.0.1", "10.96.0.1", "172.30.0.2"}
    assert ipaddress.ip_address("172.30.0.2") in names.get_values_for_type(x509.IPAddress)


def test_no_one_but_the_owner_reads_a_key_or_a_kubeconfig(layout: Layout) -> None:
    private = [*layout.certificates.glob("*.key"), *layout.certificates.glob("*.kubeconfig")]
    assert len(private) > 10
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}


def test_a_kubeconfig_leads_to_the_api_server_as_its_user(layout: Layout) -> None:
    config = json.loads(layout.kubeconfig.read_text())
    assert config["clusters"][0]["cluster"]["server"] == API_SERVER
    assert config["contexts"][0]["context"]["user"] == config["users"][0]["name"] == "admin"


def test_a_second_issue_changes_nothing(layout: Layout) -> None:
    before = {path.name: path.read_bytes() for path in layout.certificates.iterdir()}
    certificates.issue_control_plane(layout, NOW + datetime.timedelta(days=1))
    certificates.issue_node(layout.node(0), NOW + datetime.timedelta(days=1))
    assert {path.name: path.read_bytes() for path in layout.certificates.iterdir()} == before
