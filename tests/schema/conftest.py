"""The cluster for tests/schema/test_on_apiserver.py: the kubeconfig file that RLJOB_E2E_KUBECONFIG names, if any."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

KUBECONFIG = os.environ.get("RLJOB_E2E_KUBECONFIG", "")

# Without a cluster there is nothing to collect: a skipped test would say that something was left out by mistake.
collect_ignore = [] if KUBECONFIG else ["test_on_apiserver.py"]


@pytest.fixture(scope="session")
def apiserver() -> Iterator[object]:
    """A client of a real kube-apiserver that serves the CRD of this checkout."""
    from tests.schema.apiserver import Apiserver

    with Apiserver(KUBECONFIG) as server:
        yield server
