"""Tasks, trajectories and step reports on JetStream: leases, a bounded log read by cursor, back-pressure."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg

from rljob_api.errors import DeadlineExceeded, MalformedMessage
from rljob_api.messages import StepReport, Task
from rljob_protocol.deadlines import within
from rljob_protocol.link import ATTEMPT_SECONDS, OPERATION_SECONDS, REQUEST_SECONDS, STREAM_FULL, TRANSIENT, Link
from rljob_protocol.message_log import BACK_PRESSURE_SECONDS, MessageLog

SUBJECT_TAKEN = "maximum messages per subject exceeded"
UNCLAIMED_SECONDS = 0.1
ACKNOWLEDGE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ClaimedTask:
    """A leased sample: extend it while it runs, then ack or release it."""

    task: Task
    attempt: int
    """1 for the first delivery."""
    _message: Msg
    _link: Link

    async def ack(self) -> None:
        """The sample ended and its trajectory is stored: forget the task.

        Raises:
            DeadlineExceeded: the server does not confirm it, as it does for ever when a crash has taken this lease out of
                its memory. The sample is given out again then, and its second trajectory counts as a duplicate.
        """
        await self._link.retry(
            "ack task", lambda: self._message.ack_sync(timeout=3), deadline_seconds=ACKNOWLEDGE_SECONDS
        )

    async def extend(self) -> None:
        """Keep the lease; losing one call is harmless."""
        try:
            await within(REQUEST_SECONDS, self._message.in_progress())
        except TRANSIENT:
            return

    async def release(self, delay_seconds: float = 0.0) -> None:
        """Give the sample back, to be delivered again after the delay."""
        try:
            await within(REQUEST_SECONDS, self._message.nak(delay=delay_seconds or None))
        except TRANSIENT:
            return  # the lease expires by itself


class TaskQueue:
    """The work queue of samples. At most one message a (task, sample), queued or leased: re-publishing is idempotent."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._subscription: nats.js.JetStreamContext.PullSubscription | None = None
        self.malformed = 0
        """Tasks that did not decode: removed and counted."""

    async def publish(self, task: Task, *, deadline_seconds: float = OPERATION_SECONDS) -> bool:
        """Queue a sample; False when it is already queued or leased. Waits while the stream is full.

        Raises:
            DeadlineExceeded: the stream stayed full, or NATS was away, for too long.
        """
        subject = self._link.names.task_subject(task.task, task.sample)
        deadline = time.monotonic() + deadline_seconds
        while True:
            try:
                await self._link.retry(
                    "publish task",
                    lambda: self._link.jetstream.publish(subject, task.to_bytes()),
                    deadline_seconds=max(0.1, deadline - time.monotonic()),
                )
            except DeadlineExceeded as error:
                raise DeadlineExceeded(
                    f"task {task.task}/{task.sample}: NATS did not take it within {deadline_seconds:g} s"
                ) from error
            except nats.js.errors.APIError as error:
                if error.err_code not in STREAM_FULL:
                    raise
                if SUBJECT_TAKEN in (error.description or ""):
                    return False
            else:
                return True
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"task {task.task}/{task.sample}: the task stream stayed full for {deadline_seconds:g} s"
                )
            await asyncio.sleep(BACK_PRESSURE_SECONDS)

    async def claim(self, max_tasks: int, wait_seconds: float) -> list[ClaimedTask]:
        """Lease up to `max_tasks` samples; empty when none came within `wait_seconds` or NATS is away."""
        try:
            if self._subscription is None:
                names = self._link.names
                binding = self._link.jetstream.pull_subscribe_bind(
                    consumer=names.rollout_consumer, stream=names.tasks_stream
                )
                self._subscription = await within(ATTEMPT_SECONDS, binding)
            fetching = self._subscription.fetch(max_tasks, timeout=wait_seconds)
            messages = await within(wait_seconds + REQUEST_SECONDS, fetching)
        except TRANSIENT:
            return []
        except nats.js.errors.APIError:
            await asyncio.sleep(BACK_PRESSURE_SECONDS)  # the server is coming back and does not know the consumer yet
            return []
        claimed = []
        for message in messages:
            try:
                task = Task.from_bytes(message.data)
            except MalformedMessage:
                self.malformed += 1
                await within(REQUEST_SECONDS, message.term())
                continue
            claimed.append(ClaimedTask(task, message.metadata.num_delivered, message, self._link))
        return claimed

    async def release_unclaimed(self) -> None:
        """Give back samples that the server sent after their claim had ended: else they wait for their lease to run out.

        For the end of a worker, when it claims no more.
        """
        while self._subscription is not None and self._subscription.pending_msgs:
            for claimed in await self.claim(1, UNCLAIMED_SECONDS):
                await claimed.release()

    async def withdraw(self, first_task: int) -> int:
        """Remove samples of `first_task` and later ones, queued or leased; how many tasks that were.

        Their admitter died: what they say of the version they need holds no longer. A worker that works on one goes on.
        """
        names, manager = self._link.names, self._link.jetstream
        info = await self._link.retry(
            "list tasks", lambda: manager.stream_info(names.tasks_stream, subjects_filter=names.task_subject())
        )
        numbers = {int(subject.split(".")[-2]) for subject in info.state.subjects or {}}
        withdrawn = sorted(number for number in numbers if number >= first_task)
        for number in withdrawn:
            subject = names.task_subject(number)
            await self._link.retry("withdraw tasks", partial(manager.purge_stream, names.tasks_stream, subject=subject))
        return len(withdrawn)

    async def depth(self) -> int:
        """Samples queued or leased."""
        info = await self._link.retry(
            "task depth", lambda: self._link.jetstream.stream_info(self._link.names.tasks_stream)
        )
        return int(info.state.messages)


class TrajectoryLog(MessageLog):
    """The bounded log of finished samples, read by cursor and cut off below the checkpointed one."""

    def __init__(self, link: Link) -> None:
        super().__init__(link, link.names.trajectories_stream)

    async def append(self, task: int, sample: int, data: bytes, *, deadline_seconds: float = 3600.0) -> int:
        """Store a trajectory, once, and return its sequence. Waits while the log is full: back-pressure on the worker.

        The same bytes again within DUPLICATE_SECONDS are not stored again: the sequence is that of the first.

        Raises:
            DeadlineExceeded: the log stayed full, or NATS was away, for too long.
        """
        subject = self._link.names.trajectory_subject(task, sample)
        # Over an outage the client buffers every attempt and sends them all when it is back: stored twice, a trajectory's
        # tokens would arrive more often than they were delivered.
        once = {"Nats-Msg-Id": f"{task}-{sample}-{hashlib.sha256(data).hexdigest()}"}
        deadline = time.monotonic() + deadline_seconds
        while True:
            try:
                stored = await self._link.retry(
                    "append trajectory",
                    lambda: self._link.jetstream.publish(subject, data, timeout=10, headers=once),
                    deadline_seconds=max(0.1, deadline - time.monotonic()),
                )
            except DeadlineExceeded as error:
                raise DeadlineExceeded(
                    f"trajectory {task}/{sample}: NATS did not take it within {deadline_seconds:g} s"
                ) from error
            except nats.js.errors.APIError as error:
                if error.err_code not in STREAM_FULL:
                    raise
            else:
                return stored.seq
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"trajectory {task}/{sample}: the log stayed full for {deadline_seconds:g} s: the trainer does not "
                    "checkpoint, or messaging.trajectoryStreamBytes is too small"
                )
            await asyncio.sleep(BACK_PRESSURE_SECONDS)


class StepLog:
    """The step reports, oldest first; the oldest are discarded at the bound."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def append(self, report: StepReport) -> None:
        """Add a step's report; one step of one epoch is stored once."""
        await self._link.retry(
            "append step report",
            lambda: self._link.jetstream.publish(
                self._link.names.steps_subject,
                report.to_bytes(),
                headers={"Nats-Msg-Id": f"{report.epoch}-{report.step}"},
            ),
        )

    async def follow(self) -> AsyncIterator[StepReport]:
        """Each report from the oldest kept on, for ever."""
        stream = self._link.names.steps_stream
        cursor = 0
        while True:
            try:
                info = await within(ATTEMPT_SECONDS, self._link.jetstream.stream_info(stream))
                cursor = max(cursor, int(info.state.first_seq) - 1)
                while cursor < int(info.state.last_seq):
                    message = await within(ATTEMPT_SECONDS, self._link.jetstream.get_msg(stream, seq=cursor + 1))
                    cursor += 1
                    if message.data is not None:
                        yield StepReport.from_bytes(message.data)
            except nats.js.errors.NotFoundError:
                cursor += 1
            except (*TRANSIENT, nats.js.errors.APIError):
                pass
            await asyncio.sleep(0.25)

    async def read_all(self) -> list[StepReport]:
        """All reports kept right now."""
        info = await self._link.retry(
            "step reports", lambda: self._link.jetstream.stream_info(self._link.names.steps_stream)
        )
        last = int(info.state.last_seq)
        reports: list[StepReport] = []
        if int(info.state.messages) == 0:
            return reports
        async for report in self.follow():
            reports.append(report)
            if len(reports) >= int(info.state.messages) or report is None or last == 0:
                break
        return reports
