"""One certificate authority per cluster, and who each certificate says its holder is.

Kubernetes knows users and groups by a client certificate's CN and O; the subjects below are those that the built-in
RBAC rules and the Node authorizer expect.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tools.devcluster.layout import API_ADDRESS, API_SERVER, DOMAIN, KUBERNETES_SERVICE_ADDRESS, Layout, Node

_LIFETIME = datetime.timedelta(days=365)
_CLOCK_SKEW = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Subject:
    """A certificate to be: a client (no hosts) or a server under `hosts` (names and addresses)."""

    file: str
    common_name: str
    organization: str = ""
    hosts: tuple[str, ...] = ()


CONTROL_PLANE = (
    Subject(
        "apiserver",
        "kube-apiserver",
        hosts=(
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            f"kubernetes.default.svc.{DOMAIN}",
            "localhost",
            "127.0.0.1",
            KUBERNETES_SERVICE_ADDRESS,
            API_ADDRESS,
        ),
    ),
    Subject("apiserver-kubelet-client", "kube-apiserver-kubelet-client", "system:masters"),
    Subject("front-proxy-client", "front-proxy-client"),
)
# Each of these gets a kubeconfig of its own.
USERS = (
    Subject("admin", "admin", "system:masters"),
    Subject("controller-manager", "system:kube-controller-manager"),
    Subject("scheduler", "system:kube-scheduler"),
    Subject("proxy", "system:kube-proxy"),
    Subject("dns", "dns", "system:masters"),
)


def node_subjects(node: Node) -> tuple[Subject, Subject]:
    """The kubelet as a client (known to the Node authorizer by this name and group) and as a server."""
    return (
        Subject(node.name, f"system:node:{node.name}", "system:nodes"),
        Subject(f"{node.name}-server", node.name, hosts=(node.name, node.address)),
    )


class Authority:
    """The cluster's certificate authority; its key lies beside what it signs, readable by root only."""

    def __init__(self, folder: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._folder = folder
        self._key = key
        self._certificate = certificate

    @classmethod
    def open(cls, folder: Path, now: datetime.datetime) -> Authority:
        """Load it, or make it."""
        key_path, certificate_path = folder / "ca.key", folder / "ca.crt"
        if certificate_path.exists():
            key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
            assert isinstance(key, ec.EllipticCurvePrivateKey), f"{key_path} is not ours"
            return cls(folder, key, x509.load_pem_x509_certificate(certificate_path.read_bytes()))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rljob-dev-ca")])
        certificate = (
            _builder(name, name, key.public_key(), now)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        _write_private(key_path, key)
        certificate_path.write_bytes(_pem(certificate))
        return cls(folder, key, certificate)

    def issue(self, subject: Subject, now: datetime.datetime) -> None:
        """Write FILE.crt and FILE.key, unless they are there."""
        certificate_path = self._folder / f"{subject.file}.crt"
        if certificate_path.exists():
            return
        key = ec.generate_private_key(ec.SECP256R1())
        _write_private(self._folder / f"{subject.file}.key", key)
        certificate_path.write_bytes(_pem(self.sign(subject, key.public_key(), now)))

    def sign(self, subject: Subject, public_key: ec.EllipticCurvePublicKey, now: datetime.datetime) -> x509.Certificate:
        usage = ExtendedKeyUsageOID.SERVER_AUTH if subject.hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(_name(subject), self._certificate.subject, public_key, now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if subject.hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in subject.hosts])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def issue_control_plane(layout: Layout, now: datetime.datetime) -> None:
    """Everything that exists once per cluster: the authority, the key of service account tokens, all users."""
    folder = layout.certificates
    authority = Authority.open(folder, now)
    for subject in CONTROL_PLANE + USERS:
        authority.issue(subject, now)
    for user in USERS:
        _write_kubeconfig(layout, user.file)
    if not (folder / "service-accounts.pub").exists():
        key = ec.generate_private_key(ec.SECP256R1())
        _write_private(folder / "service-accounts.key", key)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / "service-accounts.pub").write_bytes(public)


def issue_node(node: Node, now: datetime.datetime) -> None:
    authority = Authority.open(node.layout.certificates, now)
    for subject in node_subjects(node):
        authority.issue(subject, now)
    _write_kubeconfig(node.layout, node.name)


def _write_kubeconfig(layout: Layout, user: str) -> None:
    def data(name: str) -> str:
        return b64encode((layout.certificates / name).read_bytes()).decode()

    context = {"name": "rljob-dev", "context": {"cluster": "rljob-dev", "user": user}}
    cluster = {"server": API_SERVER, "certificate-authority-data": data("ca.crt")}
    identity = {"client-certificate-data": data(f"{user}.crt"), "client-key-data": data(f"{user}.key")}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "rljob-dev",
        "contexts": [context],
        "clusters": [{"name": "rljob-dev", "cluster": cluster}],
        "users": [{"name": user, "user": identity}],
    }
    _write_0600(layout.kubeconfig_of(user), json.dumps(config, indent=1).encode())


def _name(subject: Subject) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, subject.organization)] if subject.organization else []
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, subject.common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _LIFETIME)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_0600(path, pem)


def _write_0600(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
