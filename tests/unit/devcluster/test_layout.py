"""Paths and names: bad ones are refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import Layout


def test_the_cache_can_be_moved_and_the_cluster_named() -> None:
    layout = Layout.from_environment({"RLJOB_CACHE": "/var/cache/r", "RLJOB_CLUSTER": "two"})
    assert layout.state == Path("/var/cache/r/clusters/two")


def test_a_name_that_makes_no_namespace_is_refused() -> None:
    with pytest.raises(DevClusterError, match="RLJOB_CLUSTER is 'a/b': use at most 16 lower-case letters"):
        Layout.from_environment({"RLJOB_CLUSTER": "a/b"})


def test_a_cache_too_deep_for_sockets_is_refused_and_one_character_less_is_not() -> None:
    socket = len("/clusters/dev/node-0/containerd.sock.ttrpc")
    Layout.from_environment({"RLJOB_CACHE": "/" + "x" * (107 - socket - 1)})
    with pytest.raises(DevClusterError, match="socket path of 108 characters, the limit is 107: set RLJOB_CACHE"):
        Layout.from_environment({"RLJOB_CACHE": "/" + "x" * (107 - socket)})


def test_two_clusters_share_no_name() -> None:
    one, other = Layout(Path("/c"), "one").node(0), Layout(Path("/c"), "other").node(0)
    for name in ("network_namespace", "cgroup", "folder", "containerd_socket"):
        assert getattr(one, name) != getattr(other, name)


def test_two_nodes_share_no_address() -> None:
    nodes = [Layout(Path("/c"), "one").node(index) for index in range(4)]
    for name in ("address", "pod_network", "network_namespace", "cgroup", "folder"):
        assert len({getattr(node, name) for node in nodes}) == 4
