"""Where the apiserver serves each kind that the operator touches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """One resource."""

    name: str
    prefix: str
    """`/api/v1` or `/apis/GROUP/VERSION`."""
    plural: str

    @property
    def api_version(self) -> str:
        return self.prefix.removeprefix("/apis/").removeprefix("/api/")

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """Of a collection, an object or a subresource; without a namespace that of the whole cluster."""
        parts = [self.prefix]
        if namespace is not None:
            parts.append(f"namespaces/{namespace}")
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part is not None]
        return "/".join(parts)


RLJOB = Kind("RLJob", "/apis/rljob.dev/v1alpha1", "rljobs")
POD = Kind("Pod", "/api/v1", "pods")
SERVICE = Kind("Service", "/api/v1", "services")
CONFIG_MAP = Kind("ConfigMap", "/api/v1", "configmaps")
JOB = Kind("Job", "/apis/batch/v1", "jobs")
DEPLOYMENT = Kind("Deployment", "/apis/apps/v1", "deployments")
DISRUPTION_BUDGET = Kind("PodDisruptionBudget", "/apis/policy/v1", "poddisruptionbudgets")
LEASE = Kind("Lease", "/apis/coordination.k8s.io/v1", "leases")
EVENT = Kind("Event", "/api/v1", "events")

CHILDREN = (JOB, DEPLOYMENT, SERVICE, CONFIG_MAP, DISRUPTION_BUDGET)
WATCHED = (RLJOB, POD, *CHILDREN)
BY_NAME = {kind.name: kind for kind in (*WATCHED, LEASE, EVENT)}
