"""What a runtime process is told by its environment: the same variables in a pod and under `rljob run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rljob_api import names
from rljob_api.errors import RljobError
from rljob_api.spec import RLJob


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """Settings of one trainer or rollout process."""

    job: RLJob
    uid: str
    nats_url: str
    credentials: Path | None
    cache_dir: Path
    checkpoint_dir: Path | None
    weights_dir: Path | None
    record_dir: Path | None
    record_bytes: int
    worker: str
    pool: str
    incarnation: str
    attempt: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> RuntimeSettings:
        """Read the variables of `rljob_api.names`.

        Raises:
            RljobError: one is missing, or the resolved RLJob cannot be read.
        """
        path = Path(_required(environ, names.ENV_CONFIG))
        try:
            job = RLJob.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise RljobError(f"{names.ENV_CONFIG}={path}: the resolved RLJob cannot be read: {error}") from error
        return cls(
            job=job,
            uid=_required(environ, names.ENV_UID),
            nats_url=_required(environ, names.ENV_NATS_URL),
            credentials=_path(environ, names.ENV_NATS_CREDENTIALS),
            cache_dir=Path(_required(environ, names.ENV_CACHE_DIR)),
            checkpoint_dir=_path(environ, names.ENV_CHECKPOINT_DIR),
            weights_dir=_path(environ, names.ENV_WEIGHTS_DIR),
            record_dir=_path(environ, names.ENV_RECORD_DIR),
            record_bytes=int(environ.get(names.ENV_RECORD_BYTES, "0")),
            worker=environ.get(names.ENV_WORKER, ""),
            pool=environ.get(names.ENV_POOL, ""),
            incarnation=environ.get(names.ENV_INCARNATION, ""),
            attempt=int(environ.get(names.ENV_ATTEMPT, "1")),
        )


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:
        raise RljobError(
            f"the environment variable {name} is not set: this process is started by `rljob run` or the operator"
        )
    return value


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    value = environ.get(name)
    return Path(value) if value else None
