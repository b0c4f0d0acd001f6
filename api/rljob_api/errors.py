"""The exception tree. Every message says what, why and what to do, with the values.

RljobError
├── SpecError              the RLJob file or object is not usable; carries every violation
├── BadInput               an argument of a command names nothing that the command can work on
├── ProtocolError
│   ├── MalformedMessage   bytes on a stream, in a key or in a file are not what their schema says
│   ├── Fenced             a newer epoch, term or revision exists; the writer must stop
│   ├── DeadlineExceeded   a wait ran out of time
│   └── MessagingUnavailable  there is no NATS server, or it refuses this client
├── StorageError
│   ├── BlobCorrupt        digest or size differs from the manifest
│   ├── BlobMissing        the store has no blob of that name
│   ├── StorageFull        no room for a blob or a record
│   └── CheckpointCorrupt  a checkpoint directory is incomplete, or a file of it is not what was written
├── TrainerError
│   ├── AcceleratorMissing a GPU was asked for and there is no CUDA device; never a silent fallback to the CPU
│   └── TrainingDiverged   a gradient is not finite: the update is refused before it reaches the weights
├── EngineError
│   └── EnginePoisoned     the engine can no longer be trusted: it must be restarted, never served on
└── EnvironmentFailure     the environment broke or timed out; an outcome of its own, never reward 0
"""

from __future__ import annotations

from dataclasses import dataclass


class RljobError(Exception):
    """Base of every error that rljob raises on purpose."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One reason why a spec is refused."""

    path: str
    """Where, as kubectl writes it: `spec.rolloutPools[0].replicas`."""
    value: str
    """The offending value as the user wrote it, shortened."""
    reason: str
    """What is wrong with it."""
    remedy: str
    """What to do instead."""

    def __str__(self) -> str:
        shown = f" (got {self.value})" if self.value else ""
        return f"{self.path}: {self.reason}{shown}. {self.remedy}"


class SpecError(RljobError):
    """The RLJob is refused; `violations` holds every reason, not only the first."""

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        self.violations = violations
        super().__init__("\n".join(str(v) for v in violations))


class BadInput(RljobError):
    """An argument of a command names nothing that the command can work on."""


class ProtocolError(RljobError):
    """Something on the wire is not as the protocol says."""


class MalformedMessage(ProtocolError):
    """Bytes that do not decode to the message their place promises."""


class Fenced(ProtocolError):
    """A newer writer exists (epoch, term or key revision); this one must stop writing."""


class DeadlineExceeded(ProtocolError):
    """A wait reached its deadline."""


class MessagingUnavailable(ProtocolError):
    """There is no NATS server to talk to, or it refuses this client."""


class StorageError(RljobError):
    """Blobs, checkpoints or records could not be written or read."""


class BlobCorrupt(StorageError):
    """The bytes' digest or size differs from what the manifest says."""


class BlobMissing(StorageError):
    """The store does not hold the named blob."""


class StorageFull(StorageError):
    """There is no room left for a blob, a checkpoint or a record."""


class CheckpointCorrupt(StorageError):
    """The checkpoint is incomplete, or a file of it is not what was written."""


class TrainerError(RljobError):
    """The trainer cannot go on."""


class AcceleratorMissing(TrainerError):
    """A GPU was requested and this process sees no CUDA device."""


class TrainingDiverged(TrainerError):
    """A gradient is NaN or infinite; weights and optimizer state are those before the update."""


class EngineError(RljobError):
    """The inference engine refused or failed a call."""


class EnginePoisoned(EngineError):
    """The engine holds unknown or half-applied weights and must be restarted."""


class EnvironmentFailure(RljobError):
    """The environment raised or timed out: an infrastructure outcome, retried, never a reward."""
