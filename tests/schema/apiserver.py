"""A client for the schema tests: sends RLJobs to a real kube-apiserver and reads its verdict. Every call has a deadline."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from kubernetes import config

from rljob_api.crd import GROUP, PLURAL, VERSION, custom_resource_definition

SECONDS = 10
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
DRY = "dryRun=All&fieldValidation=Strict"


@dataclass(frozen=True)
class Verdict:
    """What the apiserver answered."""

    status: int
    body: dict[str, Any]

    @property
    def accepted(self) -> bool:
        return 200 <= self.status < 300

    @property
    def causes(self) -> list[tuple[str, str]]:
        """(field, message) of every reason for a refusal."""
        causes = self.body.get("details", {}).get("causes", [])
        return [(cause.get("field", ""), cause.get("message", "")) for cause in causes]


class Apiserver:
    """Installs the CRD, which stays, and a namespace of its own, which goes."""

    def __init__(self, kubeconfig: str) -> None:
        self._namespace = f"rljob-schema-{secrets.token_hex(4)}"
        self._jobs = f"/apis/{GROUP}/{VERSION}/namespaces/{self._namespace}/{PLURAL}"
        self._client = config.new_client_from_config(config_file=kubeconfig)

    def __enter__(self) -> Self:
        crd = custom_resource_definition()
        applied = self.call(
            "PATCH",
            f"{CRDS}/{crd['metadata']['name']}?fieldManager=rljob-tests&force=true&fieldValidation=Strict",
            crd,
            "application/apply-patch+yaml",
        )
        assert applied.accepted, json.dumps(applied.body, indent=1)
        created = self.call("POST", "/api/v1/namespaces", {"metadata": {"name": self._namespace}})
        assert created.accepted, created.body
        self._wait_until_served(f"{CRDS}/{crd['metadata']['name']}", applied.body["metadata"]["generation"])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for job in self.call("GET", self._jobs).body.get("items", []):
            self.call("DELETE", f"{self._jobs}/{job['metadata']['name']}")
        self.call("DELETE", f"/api/v1/namespaces/{self._namespace}")
        self._client.close()

    def _wait_until_served(self, path: str, generation: int) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            definition = self.call("GET", path).body
            conditions = definition.get("status", {}).get("conditions") or []  # null in the first moments
            established = [c for c in conditions if c["type"] == "Established"]
            structural = [c for c in conditions if c["type"] == "NonStructuralSchema"]
            assert not structural, structural
            if established and established[0]["status"] == "True" and self.call("GET", self._jobs).status == 200:
                time.sleep(1)  # an update of a CRD that exists reaches the handlers a moment after its condition
                return
            time.sleep(0.1)
        raise TimeoutError(f"generation {generation} of the CRD was not established within 30 s")

    def call(self, method: str, path: str, body: object = None, content: str = "application/json") -> Verdict:
        """One request; a refusal is an answer like any other."""
        headers = {"Content-Type": content, "Accept": "application/json"}
        self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        answer = self._client.rest_client.pool_manager.request(
            method,
            self._client.configuration.host + path,
            body=None if body is None else json.dumps(body),
            headers=headers,
            timeout=SECONDS,
            retries=False,
        )
        return Verdict(answer.status, json.loads(answer.data))

    def create(self, document: dict[str, Any], *, dry_run: bool = True) -> Verdict:
        """POST of an RLJob; a dry run goes through defaults and every check, and leaves nothing behind."""
        return self.call("POST", f"{self._jobs}?{DRY if dry_run else 'fieldValidation=Strict'}", document)

    def replace(self, document: dict[str, Any], subresource: str = "") -> Verdict:
        """PUT of an RLJob that exists, as a dry run."""
        return self.call("PUT", f"{self._jobs}/{document['metadata']['name']}{subresource}?{DRY}", document)

    def delete(self, name: str) -> Verdict:
        return self.call("DELETE", f"{self._jobs}/{name}")
