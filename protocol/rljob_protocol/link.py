"""The NATS shell: one connection of one job. Pointers by compare-and-set, liveness, hints, and following a pointer.

Nothing here is edge-triggered: `follow` re-reads its key on a hint, after a reconnect and on a timer, so a lost message
delays and never diverges. Every operation retries over an outage until its deadline, then raises `DeadlineExceeded`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    KeyValueConfig,
    ObjectStoreConfig,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.kv import KeyValue

from rljob_api.base import WireMessage
from rljob_api.errors import DeadlineExceeded, Fenced, MalformedMessage, MessagingUnavailable, StorageFull
from rljob_api.messages import OldPolicyState, WorkerState
from rljob_api.names import OLD_POLICY_KEY_PREFIX, WORKER_KEY_PREFIX, JobNames
from rljob_api.spec import RLJobSpec
from rljob_protocol.deadlines import within

M = TypeVar("M", bound=WireMessage)
T = TypeVar("T")

OPERATION_SECONDS = 60.0
"""Default deadline of one operation: longer than a server restart."""
DUPLICATE_SECONDS = 900.0
"""How long a trajectory's second copy is recognised: longer than any outage that a run outlives."""
LEASES_A_SCORER = 64
"""Trajectories that one old-policy worker has in hand at most."""
RETRY_SECONDS = 0.25
REQUEST_SECONDS = 5.0
ATTEMPT_SECONDS = 20.0

TRANSIENT = (
    nats.errors.ConnectionClosedError,
    nats.errors.ConnectionReconnectingError,
    nats.errors.NoRespondersError,
    nats.errors.NoServersError,
    nats.errors.OutboundBufferLimitError,
    nats.errors.StaleConnectionError,
    nats.errors.TimeoutError,
    nats.errors.UnexpectedEOF,
    nats.js.errors.BucketNotFoundError,
    nats.js.errors.NoStreamResponseError,
    nats.js.errors.ServiceUnavailableError,
    asyncio.TimeoutError,
    ConnectionError,
)
"""What an outage looks like from here."""
OWNER_KEY = "rljob.dev/owner"
STREAM_FULL = frozenset({10077, 10122, 10123})
"""Error codes of a discard-new stream at its bound; the server sends them as 503, which is otherwise an outage."""
NO_SPACE = "no space left on device"
"""What the server says of its full disk, under several codes."""


@dataclass(frozen=True, slots=True)
class Versioned(Generic[M]):
    """A key's value and its revision, for compare-and-set."""

    value: M
    revision: int


@dataclass(frozen=True, slots=True)
class StateLimits:
    """Bounds of a job's streams and buckets."""

    max_tasks: int
    """Tasks queued or leased; also how many may be leased at once."""
    trajectory_bytes: int
    max_payload_bytes: int
    ahead_bytes: int = 256 << 20
    """Bound of the segment stream and of the score stream; the oldest messages are discarded at it."""
    old_policy_workers: int = 0
    """Workers that lease trajectories to score them; 0: nobody does."""
    max_steps: int = 100_000
    liveness_seconds: float = 30.0
    ack_wait_seconds: float = 15.0

    @classmethod
    def of(cls, spec: RLJobSpec) -> StateLimits:
        """Those of a job: room for the tasks of twice the groups that the staleness bound lets be in flight."""
        groups = (spec.staleness.max_versions + 1) * spec.training.tasks_per_step
        return cls(
            max_tasks=4 * groups * spec.sampling.samples_per_task,
            trajectory_bytes=spec.messaging.trajectory_stream_bytes,
            max_payload_bytes=spec.messaging.max_payload_bytes,
            old_policy_workers=0 if spec.old_policy_pool is None else spec.old_policy_pool.replicas,
        )


class Link:
    """One connection to the job's NATS server. Made with `connect`."""

    def __init__(self, names: JobNames, client: Client, logger: logging.Logger) -> None:
        self.names = names
        self.client = client
        self.jetstream: JetStreamContext = client.jetstream(timeout=REQUEST_SECONDS)
        self._logger = logger
        self._reconnected: set[asyncio.Event] = set()
        self._buckets: dict[str, KeyValue] = {}

    @classmethod
    async def connect(
        cls,
        names: JobNames,
        url: str,
        *,
        client_name: str,
        credentials: Path | None = None,
        deadline_seconds: float = 30.0,
        logger: logging.Logger | None = None,
    ) -> Link:
        """Connect, and stay connected: the client reconnects for ever.

        Raises:
            MessagingUnavailable: no server answered within the deadline, or it refused the credentials.
        """
        log = logger or logging.getLogger("rljob.link")
        client = Client()
        link = cls(names, client, log)
        connected = False

        async def reconnected() -> None:
            log.info("messaging reconnected", extra={"client": client_name})
            link._wake()

        async def disconnected() -> None:
            if link is None or not link.client.is_closed:  # not when we leave by ourselves
                log.warning("messaging lost", extra={"client": client_name})

        async def failed(error: Exception) -> None:
            log.debug("messaging error", extra={"client": client_name, "error": repr(error)})
            if not connected and "authorization" in str(error).lower():
                # The client would try these credentials for ever; what its error callback raises ends the first connect.
                raise MessagingUnavailable(f"{url} refuses these credentials: check messaging.credentialsSecretRef")

        try:
            # A client that reconnects for ever also connects for ever: the deadline is ours.
            connecting = client.connect(
                url,
                name=client_name,
                user_credentials=None if credentials is None else str(credentials),
                reconnected_cb=reconnected,
                disconnected_cb=disconnected,
                error_cb=failed,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=1,
                connect_timeout=3,
                ping_interval=5,
                max_outstanding_pings=3,
            )
            await within(deadline_seconds, connecting)
        except (TimeoutError, nats.errors.Error, OSError) as error:
            await link.close()
            raise MessagingUnavailable(
                f"no NATS server answered at {url} within {deadline_seconds:g} s: check messaging.url"
            ) from error
        except BaseException:
            await link.close()
            raise
        connected = True
        return link

    async def close(self) -> None:
        """Leave the server, if it is still there."""
        try:
            await self.client.close()
        except TRANSIENT as error:
            self._logger.debug("messaging was gone before it was left", extra={"error": repr(error)})
        except asyncio.CancelledError:
            # The client cancels its own tasks, and with them the wait for its socket's end; that is not our cancellation.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise

    # ------------------------------------------------------------------------------------------- the job's own state

    async def ensure_state(
        self, limits: StateLimits, *, owner: str = "", deadline_seconds: float = OPERATION_SECONDS
    ) -> None:
        """Create the job's streams, buckets and consumer where they are missing. Idempotent.

        Args:
            limits: bounds of what is created; of what is there, only a task stream that is too short grows.
            owner: who may sweep the state away when nobody knows the job any more; written on the task stream.
            deadline_seconds: for all of it.

        Raises:
            DeadlineExceeded: NATS was away for too long.
        """
        await self.retry("ensure_state", lambda: self._create_state(limits, owner), deadline_seconds=deadline_seconds)

    async def _create_state(self, limits: StateLimits, owner: str) -> None:
        names, manager = self.names, self.jetstream
        streams: tuple[StreamConfig, ...] = (
            StreamConfig(
                name=names.tasks_stream,
                subjects=[names.task_subject()],
                retention=RetentionPolicy.WORK_QUEUE,
                discard=DiscardPolicy.NEW,
                discard_new_per_subject=True,
                max_msgs_per_subject=1,
                max_msgs=limits.max_tasks,
                storage=StorageType.FILE,
                metadata={OWNER_KEY: owner} if owner else None,
            ),
            StreamConfig(
                name=names.trajectories_stream,
                subjects=[names.trajectory_subject()],
                retention=RetentionPolicy.LIMITS,
                discard=DiscardPolicy.NEW,
                max_bytes=limits.trajectory_bytes,
                max_msg_size=limits.max_payload_bytes,
                storage=StorageType.FILE,
                duplicate_window=DUPLICATE_SECONDS,
            ),
            StreamConfig(
                name=names.steps_stream,
                subjects=[names.steps_subject],
                retention=RetentionPolicy.LIMITS,
                discard=DiscardPolicy.OLD,
                max_msgs=limits.max_steps,
                storage=StorageType.FILE,
            ),
        )
        streams += tuple(
            StreamConfig(
                name=name,
                subjects=[subject],
                retention=RetentionPolicy.LIMITS,
                discard=DiscardPolicy.OLD,
                max_bytes=limits.ahead_bytes,
                max_msg_size=limits.max_payload_bytes,
                storage=StorageType.FILE,
            )
            for name, subject in (
                (names.segments_stream, names.segment_subject()),
                (names.scores_stream, names.score_subject()),
            )
        )
        for config in streams:
            if not await self._exists(config.name or ""):
                await manager.add_stream(config)
        longest = await self._make_room(limits)
        if not await self._exists(f"KV_{names.control_bucket}"):
            await manager.create_key_value(
                KeyValueConfig(bucket=names.control_bucket, history=1, storage=StorageType.FILE)
            )
        if not await self._exists(f"KV_{names.liveness_bucket}"):
            # On disk too: a memory bucket is gone after a restart of the server, and nobody would make it again.
            await manager.create_key_value(
                KeyValueConfig(
                    bucket=names.liveness_bucket, history=1, ttl=limits.liveness_seconds, storage=StorageType.FILE
                )
            )
        if not await self._exists(f"OBJ_{names.blob_bucket}"):
            await manager.create_object_store(names.blob_bucket, config=ObjectStoreConfig(storage=StorageType.FILE))
        # Idempotent for equal settings; the server's default of 1000 leases at once would starve a large fleet.
        await manager.add_consumer(
            names.tasks_stream,
            ConsumerConfig(
                durable_name=names.rollout_consumer,
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=limits.ack_wait_seconds,
                max_ack_pending=max(longest, 1000),
                max_deliver=-1,
            ),
        )
        if limits.old_policy_workers:
            await manager.add_consumer(
                names.trajectories_stream,
                ConsumerConfig(
                    durable_name=names.old_policy_consumer,
                    ack_policy=AckPolicy.EXPLICIT,
                    ack_wait=limits.ack_wait_seconds,
                    max_ack_pending=max(limits.old_policy_workers * LEASES_A_SCORER, 1000),
                    max_deliver=-1,
                ),
            )

    async def _make_room(self, limits: StateLimits) -> int:
        """Length of the task stream. A raised staleness bound needs a longer one; a lowered one leaves it as it is."""
        config = (await self.jetstream.stream_info(self.names.tasks_stream)).config
        if (config.max_msgs or 0) < limits.max_tasks:
            config.max_msgs = limits.max_tasks
            await self.jetstream.update_stream(config)
        return max(limits.max_tasks, config.max_msgs or 0)

    async def _exists(self, stream: str) -> bool:
        try:
            await self.jetstream.stream_info(stream)
        except nats.js.errors.NotFoundError:
            return False
        return True

    async def delete_state(self, *, deadline_seconds: float = OPERATION_SECONDS) -> None:
        """Remove everything the job keeps in NATS, its task stream last: by that a sweep finds what is left. Idempotent.

        Raises:
            DeadlineExceeded: NATS was away for too long.
        """
        names = self.names
        for stream in (
            names.trajectories_stream,
            names.steps_stream,
            names.segments_stream,
            names.scores_stream,
            f"KV_{names.control_bucket}",
            f"KV_{names.liveness_bucket}",
            f"OBJ_{names.blob_bucket}",
            names.tasks_stream,
        ):
            await self.retry("delete_state", partial(self._delete, stream), deadline_seconds=deadline_seconds)

    async def jobs_of(self, owner: str, *, deadline_seconds: float = OPERATION_SECONDS) -> tuple[JobNames, ...]:
        """All jobs on this server whose state was created for this owner.

        Raises:
            DeadlineExceeded: NATS was away for too long.
        """

        async def attempt() -> tuple[JobNames, ...]:
            found: list[JobNames] = []
            offset = 0
            while page := await self.jetstream.streams_info(offset=offset):
                offset += len(page)
                for info in page:
                    names = JobNames.of_tasks_stream(info.config.name or "")
                    if names is not None and (info.config.metadata or {}).get(OWNER_KEY) == owner:
                        found.append(names)
            return tuple(found)

        return await self.retry("jobs_of", attempt, deadline_seconds=deadline_seconds)

    async def _delete(self, stream: str) -> None:
        try:
            await self.jetstream.delete_stream(stream)
        except nats.js.errors.NotFoundError:
            return

    # ----------------------------------------------------------------------------------------------------- pointers

    async def read(
        self, key: str, kind: type[M], *, deadline_seconds: float = OPERATION_SECONDS
    ) -> Versioned[M] | None:
        """A control key's value, None when it was never written.

        Raises:
            MalformedMessage: the value is not a `kind`.
            DeadlineExceeded: NATS was away for too long.
        """
        return await self.retry(
            f"read {key}", lambda: self._read(self.names.control_bucket, key, kind), deadline_seconds=deadline_seconds
        )

    async def _read(self, bucket: str, key: str, kind: type[M]) -> Versioned[M] | None:
        try:
            entry = await (await self._bucket(bucket)).get(key)
        except nats.js.errors.KeyNotFoundError:
            return None
        if entry.value is None or entry.revision is None:
            return None
        return Versioned(kind.from_bytes(entry.value), entry.revision)

    async def write(
        self,
        key: str,
        value: WireMessage,
        *,
        expected_revision: int | None,
        deadline_seconds: float = OPERATION_SECONDS,
    ) -> int:
        """Compare-and-set of a control key; returns the new revision. `expected_revision` None: the key must not exist.

        Over an outage the answer to a write that landed can be lost; the retry then meets its own value, and that is
        reported as `Fenced`: callers that may meet it read back and compare.

        Raises:
            Fenced: another writer changed the key.
            DeadlineExceeded: NATS was away for too long.
        """

        async def attempt() -> int:
            bucket = await self._bucket(self.names.control_bucket)
            try:
                return await bucket.update(key, value.to_bytes(), last=expected_revision or 0)
            except nats.js.errors.KeyWrongLastSequenceError as error:
                raise Fenced(
                    f"{key} is no longer at revision {expected_revision}: another writer changed it, this one must stop"
                ) from error

        return await self.retry(f"write {key}", attempt, deadline_seconds=deadline_seconds)

    async def beat(self, key: str, value: WireMessage, *, deadline_seconds: float = 5.0) -> None:
        """Write a liveness key, which expires by itself.

        Raises:
            DeadlineExceeded: NATS was away for too long.
        """

        async def attempt() -> None:
            await (await self._bucket(self.names.liveness_bucket)).put(key, value.to_bytes())

        await self.retry(f"beat {key}", attempt, deadline_seconds=deadline_seconds)

    async def read_live(self, key: str, kind: type[M], *, deadline_seconds: float = 5.0) -> M | None:
        """A liveness key's value, None when there is none or it expired."""
        held = await self.retry(
            f"read {key}", lambda: self._read(self.names.liveness_bucket, key, kind), deadline_seconds=deadline_seconds
        )
        return None if held is None else held.value

    async def live_workers(self, *, deadline_seconds: float = 5.0) -> tuple[WorkerState, ...]:
        """What the workers last said of themselves, as far as it has not expired; by name."""

        return await self._live(WORKER_KEY_PREFIX, WorkerState, deadline_seconds)

    async def live_old_policy_workers(self, *, deadline_seconds: float = 5.0) -> tuple[OldPolicyState, ...]:
        """The same of the old-policy workers."""
        return await self._live(OLD_POLICY_KEY_PREFIX, OldPolicyState, deadline_seconds)

    async def _live(self, prefix: str, kind: type[M], deadline_seconds: float) -> tuple[M, ...]:
        async def attempt() -> tuple[M, ...]:
            # One look of the server's. The client's own list of keys is sent to a consumer, and misses a key that is
            # replaced meanwhile: a live worker that was not listed once was not waited for at a barrier.
            bucket = self.names.liveness_bucket
            start = f"$KV.{bucket}."
            info = await self.jetstream.stream_info(f"KV_{bucket}", subjects_filter=f"{start}{prefix}>")
            found = []
            for key in sorted(subject.removeprefix(start) for subject in info.state.subjects or {}):
                try:
                    held = await self._read(self.names.liveness_bucket, key, kind)
                except MalformedMessage as error:
                    self._logger.warning("worker state refused", extra={"key": key, "error": str(error)})
                    continue
                if held is not None:
                    found.append(held.value)
            return tuple(found)

        return await self.retry(f"read {prefix}*", attempt, deadline_seconds=deadline_seconds)

    async def _bucket(self, name: str) -> KeyValue:
        if name not in self._buckets:
            self._buckets[name] = await self.jetstream.key_value(name)
        return self._buckets[name]

    # -------------------------------------------------------------------------------------------------------- hints

    async def hint(self, subject: str) -> None:
        """Tell followers to look now. Losing it costs latency only, so an outage is ignored."""
        try:
            await within(REQUEST_SECONDS, self.client.publish(subject, b""))
        except TRANSIENT as error:
            self._logger.debug("hint was not sent", extra={"subject": subject, "error": repr(error)})

    async def follow(
        self, key: str, kind: type[M], *, hint_subject: str | None = None, interval_seconds: float = 1.0
    ) -> AsyncIterator[Versioned[M]]:
        """Yield a control key's value at each new revision, the present one first; values in between may be skipped.

        Wakes on the hint, after a reconnect and on the timer; goes on over outages for ever.
        """
        wake = asyncio.Event()

        async def woken(_: Msg) -> None:
            wake.set()

        subscription: Subscription | None = None
        self._reconnected.add(wake)
        seen = 0
        try:
            if hint_subject is not None:
                subscription = await self.client.subscribe(hint_subject, cb=woken)
            while True:
                wake.clear()
                try:
                    held = await self.read(key, kind, deadline_seconds=REQUEST_SECONDS)
                except DeadlineExceeded:
                    held = None
                except MalformedMessage as error:
                    self._logger.error("pointer refused", extra={"key": key, "error": str(error)})
                    held = None
                if held is not None and held.revision > seen:
                    seen = held.revision
                    yield held
                try:
                    async with asyncio.timeout(interval_seconds):
                        await wake.wait()
                except TimeoutError:
                    pass
        finally:
            self._reconnected.discard(wake)
            if subscription is not None and self.client.is_connected:
                await subscription.unsubscribe()

    def _wake(self) -> None:
        for event in self._reconnected:
            event.set()

    # ------------------------------------------------------------------------------------------------------ retries

    async def retry(
        self,
        what: str,
        attempt: Callable[[], Coroutine[Any, Any, T]],
        *,
        deadline_seconds: float = OPERATION_SECONDS,
        attempt_seconds: float = ATTEMPT_SECONDS,
    ) -> T:
        """Run `attempt` until it succeeds, over outages of the server; each one gets `attempt_seconds` at most.

        Raises:
            DeadlineExceeded: it did not within the deadline.
            StorageFull: the server's disk is full.
        """
        deadline = time.monotonic() + deadline_seconds
        while True:
            try:
                return await within(max(0.05, min(attempt_seconds, deadline - time.monotonic())), attempt())
            except (*TRANSIENT, nats.js.errors.APIError) as error:
                if isinstance(error, nats.js.errors.APIError) and NO_SPACE in (error.description or "").lower():
                    raise StorageFull(
                        f"{what}: the disk of the NATS server is full ({error.description}): give JetStream more file storage"
                    ) from error
                if not isinstance(error, TRANSIENT) or getattr(error, "err_code", None) in STREAM_FULL:
                    raise
                if self.client.is_closed:
                    raise MessagingUnavailable(f"{what}: the connection was closed") from error
                if time.monotonic() + RETRY_SECONDS >= deadline:
                    raise DeadlineExceeded(
                        f"{what}: NATS did not answer within {deadline_seconds:g} s ({type(error).__name__})"
                    ) from error
                await asyncio.sleep(RETRY_SECONDS)
