"""What a runtime process is told by its host: environment variables, and the resolved RLJob they point at.

The host is the operator (pods) or the local runner; both set the same variables, named in `rljob_api.names`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rljob_api import names
from rljob_api.errors import SpecError, Violation
from rljob_api.pools import RolloutPool
from rljob_api.spec import RLJob

RECORD_BYTES = 1 << 30
"""Bound of the record that the trainer keeps, where the host names none."""


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """Settings of one trainer or rollout process. `worker` and `pool` are empty for a trainer."""

    job: RLJob
    uid: str
    nats_url: str
    credentials: Path | None
    cache_dir: Path
    """Private scratch of this process."""
    checkpoint_dir: Path | None
    weights_dir: Path | None
    """Shared directory of weight blobs; None: the NATS object store."""
    record_dir: Path | None
    """Where the trainer keeps a record for `rljob verify`; None: it keeps none."""
    record_bytes: int
    worker: str
    pool: str
    incarnation: str
    attempt: int
    model_dir: Path | None = None
    """Where the claim that holds the initial model is mounted."""
    ready_file: Path | None = None
    """Kept while the worker serves a version, for the pod's readiness probe."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> RuntimeSettings:
        """Settings of this process.

        Raises:
            SpecError: variables are missing or wrong, or the job they point at is; names all of them.
        """
        wrong: list[Violation] = []

        def required(name: str) -> str:
            if not environ.get(name):
                wrong.append(Violation(name, "", "this environment variable is not set", "The process's host sets it."))
            return environ.get(name, "")

        def optional_path(name: str) -> Path | None:
            return Path(environ[name]) if environ.get(name) else None

        def number(name: str, default: int) -> int:
            text = environ.get(name) or str(default)
            if not text.isascii() or not text.isdigit():
                wrong.append(Violation(name, text[:80], "must be a whole number", "The process's host sets it."))
                return default
            return int(text)

        config = required(names.ENV_CONFIG)
        job = _read_job(Path(config), wrong) if config else None
        uid, nats_url = required(names.ENV_UID), required(names.ENV_NATS_URL)
        cache_dir = required(names.ENV_CACHE_DIR)
        attempt, record_bytes = number(names.ENV_ATTEMPT, 1), number(names.ENV_RECORD_BYTES, RECORD_BYTES)
        if wrong or job is None:
            raise SpecError(tuple(wrong))
        return cls(
            job=job,
            uid=uid,
            nats_url=nats_url,
            credentials=optional_path(names.ENV_NATS_CREDENTIALS),
            cache_dir=Path(cache_dir),
            checkpoint_dir=optional_path(names.ENV_CHECKPOINT_DIR),
            weights_dir=optional_path(names.ENV_WEIGHTS_DIR),
            record_dir=optional_path(names.ENV_RECORD_DIR),
            record_bytes=record_bytes,
            worker=environ.get(names.ENV_WORKER, ""),
            pool=environ.get(names.ENV_POOL, ""),
            # A container that is started again keeps its pod's variables: each start needs a name of its own.
            incarnation=environ.get(names.ENV_INCARNATION) or uuid.uuid4().hex[:8],
            attempt=attempt,
            model_dir=optional_path(names.ENV_MODEL_DIR),
            ready_file=optional_path(names.ENV_READY_FILE),
        )

    @property
    def job_names(self) -> names.JobNames:
        return names.JobNames(self.uid)

    def rollout_pool(self) -> RolloutPool:
        """The pool that this rollout worker belongs to.

        Raises:
            SpecError: worker or pool is not set, or the job has no such pool.
        """
        given = {names.ENV_WORKER: self.worker, names.ENV_POOL: self.pool}
        missing = tuple(
            Violation(name, "", "this environment variable is not set", "The process's host sets it.")
            for name, value in given.items()
            if not value
        )
        if missing:
            raise SpecError(missing)
        for pool in self.job.spec.rollout_pools:
            if pool.name == self.pool:
                return pool
        known = ", ".join(pool.name for pool in self.job.spec.rollout_pools)
        raise SpecError(
            (Violation(names.ENV_POOL, self.pool, "the job has no such rollout pool", f"It has: {known}."),)
        )


def _read_job(path: Path, wrong: list[Violation]) -> RLJob | None:
    try:
        return RLJob.model_validate_json(path.read_bytes())
    except OSError as error:
        wrong.append(Violation(names.ENV_CONFIG, str(path), f"cannot be read: {error.strerror}", "Check the path."))
    except ValidationError as error:
        for detail in error.errors():
            where = ".".join(str(part) for part in detail["loc"])
            wrong.append(
                Violation(
                    where or names.ENV_CONFIG, repr(detail["input"])[:80], detail["msg"], f"Correct it in {path}."
                )
            )
    return None
