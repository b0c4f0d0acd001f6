"""RLJobs on a real cluster, as a user handles them: the chart, kubectl, and looks at what came of it."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.devcluster.layout import REPOSITORY

from rljob.loader import load_document
from tests.cluster.cluster import NATS_IMAGE, OPERATOR_IMAGE, RUNTIME_IMAGE, Cluster, KubectlError, Namespace

RELEASE = "rljob"
SYSTEM = "rljob-system"
CHART = REPOSITORY / "charts" / "rljob"
EXAMPLES = REPOSITORY / "examples"

VALUES = {
    "images.operator": OPERATOR_IMAGE,
    "images.runtime": RUNTIME_IMAGE,
    "nats.image": NATS_IMAGE,
    "crd.keep": "false",
}


def quickstart(name: str = "quickstart", *, steps: int, simulated: bool = True, **spec: Any) -> dict[str, Any]:
    """The example, with fewer steps and, for most tests, the simulated engine; further fields of the spec replaced."""
    document: dict[str, Any] = copy.deepcopy(load_document(EXAMPLES / "quickstart.yaml"))
    document["metadata"]["name"] = name
    document["spec"]["training"]["steps"] = steps
    document["spec"]["storage"]["checkpoint"]["everySteps"] = 2
    if simulated:
        for pool in document["spec"]["rolloutPools"]:
            pool["engine"] = {"simulated": {"decodeSeconds": 0.002}}
    document["spec"] |= spec
    return document


@dataclass(frozen=True, slots=True)
class Job:
    """One RLJob in a namespace."""

    namespace: Namespace
    name: str

    @classmethod
    def apply(cls, namespace: Namespace, document: dict[str, Any]) -> Job:
        """Apply the claim that the examples name, and the job."""
        namespace.kubectl("apply", f"--filename={EXAMPLES / 'claim.yaml'}")
        namespace.apply(document)
        return cls(namespace, document["metadata"]["name"])

    def get(self) -> dict[str, Any]:
        found: dict[str, Any] = self.namespace.get("rljob", self.name)
        return found

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get().get("status", {})
        return found

    def condition(self, kind: str) -> dict[str, Any]:
        return next((item for item in self.status.get("conditions", ()) if item["type"] == kind), {})

    def patch(self, **spec: Any) -> None:
        self.namespace.kubectl("patch", "rljob", self.name, "--type=merge", f"--patch={json.dumps({'spec': spec})}")

    def wait(
        self, what: str, holds: Callable[[dict[str, Any]], Any], *, timeout_seconds: float = 120
    ) -> dict[str, Any]:
        """The status once it holds; the error shows the job as kubectl describes it."""
        try:
            self.namespace.cluster.wait_for(
                f"rljob {self.name}: {what}", lambda: holds(self.status), timeout_seconds=timeout_seconds
            )
        except AssertionError as error:
            seen = self.namespace.kubectl("describe", "rljob", self.name)
            pods = self.namespace.kubectl("get", "pods", "--output=wide")
            raise AssertionError(f"{error}\n{seen[-6000:]}\n{pods}") from None
        return self.status

    def wait_for_condition(
        self, kind: str, status: str = "True", reason: str | None = None, *, timeout_seconds: float = 120
    ) -> dict[str, Any]:
        def holds(_: dict[str, Any]) -> bool:
            found = self.condition(kind)
            return found.get("status") == status and reason in (None, found.get("reason"))

        self.wait(f"{kind}={status} {reason or ''}", holds, timeout_seconds=timeout_seconds)
        return self.condition(kind)

    def pods(self, pool: str) -> list[dict[str, Any]]:
        selector = f"--selector=rljob.dev/name={self.name},rljob.dev/pool={pool}"
        found: list[dict[str, Any]] = self.namespace.get("pods", selector)["items"]
        return found

    def trainer_pod(self) -> dict[str, Any]:
        """Of the present attempt: a failed attempt's pod may still be there."""
        attempt = str(self.status["attempt"])
        (pod,) = [pod for pod in self.pods("trainer") if pod["metadata"]["labels"]["rljob.dev/attempt"] == attempt]
        return pod

    def kill(self, pod: dict[str, Any], pattern: str, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal (kill -9) to the processes of a pod whose command line holds the pattern.

        From the machine where it is our dev cluster: inside a container nobody can kill process 1.
        """
        if self.namespace.cluster.layout is not None:
            found = processes_of(pod, pattern)
            assert found, f"no process {pattern} of pod {pod['metadata']['name']} is seen from here"
            for pid in found:
                os.kill(pid, number)
            return
        script = (
            "import os, glob\n"
            "for path in glob.glob('/proc/[0-9]*/cmdline'):\n"
            "    try: line = open(path, 'rb').read().decode().replace(chr(0), ' ')\n"
            "    except OSError: continue\n"
            f"    pid = int(path.split('/')[2])\n"
            f"    if {pattern!r} in line and pid != os.getpid(): os.kill(pid, {int(number)})\n"
        )
        self.namespace.kubectl("exec", pod["metadata"]["name"], "--", "python", "-c", script)

    def events(self) -> list[tuple[str, str]]:
        """(reason, message) of the Events on the job, oldest first."""
        found = self.namespace.get("events", f"--field-selector=involvedObject.name={self.name}")["items"]
        found.sort(key=lambda item: item["metadata"]["creationTimestamp"])
        return [(item["reason"], item["message"]) for item in found]

    def delete(self, timeout_seconds: float = 90) -> None:
        """And wait until it is gone, with its pods."""
        self.namespace.kubectl("delete", "rljob", self.name, "--wait=false")

        def gone() -> bool:
            try:
                self.namespace.kubectl("get", "rljob", self.name)
            except KubectlError as error:
                return "not found" in str(error)
            return False

        self.namespace.cluster.wait_for(f"rljob {self.name} to be gone", gone, timeout_seconds=timeout_seconds)


def operator_metrics(cluster: Cluster) -> dict[str, float]:
    """The operator's series, `name{labels}` -> value, read from its pod."""
    pods = cluster.get("pods", f"--namespace={SYSTEM}", "--selector=app.kubernetes.io/component=operator")["items"]
    (address,) = [pod["status"]["podIP"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    with urllib.request.urlopen(f"http://{address}:8080/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in found}


def processes_of(pod: dict[str, Any], pattern: str = "") -> list[int]:
    """Processes of a pod of the dev cluster, by its uid in their cgroup, whose command line holds the pattern."""
    uid = pod["metadata"]["uid"]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            if uid in (folder / "cgroup").read_text() and pattern in line:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def helm(cluster: Cluster, *arguments: str) -> str:
    """Run helm against the cluster."""
    environment = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig), "PATH": cluster.search_path}
    result = subprocess.run(
        ["helm", *arguments], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert result.returncode == 0, f"helm {' '.join(arguments)}: {result.stderr or result.stdout}"
    return result.stdout


def install(cluster: Cluster) -> None:
    """The chart, and wait until its pods are ready."""
    values = [word for item in VALUES.items() for word in ("--set", "=".join(item))]
    helm(
        cluster,
        *("upgrade", "--install", RELEASE, str(CHART), "--namespace", SYSTEM, "--create-namespace"),
        *("--wait", "--timeout", "120s", *values),
    )


def uninstall(cluster: Cluster) -> None:
    helm(cluster, "uninstall", RELEASE, "--namespace", SYSTEM, "--wait", "--timeout", "120s")
