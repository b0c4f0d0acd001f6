"""Why pods do not run, in sentences with a remedy. The most telling cause first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rljob_api.reasons import Reason
from rljob_operator.core.observed import Clue, Pod

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_SPEC = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


@dataclass(frozen=True, slots=True)
class Cause:
    reason: Reason
    message: str


def cause(pods: Sequence[Pod], clues: Sequence[Clue]) -> Cause | None:
    """The first cause found, or None where nothing is stuck (yet)."""
    return next(iter([*_refused(clues), *_of_pods(pods, clues)]), None)


def _refused(clues: Sequence[Clue]) -> Iterator[Cause]:
    for clue in clues:
        if clue.reason in ("FailedCreate", "ReplicaFailure"):
            yield Cause(
                Reason.PODS_REFUSED,
                f"{clue.kind} {clue.name} cannot make its pods: {_sentence(clue.message)} "
                "Raise the quota, or change the pool's template so that it is admitted.",
            )


def _of_pods(pods: Sequence[Pod], clues: Sequence[Clue]) -> Iterator[Cause]:
    for pod in pods:
        scheduled = pod.condition("PodScheduled")
        if scheduled is not None and scheduled.status == "False":
            yield Cause(
                Reason.PODS_UNSCHEDULABLE,
                f"Pod {pod.name} cannot be scheduled: {_sentence(scheduled.message)} "
                "Add nodes, or lower the pool's requests, selectors or replicas.",
            )
        for container in pod.containers:
            said = _sentence(container.waiting_message or container.waiting)
            if container.waiting in _IMAGE:
                yield Cause(
                    Reason.IMAGE_UNAVAILABLE,
                    f"Pod {pod.name} cannot pull the image of container {container.name}: {said} "
                    "Correct the image's name, or add imagePullSecrets to the pool's template.",
                )
            elif container.waiting in _SPEC:
                yield Cause(
                    Reason.CONTAINER_NOT_STARTED,
                    f"Container {container.name} of pod {pod.name} cannot be made: {said} "
                    "Create what is missing, or correct the pool's template.",
                )
            elif container.waiting == "CrashLoopBackOff":
                last = container.ended_before
                how = "" if last is None else f" It last ended with {last.reason}, exit code {last.exit_code}."
                what = "" if last is None or not last.message else f" It said: {_sentence(last.message)}"
                yield Cause(
                    Reason.CONTAINER_CRASHING,
                    f"Container {container.name} of pod {pod.name} ended {container.restarts} times.{how}{what} "
                    f"Look at `kubectl logs {pod.name} -c {container.name} --previous`.",
                )
        for clue in clues:
            if clue.name == pod.name and clue.reason in ("FailedMount", "FailedAttachVolume"):
                yield Cause(
                    Reason.VOLUME_UNAVAILABLE,
                    f"Pod {pod.name} cannot mount a volume: {_sentence(clue.message)} "
                    "Create the claim, Secret or ConfigMap, or correct its name.",
                )


def _sentence(text: str) -> str:
    """One line that ends with a full stop; long texts are cut."""
    line = " ".join(text.split())
    line = f"{line[:400]} …" if len(line) > 400 else line
    return line if line.endswith((".", "…")) else f"{line}."
