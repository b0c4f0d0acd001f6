"""Prometheus series of the operator and its jobs; those of a job go with it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rljob_api.status import RLJobStatus
from rljob_operator.core.observed import Observed


class Metrics:
    """One registry, nothing global."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        job = ["namespace", "rljob"]
        self._calls = Counter(
            "rljob_api_calls_total",
            "Calls to the apiserver.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self._passes = Histogram(
            "rljob_reconcile_seconds",
            "Time of a reconcile pass, by how it ended.",
            ["result"],
            registry=self.registry,
        )
        self.queue_depth = Gauge("rljob_queue_depth", "Jobs that wait for a pass.", registry=self.registry)
        self.queue_oldest = Gauge(
            "rljob_queue_oldest_seconds", "How long the oldest job waits or is worked on.", registry=self.registry
        )
        self.watch_age = Gauge(
            "rljob_watch_age_seconds",
            "Since the apiserver last said anything, by resource.",
            ["resource"],
            registry=self.registry,
        )
        self.is_leader = Gauge("rljob_leader", "1 while this operator holds the lease.", registry=self.registry)
        self.coordinators = Gauge("rljob_coordinators", "Protocol coordinators that run.", registry=self.registry)
        self._jobs = {
            "step": Gauge("rljob_step", "Steps trained.", job, registry=self.registry),
            "version": Gauge("rljob_weight_version", "Newest published weight version.", job, registry=self.registry),
            "staleness": Gauge(
                "rljob_staleness_max_versions", "Largest staleness of the last step.", job, registry=self.registry
            ),
            "tokens": Gauge("rljob_tokens_per_second", "Model tokens generated a second.", job, registry=self.registry),
            "restarts": Gauge("rljob_restarts", "Restarts of the job.", job, registry=self.registry),
            "ready": Gauge("rljob_ready", "1 while the condition Ready is True.", job, registry=self.registry),
        }
        self._known: set[tuple[str, str]] = set()

    def called(self, verb: str, resource: str, code: int) -> None:
        """One call to the apiserver; code 0 is no answer."""
        self._calls.labels(verb, resource, str(code)).inc()

    def passed(self, result: str, seconds: float) -> None:
        """One reconcile pass."""
        self._passes.labels(result).observe(seconds)

    def job(self, observed: Observed, status: RLJobStatus) -> None:
        """A job's numbers."""
        key = (observed.identity.namespace, observed.identity.name)
        ready = any(condition.type == "Ready" and condition.status == "True" for condition in status.conditions)
        values = {
            "step": status.step,
            "version": status.weights.published or 0,
            "staleness": status.staleness.max,
            "tokens": status.throughput.tokens_per_second,
            "restarts": status.restarts.total,
            "ready": int(ready),
        }
        for name, value in values.items():
            self._jobs[name].labels(*key).set(value)
        self._known.add(key)

    def forget(self, key: tuple[str, str]) -> None:
        """The job is gone."""
        if key in self._known:
            self._known.discard(key)
            for gauge in self._jobs.values():
                gauge.remove(*key)
