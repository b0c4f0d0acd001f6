"""The key under which binaries are kept: any pin, source or recipe changes it, nothing else does."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from tools.devcluster import binaries
from tools.devcluster.binaries import CLIENTS, COREDNS, KUBERNETES, MODULES, GoModule, cache_key
from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import Layout


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GoModule:
    """A copy of CoreDNS's module that a test may change."""
    shutil.copytree(COREDNS.path, tmp_path / "tools" / "coredns")
    monkeypatch.setattr(binaries, "REPOSITORY", tmp_path)
    return COREDNS


def test_the_key_of_an_untouched_copy_is_the_same(module: GoModule, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = cache_key(module)
    monkeypatch.undo()
    assert cache_key(module) == copied


@pytest.mark.parametrize("name", ["go.mod", "go.sum", "main.go"])
def test_a_byte_in_any_source_changes_the_key(module: GoModule, name: str) -> None:
    before = cache_key(module)
    with (module.path / name).open("a") as file:
        file.write("\n")
    assert cache_key(module) != before


def test_a_change_of_the_recipe_changes_the_key() -> None:
    target = dataclasses.replace(COREDNS.targets[0], tags="other")
    assert cache_key(dataclasses.replace(COREDNS, targets=(target,))) != cache_key(COREDNS)


def test_each_module_has_its_own_key() -> None:
    assert len({cache_key(module) for module in MODULES}) == len(MODULES)


def test_every_program_of_a_cluster_is_built_by_one_module() -> None:
    built = [name for module in (KUBERNETES, CLIENTS, COREDNS) for name in module.binaries]
    assert sorted(built) == [
        "coredns",
        "etcd",
        "helm",
        "kube-apiserver",
        "kube-controller-manager",
        "kube-proxy",
        "kube-scheduler",
        "kubectl",
        "kubelet",
        "kwok",
    ]


def test_missing_binaries_are_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DevClusterError, match=r"not built for the present pins: kubelet, .*coredns\. Run `make cluster`"
    ):
        binaries.locate(Layout(tmp_path, "unit"))


def test_a_half_built_module_counts_as_missing(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "unit")
    for module in MODULES:
        binaries.folder_of(layout, module).with_suffix(".partial").mkdir(parents=True)
    assert binaries.missing(layout) == MODULES
