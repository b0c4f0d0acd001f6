"""The operator's own life: killed, stopped, upgraded, crashed after each of its writes. Training goes on, counters are exact."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.behaviour import local_operator
from tests.cluster.cluster import Cluster, Namespace
from tests.cluster.rljobs import SYSTEM, Job, processes_of, quickstart

pytestmark = pytest.mark.timeout(900)

USER = f"system:serviceaccount:{SYSTEM}:rljob-operator"


def writes(cluster: Cluster, since_byte: int) -> list[dict[str, Any]]:
    """Audit entries of the chart's operator that changed something, leases and Events left out."""
    assert cluster.layout is not None
    with cluster.layout.audit_log.open() as file:
        file.seek(since_byte)
        entries = [json.loads(line) for line in file if line.endswith("\n")]
    return [
        entry
        for entry in entries
        if entry["user"]["username"] == USER
        and entry["verb"] not in ("get", "list", "watch")
        and entry["objectRef"]["resource"] not in ("leases", "events")
    ]


def audit_end(cluster: Cluster) -> int:
    assert cluster.layout is not None
    return cluster.layout.audit_log.stat().st_size


def operator_pod(cluster: Cluster) -> dict[str, Any]:
    def one() -> Any:
        found = cluster.get("pods", f"--namespace={SYSTEM}", "--selector=app.kubernetes.io/component=operator")
        running = [pod for pod in found["items"] if "deletionTimestamp" not in pod["metadata"]]
        return running[0] if len(running) == 1 and running[0]["status"].get("phase") == "Running" else None

    found: dict[str, Any] = cluster.wait_for("one operator pod", one)
    return found


def uids(job: Job) -> set[str]:
    return {pod["metadata"]["uid"] for pool in ("main", "trainer") for pod in job.pods(pool)}


def first_write_after(cluster: Cluster, byte: int, moment: float) -> float:
    """Seconds from the moment to the successor's first write."""

    def stamps() -> list[float]:
        found = [
            datetime.fromisoformat(entry["requestReceivedTimestamp"]).timestamp() for entry in writes(cluster, byte)
        ]
        return [stamp for stamp in found if stamp > moment]

    found: list[float] = cluster.wait_for("a write of the successor", stamps, timeout_seconds=60)
    return min(found) - moment


def test_killed_three_times_in_mid_run_each_successor_writes_within_20_seconds(
    team: Namespace, dev_cluster: Cluster
) -> None:
    job = Job.apply(team, quickstart("bereft", steps=2000))
    job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    before = uids(job)
    # Two: a standby is what takes over; a killed pod's replacement would have to start first.
    dev_cluster.kubectl("scale", "deployment/rljob-operator", "--replicas=2", f"--namespace={SYSTEM}")
    try:
        dev_cluster.kubectl("rollout", "status", "deployment/rljob-operator", f"--namespace={SYSTEM}", "--timeout=60s")
        waits = []
        for _ in range(3):
            time.sleep(5)  # the standby's caches are warm
            step = job.status["step"]
            holder = holder_of_lease(dev_cluster)
            byte = audit_end(dev_cluster)
            kill_processes_of(dev_cluster, holder)
            waits.append(first_write_after(dev_cluster, byte, time.time()))
            job.wait("further steps", lambda status, seen=step: status["step"] > seen + 2, timeout_seconds=60)
        print(f"seen: first write of the successor after kill -9: {', '.join(f'{wait:.1f} s' for wait in waits)}")
        assert max(waits) <= 20
        # In order: the lease is given up, and the standby need not wait for its end.
        time.sleep(5)
        holder, byte = holder_of_lease(dev_cluster), audit_end(dev_cluster)
        job.patch(rolloutPools=[{**quickstart(steps=1)["spec"]["rolloutPools"][0], "replicas": 2, "minReplicas": 2}])
        dev_cluster.kubectl("delete", "pod", holder, f"--namespace={SYSTEM}", "--wait=false")
        wait = first_write_after(dev_cluster, byte, time.time())
        print(f"seen: after SIGTERM: {wait:.1f} s")
        assert wait <= 3
    finally:
        dev_cluster.kubectl("scale", "deployment/rljob-operator", "--replicas=1", f"--namespace={SYSTEM}")
    assert uids(job) == before
    assert job.status["attempt"] == 1
    assert job.status["restarts"] == {"total": 0, "counted": 0}
    job.delete()


def kill_processes_of(cluster: Cluster, pod: str) -> None:
    """kill -9 of all processes of an operator pod."""
    found = processes_of(cluster.get("pod", pod, f"--namespace={SYSTEM}"), "rljob")
    assert found, f"no process of pod {pod} is seen from here"
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def holder_of_lease(cluster: Cluster) -> str:
    def held() -> Any:
        return cluster.get("lease", "rljob-operator", f"--namespace={SYSTEM}")["spec"].get("holderIdentity")

    found: str = cluster.wait_for("a holder of the lease", held)
    return found


def test_killed_after_each_of_its_writes_it_makes_no_second_gang_and_counts_exactly(
    team: Namespace, dev_cluster: Cluster, tmp_path: Path
) -> None:
    """One play, and every operator of it dies right after its next write: create, a killed trainer, suspend, resume, delete."""
    log = tmp_path / "operators.log"
    with local_operator.instead_of_the_chart(dev_cluster):
        play = _Play(dev_cluster, log)
        job = Job.apply(team, quickstart("fragile", steps=60))
        play.until(job, lambda status: status.get("checkpoint"))
        trainer = job.trainer_pod()
        job.kill(trainer, "rljob_runtime.trainer.main")
        play.until(job, lambda status: status.get("attempt") == 2 and job.condition("Ready").get("status") == "True")
        assert job.status["restarts"] == {"total": 1, "counted": 1}
        job.patch(suspend=True)
        play.until(job, lambda _: job.condition("Suspended").get("status") == "True")
        assert not job.pods("trainer") and not job.pods("main")
        job.patch(suspend=False)
        play.until(job, lambda _: job.condition("Succeeded").get("status") == "True", seconds=600)
        status = job.status
        assert (status["attempt"], status["restarts"]) == (3, {"total": 1, "counted": 1})
        team.kubectl("delete", "rljob", job.name, "--wait=false")
        play.until_gone(job)
    assert play.deaths >= 25, play.deaths
    print(f"seen: {play.deaths} operators died, each after one write")
    left = team.kubectl(
        "get", "jobs,deployments,pods,services,configmaps,poddisruptionbudgets", "--output=name"
    ).split()
    assert [name for name in left if "kube-root-ca" not in name] == []


class _Play:
    """Operators one after the other, and a look at the cluster between them."""

    def __init__(self, cluster: Cluster, log: Path) -> None:
        self._cluster = cluster
        self._log = log
        self.deaths = 0

    def until(self, job: Job, holds: Callable[[dict[str, Any]], Any], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not holds(job.status):
            assert time.monotonic() < deadline, self._log.read_text()[-4000:]
            self._one(job)

    def until_gone(self, job: Job, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while job.name in job.namespace.kubectl("get", "rljobs", "--output=name"):
            assert time.monotonic() < deadline, self._log.read_text()[-4000:]
            self._one(job)

    def _one(self, job: Job) -> None:
        """One operator, until it dies of its write, or for a few seconds when there is nothing to write."""
        module = "tests.cluster.behaviour.crashing_operator"
        process = local_operator.start(self._cluster, module, "1", log=self._log)
        try:
            end = time.monotonic() + 12
            while process.poll() is None and time.monotonic() < end:
                self._look(job)
                time.sleep(0.2)
            if process.poll() is not None:
                assert process.returncode == 9, self._log.read_text()[-4000:]
                self.deaths += 1
        finally:
            local_operator.stop(process)

    def _look(self, job: Job) -> None:
        """Never two gangs: no pods of two attempts whose processes may run."""
        living = [
            pod["metadata"]["labels"]["rljob.dev/attempt"]
            for pod in job.pods("trainer")
            if pod["status"].get("phase") in ("Pending", "Running")
        ]
        assert len(living) <= 1, living


def test_an_operator_that_builds_otherwise_leaves_every_running_pod_alone(
    team: Namespace, dev_cluster: Cluster, tmp_path: Path
) -> None:
    log = tmp_path / "operator.log"
    with local_operator.instead_of_the_chart(dev_cluster):
        old = local_operator.start(dev_cluster, "rljob.main", "operator", log=log)
        try:
            job = Job.apply(team, quickstart("upgraded", steps=2000))
            job.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
            before = uids(job)
            local_operator.stop(old)
            new = local_operator.start(dev_cluster, "tests.cluster.behaviour.changed_operator", log=log)
            try:
                step = job.status["step"]
                job.wait("further steps", lambda status: status["step"] > step + 5, timeout_seconds=90)
                time.sleep(10)
                assert uids(job) == before
                assert job.status["attempt"] == 1
                # A change of the user's rolls the pool, with what the new operator builds.
                pool = job.get()["spec"]["rolloutPools"][0]
                pool["template"] = {"metadata": {"annotations": {"example.com/mine": "1"}}}
                job.patch(rolloutPools=[pool])
                job.wait("new pods", lambda _: all(_is_changed(pod) for pod in job.pods("main")), timeout_seconds=180)
                job.delete()
            finally:
                local_operator.stop(new)
        finally:
            local_operator.stop(old)


def _is_changed(pod: dict[str, Any]) -> bool:
    return pod["metadata"].get("annotations", {}).get("rljob.dev/builder") == "changed"


def test_at_rest_only_the_lease_is_written_and_a_running_job_costs_one_write_in_5_seconds(
    team: Namespace, dev_cluster: Cluster
) -> None:
    suspended = Job.apply(team, quickstart("resting", steps=4, suspend=True))
    suspended.wait_for_condition("Suspended")
    finished = Job.apply(team, quickstart("done", steps=4))
    finished.wait_for_condition("Succeeded", timeout_seconds=180)
    team.cluster.wait_for("its pods to be gone", lambda: not finished.pods("main"))
    still = Job.apply(team, quickstart("still", steps=5000))
    still.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    still.wait("a step", lambda status: status["step"] >= 4)
    # No new version from now on; the heartbeat may be away for trainer.stallSeconds, 600 by default.
    still.kill(still.trainer_pod(), "rljob_runtime.trainer.main", signal.SIGSTOP)
    running = Job.apply(team, quickstart("busy", steps=5000))
    running.wait_for_condition("Ready", "True", "Training", timeout_seconds=180)
    running.wait("40 versions", lambda status: status["step"] >= 40, timeout_seconds=300)
    ready = {pod["metadata"]["uid"]: _ready_since(pod) for pod in running.pods("main")}
    byte, began, step = audit_end(dev_cluster), time.monotonic(), running.status["step"]
    time.sleep(180)
    running.wait("40 versions more", lambda status: status["step"] > step + 40, timeout_seconds=300)
    entries = writes(dev_cluster, byte)
    seconds = time.monotonic() - began
    by_job: dict[str, int] = {}
    for entry in entries:
        assert entry["objectRef"]["resource"] == "rljobs", entry
        assert entry["objectRef"]["subresource"] == "status", entry
        by_job[entry["objectRef"]["name"]] = by_job.get(entry["objectRef"]["name"], 0) + 1
    versions = running.status["step"] - step
    print(f"seen: in {seconds:.0f} s: writes by job {by_job}, {versions} versions")
    assert set(by_job) <= {running.name}
    assert by_job.get(running.name, 0) <= seconds / 5 + 1
    assert {pod["metadata"]["uid"]: _ready_since(pod) for pod in running.pods("main")} == ready
    still.kill(still.trainer_pod(), "rljob_runtime.trainer.main", signal.SIGCONT)
    still.delete()
    running.delete()
    finished.delete()
    suspended.delete()


def _ready_since(pod: dict[str, Any]) -> object:
    return next(item["lastTransitionTime"] for item in pod["status"]["conditions"] if item["type"] == "Ready")
