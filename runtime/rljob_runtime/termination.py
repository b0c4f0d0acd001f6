"""Why a process ended, for whoever restarts it: one JSON object in a file, `{reason, rank, exitCode, time, message}`.

Kubernetes shows it as the container's termination message; the operator's failure policy matches `reason`.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rljob_api.errors import RljobError, SpecError

KUBERNETES_FILE = Path("/dev/termination-log")
MAX_MESSAGE = 2000
"""Characters; Kubernetes keeps 4096 bytes of the file."""

STOPPED = "Stopped"
"""Ended in order, on SIGTERM, with work left to do."""
INVALID_CONFIGURATION = "InvalidConfiguration"


@dataclass(frozen=True, slots=True)
class Termination:
    """One process's end."""

    reason: str
    """One CamelCase word."""
    exit_code: int
    time: str
    """RFC 3339, UTC, with milliseconds: the ranks of a gang fail within the same second."""
    message: str = ""
    rank: int | None = None

    def to_json(self) -> str:
        fields = asdict(self)
        shown = {"reason": fields["reason"], "exitCode": fields["exit_code"], "time": fields["time"]}
        if self.rank is not None:
            shown["rank"] = self.rank
        return json.dumps({**shown, "message": self.message[:MAX_MESSAGE]})

    @classmethod
    def from_json(cls, text: str) -> Termination:
        """
        Raises:
            ValueError: it is not what `to_json` writes.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict) or not isinstance(fields.get("reason"), str):
            raise ValueError(f"not a termination: {text[:80]!r}")
        rank = fields.get("rank")
        return cls(
            reason=fields["reason"],
            exit_code=int(fields.get("exitCode", 1)),
            time=str(fields.get("time", "")),
            message=str(fields.get("message", "")),
            rank=rank if isinstance(rank, int) else None,
        )


def text_of(seconds: float) -> str:
    """A moment since the epoch, as `Termination.time` has it."""
    milliseconds = int(1000 * seconds)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{whole}.{milliseconds % 1000:03d}Z"


def reason_of(error: BaseException) -> str:
    """The word for an error: its class, but one word for everything that no new attempt can mend."""
    if isinstance(error, SpecError):
        return INVALID_CONFIGURATION
    return type(error).__name__ if isinstance(error, RljobError) else "TrainerFailed"


def write(termination: Termination, path: Path) -> None:
    """Leave it; a reader never sees half of it. A path that cannot be written is not worth failing for."""
    try:
        if path == KUBERNETES_FILE:
            if path.is_file():  # else this is no container of Kubernetes
                path.write_text(termination.to_json())  # mounted: it cannot be replaced
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(termination.to_json())
        temporary.replace(path)
    except OSError:
        return
