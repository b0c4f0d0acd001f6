"""Entry point of a trainer process, under torchrun: `-m rljob_runtime.trainer.main`, or `rljob trainer`."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from rljob_api import names
from rljob_api.base import FrozenModel
from rljob_api.correction import OldLogprobs
from rljob_api.errors import CheckpointCorrupt, RljobError
from rljob_api.messages import CheckpointPointer, PublishedVersion
from rljob_api.names import JobNames
from rljob_protocol import admission, logs
from rljob_protocol.link import Link
from rljob_protocol.streams import TaskQueue, TrajectoryLog
from rljob_runtime import termination
from rljob_runtime.accelerator import check_accelerator
from rljob_runtime.correction.averaged_policy import averaged_policy
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.model_source import materialise
from rljob_runtime.settings import RuntimeSettings
from rljob_runtime.termination import Termination
from rljob_runtime.trainer.ahead import Ahead
from rljob_runtime.trainer.audit import Auditor
from rljob_runtime.trainer.background import Background
from rljob_runtime.trainer.barrier import BarrierKeeper
from rljob_runtime.trainer.checkpoint import load_checkpoint
from rljob_runtime.trainer.dedicated import DedicatedWait
from rljob_runtime.trainer.distributed import DeviceKind, World, broadcast_bytes, distributed_world, largest
from rljob_runtime.trainer.intake import NOTHING, Intake
from rljob_runtime.trainer.leader import OUTAGE_SECONDS, Leader
from rljob_runtime.trainer.loop import Trainer
from rljob_runtime.trainer.model import Policy, build_policy, compute_dtype, full_state
from rljob_runtime.trainer.old_versions import capacity
from rljob_runtime.trainer.optimizer import build_optimizer
from rljob_runtime.trainer.probe import probe_tokens
from rljob_runtime.trainer.publisher import Publisher
from rljob_runtime.trainer.record import Recorder
from rljob_runtime.weights.choose import blob_store
from rljob_runtime.weights.encode import MODEL_FILES

COLLECTIVE_SECONDS = 600.0
PROBE_SEED = 20_605


@dataclass(frozen=True, slots=True)
class Start:
    """Where training begins, as rank 0 found it."""

    epoch: int
    version: int
    step: int
    checkpoint: str
    """Folder of the checkpoint; empty for a fresh start."""


def main() -> int:
    """Train; 0 when all steps are done or the trainer was stopped in order, 1 for an error that the log explains."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        finished = _main(rank)
    except _StoppedEarly:
        finished = False
    except RljobError as error:
        logs.configure(f"trainer-{rank}").error(
            "trainer failed", extra={"error": str(error), "kind": type(error).__name__}
        )
        _leave_word(termination.reason_of(error), 1, str(error), rank)
        return 1
    except Exception as error:  # the top of the process: torchrun would only say that a rank ended with 1
        _leave_word(termination.reason_of(error), 1, f"{type(error).__name__}: {error}", rank)
        raise
    if not finished:
        _leave_word(termination.STOPPED, 0, "stopped in order", rank)
    return 0


def _main(rank: int) -> bool:
    settings = RuntimeSettings.from_environment(os.environ)
    logger = logs.configure(f"trainer-{rank}")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    stop = _StopFlag()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop.set)
    check_accelerator(os.environ, is_available=torch.cuda.is_available())
    kind: DeviceKind = "cuda" if torch.cuda.is_available() else "cpu"
    with distributed_world(kind, timeout_seconds=COLLECTIVE_SECONDS) as world:
        finished = _train(settings, world, logger, stop)
    logger.info("trainer ended", extra={"finished": finished})
    return finished


def _leave_word(reason: str, code: int, message: str, rank: int) -> None:
    """For the pod's launcher; `rljob run` reads the log instead."""
    folder = os.environ.get(names.ENV_RANK_ENDS)
    if folder:
        end = Termination(reason, code, termination.text_of(time.time()), message, rank)
        termination.write(end, Path(folder) / f"rank-{rank}.json")


class Counters(FrozenModel):
    """Token counters of a checkpoint, as `Leader.checkpoint_state` writes them."""

    tokens_trained: int = 0
    tokens_dropped: dict[str, int] = Field(default_factory=dict)
    tokens_received: dict[str, int] = Field(default_factory=dict)
    received_up_to: int = 0
    rolled_back: tuple[int, ...] = ()


class _StoppedEarly(BaseException):
    """A stop order before training began: there is nothing to checkpoint, and what is waited for may never come."""


class _StopFlag:
    """Set by a signal; rank 0's leader passes it on."""

    def __init__(self) -> None:
        self.leader: Leader | None = None
        self.is_training = False

    def set(self, *_: object) -> None:
        if not self.is_training:
            raise _StoppedEarly
        if self.leader is not None:
            self.leader.stop_requested = True


def _train(settings: RuntimeSettings, world: World, logger: logging.Logger, stop: _StopFlag) -> bool:
    spec = settings.job.spec
    if settings.checkpoint_dir is None:
        raise RljobError("no checkpoint directory is configured: the trainer cannot be resumed without one")
    torch.manual_seed(spec.training.seed + world.rank)
    model_directory = _model_directory(settings, world)
    policy = build_policy(
        model_directory, compute_type=spec.training.compute_type, device=world.device, mesh=world.mesh
    )
    optimizer = build_optimizer(policy, spec.training)
    average = averaged_policy(spec.correction, policy)
    room = capacity(spec, policy, world)
    kept = spec.correction.snapshots
    snapshots = SnapshotStore(
        compute_dtype(spec.training.compute_type),
        memory_bytes=kept.memory_bytes,
        spill_directory=settings.cache_dir / f"snapshots-{world.rank}" if kept.spill else None,
    )
    background = Background() if world.is_main else None
    publisher: Publisher | None = None
    link: Link | None = None
    try:
        if background is not None:
            link = background.call(_connect(settings, logger), deadline_seconds=60)
            store = blob_store(link, settings.weights_dir)
            publisher = background.call(Publisher.claim(link, store, logger), deadline_seconds=OUTAGE_SECONDS)
        start = _agree_on_start(publisher, world)
        ledger, counters = admission.new_ledger(), dict[str, object]()
        if start.checkpoint:
            state = load_checkpoint(settings.checkpoint_dir / start.checkpoint, policy, optimizer, world, average)
            if state.step != start.step:
                raise CheckpointCorrupt(
                    f"checkpoint {start.checkpoint} is of step {state.step}, its pointer says {start.step}"
                )
            if world.is_main:
                ledger = admission.on_resume(admission.ledger_from_json(state.ledger), start.version)
                counters = dict(state.counters)
            logger.info("resumed", extra={"step": start.step, "weight_version": start.version, "epoch": start.epoch})
        leader: Leader | None = None
        if background is not None and link is not None and publisher is not None:
            leader = _make_leader(
                settings, background, link, publisher, ledger, counters, model_directory, logger, world.size
            )
            stop.leader = leader
        trainer = Trainer(
            spec=spec,
            world=world,
            policy=policy,
            optimizer=optimizer,
            snapshots=snapshots,
            average=average,
            capacity=room,
            auditor=Auditor(
                spec,
                policy,
                snapshots,
                world,
                fetch_version=lambda version: None if leader is None else leader.fetch_version(version),
                scratch=settings.cache_dir / "audited",
            ),
            leader=leader,
            checkpoint_root=settings.checkpoint_dir,
            scratch=settings.cache_dir / "versions",
            probe_tokens=probe_tokens(policy.vocab_size, PROBE_SEED, num=_probe_length(settings)),
            epoch=start.epoch,
            version=start.version,
            step=start.step,
        )
        stop.is_training = True
        finished = trainer.run()
        if finished:
            _write_final_model(policy, settings.checkpoint_dir / "final", model_directory)
        if leader is not None:
            leader.finish(finished=finished)
        return finished
    finally:
        snapshots.close()
        if background is not None:
            background.cancel_tasks()
            if link is not None:
                background.call(link.close(), deadline_seconds=10)
            background.stop()


def _probe_length(settings: RuntimeSettings) -> int:
    return min(64, settings.job.spec.sampling.max_trajectory_tokens - 1)


def _model_directory(settings: RuntimeSettings, world: World) -> Path:
    """One process of each node makes or finds the model, before the others of its node look for it. Collective."""

    def found() -> Path:
        folder = settings.cache_dir / "model"
        return materialise(settings.job.spec.model, folder, mounted=settings.model_dir)

    first = found() if world.local_rank == 0 else None
    largest(0, world.device)
    return first or found()


def _agree_on_start(publisher: Publisher | None, world: World) -> Start:
    """Epoch, version, step and checkpoint that rank 0 read from the KV, on every rank."""
    data: bytes | None = None
    if publisher is not None:
        published: PublishedVersion | None = publisher.published
        pointer: CheckpointPointer | None = publisher.checkpoint
        version = 0 if published is None else published.version + 1
        data = json.dumps(
            {
                "epoch": publisher.epoch,
                "version": version,
                "step": 0 if pointer is None else pointer.step,
                "checkpoint": "" if pointer is None else pointer.directory,
            }
        ).encode()
    return Start(**json.loads(broadcast_bytes(data, world.device)))


async def _connect(settings: RuntimeSettings, logger: logging.Logger) -> Link:
    return await Link.connect(
        JobNames(settings.uid),
        settings.nats_url,
        client_name="trainer",
        credentials=settings.credentials,
        logger=logger,
    )


def _make_leader(
    settings: RuntimeSettings,
    background: Background,
    link: Link,
    publisher: Publisher,
    ledger: admission.Ledger,
    counters: dict[str, object],
    model_directory: Path,
    logger: logging.Logger,
    world_size: int,
) -> Leader:
    spec = settings.job.spec
    store = blob_store(link, settings.weights_dir)
    files = background.call(publisher.publish_model_files(model_directory), deadline_seconds=OUTAGE_SECONDS)
    recorder = None
    if settings.record_dir is not None and settings.record_bytes > 0:
        recorder = Recorder(
            settings.record_dir,
            max_bytes=settings.record_bytes,
            temperature=spec.sampling.temperature,
            compute_type=spec.training.compute_type.value,
            logger=logger,
        )
        recorder.add_model_files(files, model_directory)
    counted = Counters.model_validate(counters)
    ahead = Ahead.of(spec, link, logger)
    dedicated = None
    if ahead is not None and spec.correction.old_logprobs is OldLogprobs.DEDICATED:
        timeout = spec.correction.dedicated_timeout_seconds
        dedicated = DedicatedWait(link, ahead.pool, timeout_seconds=timeout, logger=logger)
        ahead.on_scores = dedicated.told
    intake = Intake(
        spec=spec,
        epoch=publisher.epoch,
        ledger=ledger,
        cursor=0 if publisher.checkpoint is None else publisher.checkpoint.cursor,
        totals=replace(
            NOTHING,
            dropped=counted.tokens_dropped,
            received=counted.tokens_received,
            received_up_to=counted.received_up_to,
            rolled_back=counted.rolled_back,
        ),
        tasks=TaskQueue(link),
        log=TrajectoryLog(link),
        logger=logger,
        ahead=ahead,
        may_train=(lambda _: True) if dedicated is None else dedicated.may_train,
    )
    barrier = None
    if spec.correction.old_logprobs is OldLogprobs.INTERRUPTION:
        barrier = BarrierKeeper(
            link=link,
            epoch=publisher.epoch,
            timeout_seconds=spec.correction.barrier_timeout_seconds,
            read_up_to=intake.read_up_to,
            logger=logger,
        )
    return Leader(
        background=background,
        link=link,
        publisher=publisher,
        intake=intake,
        store=store,
        cache=settings.cache_dir / "versions",
        tokens_trained=counted.tokens_trained,
        spec=spec,
        model_files=files,
        recorder=recorder,
        logger=logger,
        world_size=world_size,
        ahead=ahead,
        barrier=barrier,
        dedicated=dedicated,
    )


def _write_final_model(policy: Policy, directory: Path, model_directory: Path) -> None:
    """The trained model as a model directory of its own. Collective."""
    state = full_state(policy)
    if not state:
        return
    temporary = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in MODEL_FILES:
        if (model_directory / name).is_file():
            shutil.copyfile(model_directory / name, temporary / name)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / "model.safetensors")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)


if __name__ == "__main__":
    code = main()
    # All is written and closed. Python's own finalisation is left out: with torch's threads it was seen to hang, the job
    # all trained, until torchrun killed the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
