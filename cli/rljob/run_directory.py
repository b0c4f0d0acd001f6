"""Where a run keeps what it makes. Everything of a run is below one folder, so it can be moved, resumed or deleted whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rljob_api.errors import BadInput, RljobError, StorageError
from rljob_api.messages import StepReport, WorkerState
from rljob_api.spec import RLJob


@dataclass(frozen=True, slots=True)
class RunInfo:
    """run.json: what a resume and the report need to know of a run."""

    uid: str
    name: str
    created: str
    attempts: int


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run."""

    root: Path

    @property
    def job_file(self) -> Path:
        return self.root / "job.json"

    @property
    def info_file(self) -> Path:
        return self.root / "run.json"

    @property
    def nats(self) -> Path:
        return self.root / "nats"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def record(self) -> Path:
        return self.root / "record"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def steps_file(self) -> Path:
        return self.root / "steps.jsonl"

    @property
    def workers_file(self) -> Path:
        return self.root / "workers.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.root / "summary.json"

    @property
    def report_file(self) -> Path:
        return self.root / "report.html"

    def cache(self, process: str) -> Path:
        """Private scratch of one process."""
        return self.root / "cache" / process

    def create(self, job: RLJob, uid: str) -> RunInfo:
        """Lay out a new run.

        Raises:
            BadInput: the folder holds a run already.
            StorageError: it cannot be written.
        """
        if self.info_file.exists():
            raise BadInput(
                f"{self.root} holds a run already: go on with it by --resume {self.root}, or choose another --run-dir"
            )
        info = RunInfo(uid, job.metadata.name, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), 1)
        try:
            for folder in (self.root, self.logs, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            self.job_file.write_text(job.model_dump_json(by_alias=True, indent=2, exclude_unset=True) + "\n")
            self.write_info(info)
        except OSError as error:
            raise StorageError(f"{self.root} cannot be written ({error.strerror}): choose another --run-dir") from error
        return info

    def write_info(self, info: RunInfo) -> None:
        """Write run.json."""
        self.info_file.write_text(json.dumps(asdict(info), indent=2) + "\n")

    def read_info(self) -> RunInfo:
        """Read run.json.

        Raises:
            BadInput: this is not the folder of a run.
        """
        try:
            return RunInfo(**json.loads(self.info_file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{self.root} is not the folder of a run: it has no readable run.json") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time runs the run in this folder.

        Raises:
            BadInput: another one does.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / "lock").open("w")
        except OSError as error:
            raise StorageError(f"{self.root} cannot be written ({error.strerror}): choose another --run-dir") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BadInput(f"{self.root} is being run by another process: wait for it, or stop it") from error
            yield

    def read_job(self) -> RLJob:
        """The resolved RLJob of the run."""
        try:
            return RLJob.model_validate_json(self.job_file.read_bytes())
        except (OSError, ValueError) as error:
            raise RljobError(f"{self.job_file} cannot be read: {error}") from error

    def read_steps(self) -> list[StepReport]:
        """Reports of the steps that count, in order: what a later epoch trained anew, and all after it, replaces the earlier."""
        if not self.steps_file.exists():
            return []
        reports = [StepReport.from_bytes(line) for line in self.steps_file.read_bytes().splitlines()]
        counting: list[StepReport] = []
        for report in sorted(reports, key=lambda report: (report.epoch, report.step)):
            while counting and counting[-1].step >= report.step:
                counting.pop()
            counting.append(report)
        return counting

    def read_workers(self) -> list[WorkerState]:
        """Last word of each worker incarnation."""
        if not self.workers_file.exists():
            return []
        return [WorkerState.from_bytes(line) for line in self.workers_file.read_bytes().splitlines()]

    def write_workers(self, states: Sequence[WorkerState]) -> None:
        """Write workers.jsonl anew, all of it or nothing."""
        temporary = self.workers_file.with_suffix(".partial")
        temporary.write_bytes(b"".join(state.to_bytes() + b"\n" for state in states))
        os.replace(temporary, self.workers_file)
