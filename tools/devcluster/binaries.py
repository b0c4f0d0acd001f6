"""Kubernetes, etcd, CoreDNS, helm and kwok, built from the pinned Go modules next to this package.

A module's binaries are kept under a key of everything they are made from (go.mod, go.sum, sources, recipe), so a
second build costs nothing and a changed pin never meets an old binary.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tools.devcluster.commands import run
from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import REPOSITORY, Layout

_BUILD_TIMEOUT_SECONDS = 3600
_KUBERNETES = "k8s.io/kubernetes"
# A constant: with the real time each build would link again.
_BUILD_DATE = "2026-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class Target:
    """One `go build`: packages of a module into the bin folder, or one package under another name."""

    packages: tuple[str, ...]
    binaries: tuple[str, ...]
    tags: str = ""
    variables: tuple[str, ...] = ()  # NAME=VALUE for the linker's -X; {version} and so on are those of `versioned_by`
    versioned_by: str = ""
    name: str = ""  # of the binary, when it is not the package's


@dataclass(frozen=True, slots=True)
class GoModule:
    """A folder under tools/ with go.mod and go.sum, and what is built from it."""

    folder: str
    targets: tuple[Target, ...]
    sources: tuple[str, ...] = ("go.mod", "go.sum")
    binaries: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "binaries", tuple(name for target in self.targets for name in target.binaries))

    @property
    def path(self) -> Path:
        return REPOSITORY / "tools" / self.folder


_KUBERNETES_VERSION = tuple(
    f"{package}.{variable}"
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    for variable in (
        "gitVersion={version}",
        "gitMajor={major}",
        "gitMinor={minor}",
        "gitTreeState=clean",
        f"buildDate={_BUILD_DATE}",
    )
)
_KUBERNETES_BINARIES = (
    "kubelet",
    "kubectl",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
)

KUBERNETES = GoModule(
    "k8s",
    (
        Target(
            packages=tuple(f"{_KUBERNETES}/cmd/{name}" for name in _KUBERNETES_BINARIES),
            binaries=_KUBERNETES_BINARIES,
            tags="selinux,notest,grpcnotrace",  # those of Kubernetes' own release build
            variables=_KUBERNETES_VERSION,
            versioned_by=_KUBERNETES,
        ),
        Target(packages=("go.etcd.io/etcd/server/v3",), binaries=("etcd",), name="etcd"),
    ),
)
CLIENTS = GoModule(
    "clients",
    (
        Target(packages=("sigs.k8s.io/kwok/cmd/kwok",), binaries=("kwok",)),
        Target(
            packages=("helm.sh/helm/v4/cmd/helm",),
            binaries=("helm",),
            variables=(
                "helm.sh/helm/v4/internal/version.version={version}",
                "helm.sh/helm/v4/internal/version.gitTreeState=clean",
            ),
            versioned_by="helm.sh/helm/v4",
        ),
    ),
)
COREDNS = GoModule(
    "coredns",
    (Target(packages=(".",), binaries=("coredns",), name="coredns"),),
    sources=("go.mod", "go.sum", "main.go"),
)
MODULES = (KUBERNETES, CLIENTS, COREDNS)


@dataclass(frozen=True, slots=True)
class Binaries:
    """Where each program is."""

    folders: dict[str, Path]

    def __getitem__(self, name: str) -> Path:
        return self.folders[name] / name

    def search_path(self) -> str:
        return os.pathsep.join(dict.fromkeys(str(folder) for folder in self.folders.values()))


def cache_key(module: GoModule) -> str:
    """Changes exactly when a source or the recipe changes."""
    digest = hashlib.sha256(repr(module.targets).encode())
    for name in module.sources:
        digest.update(f"\0{name}\0".encode() + (module.path / name).read_bytes())
    return digest.hexdigest()[:16]


def folder_of(layout: Layout, module: GoModule) -> Path:
    return layout.cache / "bin" / f"{module.folder}-{cache_key(module)}"


def missing(layout: Layout) -> tuple[GoModule, ...]:
    return tuple(module for module in MODULES if not folder_of(layout, module).is_dir())


def locate(layout: Layout) -> Binaries:
    """The binaries of this checkout's pins; fails when they are not built."""
    if absent := missing(layout):
        names = ", ".join(name for module in absent for name in module.binaries)
        raise DevClusterError(f"not built for the present pins: {names}. Run `make cluster`.")
    return Binaries({name: folder_of(layout, module) for module in MODULES for name in module.binaries})


def build(layout: Layout) -> Binaries:
    """Build what is missing (about 12 minutes on 2 cores when all of it is), then locate everything."""
    for module in missing(layout):
        _build_module(layout, module)
    return locate(layout)


def _build_module(layout: Layout, module: GoModule) -> None:
    if shutil.which("go") is None:
        raise DevClusterError(
            f"go is not installed, and {', '.join(module.binaries)} must be built from tools/{module.folder}: install Go "
            "1.26 (any Go from 1.21 on fetches that by itself), or use another cluster through KUBECONFIG."
        )
    wanted = folder_of(layout, module)
    partial = wanted.with_name(f"{wanted.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for target in module.targets:
        run(
            ["go", "build", *_build_arguments(module, target, partial)],
            environment=_go_environment(),
            timeout_seconds=_BUILD_TIMEOUT_SECONDS,
            hint=f"Building {', '.join(target.binaries)} needs the Go modules of tools/{module.folder}/go.mod.",
        )
    partial.rename(wanted)


def _build_arguments(module: GoModule, target: Target, folder: Path) -> list[str]:
    version = _module_version(module, target.versioned_by) if target.versioned_by else ""
    major, minor, *_ = [*version.removeprefix("v").split("."), "", ""]
    linker = ["-s", "-w"]
    for variable in target.variables:
        linker += ["-X", variable.format(version=version, major=major, minor=minor)]
    output = folder / target.name if target.name else f"{folder}{os.sep}"
    tags = ["-tags", target.tags] if target.tags else []
    return [
        "-C",
        str(module.path),
        "-p",
        str(os.cpu_count() or 1),
        "-trimpath",
        "-mod=readonly",
        *tags,
        "-ldflags",
        " ".join(linker),
        "-o",
        str(output),
        *target.packages,
    ]


def _module_version(module: GoModule, dependency: str) -> str:
    command = ["go", "list", "-C", str(module.path), "-mod=readonly", "-m", "-f", "{{.Version}}", dependency]
    return run(command, environment=_go_environment(), timeout_seconds=600).strip()


def _go_environment() -> dict[str, str]:
    return {**os.environ, "CGO_ENABLED": "0"}
