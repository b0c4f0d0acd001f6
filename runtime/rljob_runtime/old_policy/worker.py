"""The shell of an old-policy worker: leases trajectories, scores them, stores the scores, and only then lets go of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from rljob_api.errors import DeadlineExceeded, MalformedMessage, ProtocolError, RljobError, SpecError
from rljob_api.messages import OldPolicyState, Outcome
from rljob_api.names import old_policy_key
from rljob_protocol.ahead import ScoreLog
from rljob_protocol.claims import ClaimedTrajectory, TrajectoryClaims
from rljob_protocol.deadlines import end
from rljob_protocol.link import LEASES_A_SCORER, Link
from rljob_protocol.logs import fields
from rljob_runtime.old_policy.in_hand import InHand
from rljob_runtime.old_policy.plan import Part, Standing, Turn, next_pass
from rljob_runtime.old_policy.scorer import Scorer
from rljob_runtime.old_policy.versions import Versions
from rljob_runtime.rollout.readiness import Readiness
from rljob_runtime.score_codec import encode_scores
from rljob_runtime.settings import RuntimeSettings
from rljob_runtime.trajectory_codec import decode_trajectory
from rljob_runtime.weights.blobs import BlobStore

EXIT_STOPPED = 0
EXIT_RESTART = 70
"""The worker broke: the host starts a new incarnation."""
EXIT_CONFIGURATION = 78
"""The job is wrong for this worker: another incarnation would end the same way."""
MICRO_BATCHES_A_PASS = 8
"""After so many the worker looks up: who has the next turn, and is it told to stop."""
VERSION_WAIT_SECONDS = 120.0
"""How long a trajectory waits for a version that is published and not here."""
CLAIM_SECONDS = 1.0
BEAT_SECONDS = 1.0
BACKLOG_SECONDS = 2.0
IDLE_SECONDS = 1.0
LAST_REPORT_SECONDS = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    """Why the worker stops."""

    code: int
    reason: str


class OldPolicyWorker:
    """One incarnation of one worker, from its start to its exit code.

    Produces: scores; its own state, once a second.
    Consumes: trajectories, leased until their scores are stored; the trainer's pointers; weight blobs.
    Waits for: the first published version; then trajectories, and versions that their tokens name.
    Unblocked by: rollout workers and the trainer, hints and timers; ended by `request_drain`.
    """

    def __init__(
        self,
        settings: RuntimeSettings,
        link: Link,
        claims: TrajectoryClaims,
        scores: ScoreLog,
        store: BlobStore,
        scorer: Scorer,
        *,
        lease_seconds: float,
    ) -> None:
        spec = settings.job.spec
        self._settings = settings
        self._link = link
        self._claims = claims
        self._scores = scores
        self._scorer = scorer
        self._lease_seconds = lease_seconds
        self._max_tokens = MICRO_BATCHES_A_PASS * spec.training.tokens_per_micro_batch
        self._thread = ThreadPoolExecutor(1, "scorer")
        self._wake = asyncio.Event()
        self._versions = Versions(
            link,
            store,
            scorer,
            self._in_thread,
            settings.cache_dir / "versions",
            max_versions=spec.staleness.max_versions,
            changed=self._wake.set,
        )
        self._readiness = Readiness(settings.ready_file, spec.staleness.max_versions)
        self._in_hand: dict[int, InHand] = {}
        self._turn: Turn | None = None
        self._drain = asyncio.Event()
        self._end: asyncio.Future[_End] | None = None
        self._started_at = time.monotonic()
        self._busy_seconds = 0.0
        self._revision = 0
        self._trajectories_scored = 0
        self._tokens_scored = 0
        self._given_up: Counter[str] = Counter()
        self._backlog = 0
        self.end_reason = ""
        """Why `run` returned."""
        self._logger = logging.getLogger(__name__)

    def request_drain(self) -> None:
        """Stop cleanly: what SIGTERM asks for. Safe to call from a signal handler of the loop, and more than once."""
        self._drain.set()
        self._wake.set()

    async def run(self) -> int:
        """Work until drained or broken; the process's exit code. The last state is written before it returns."""
        self._end = asyncio.get_running_loop().create_future()
        tasks = [
            asyncio.create_task(self._guarded(work))
            for work in (
                self._versions.run(),
                self._claim_loop(),
                self._score_loop(),
                self._extend_loop(),
                self._report_loop(),
                self._count_backlog(),
            )
        ]
        try:
            ended = await self._end
            self.end_reason = ended.reason
            self._readiness.end()
            await end(*tasks)
            await asyncio.gather(*(held.claimed.release() for held in self._in_hand.values()))
            await self._claims.release_unclaimed()
            await self._report_end(ended)
            return ended.code
        finally:
            await end(*tasks)
            await self._in_thread(self._scorer.close)
            self._thread.shutdown()

    # ------------------------------------------------------------------------------------------------------- leases

    async def _claim_loop(self) -> None:
        """Produces: trajectories in hand. Consumes: the stream. Waits for: room, and a version. Unblocked by: scores."""
        while True:
            room = LEASES_A_SCORER - len(self._in_hand)
            if self._drain.is_set() or room <= 0 or not self._versions.ready:
                await asyncio.sleep(0.05)
                continue
            for claimed in await self._claims.claim(room, CLAIM_SECONDS):
                await self._take(claimed)
            self._wake.set()

    async def _take(self, claimed: ClaimedTrajectory) -> None:
        held = self._in_hand.get(claimed.sequence)
        if held is not None:
            held.claimed = claimed  # its lease ran out while it waited: the later one counts
            return
        try:
            trajectory = decode_trajectory(claimed.data)
        except MalformedMessage as error:
            self._given_up["Malformed"] += 0  # its tokens are not known; the trainer refuses it, too
            self._logger.warning("trajectory refused", extra=fields(sequence=claimed.sequence, error=str(error)))
            await self._let_go(claimed)
            return
        if trajectory.header.outcome is Outcome.ENVIRONMENT_FAILED:
            await self._let_go(claimed)  # never trained
            return
        self._in_hand[claimed.sequence] = InHand.take(claimed, trajectory, time.monotonic())

    async def _extend_loop(self) -> None:
        """Produces: leases that go on. Consumes: nothing. Waits for: a third of a lease. Unblocked by: that timer."""
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            await asyncio.gather(*(held.claimed.extend() for held in tuple(self._in_hand.values())))

    async def _let_go(self, claimed: ClaimedTrajectory) -> None:
        try:
            await claimed.ack()
        except DeadlineExceeded as error:
            self._logger.warning("lease was not given up", extra=fields(sequence=claimed.sequence, error=str(error)))

    # -------------------------------------------------------------------------------------------------------- scoring

    async def _score_loop(self) -> None:
        """Produces: scores, and the end of a drain. Consumes: trajectories in hand. Waits for: both, and versions.

        Unblocked by: a claim, a version, a drain request, or a timer that gives up what does not come.
        """
        while True:
            self._wake.clear()
            self._give_up_what_cannot_come()
            await self._store_finished()
            if self._drain.is_set():
                self._stop(EXIT_STOPPED, "drained")
                return
            waiting = [part for held in self._in_hand.values() for part in held.open.values()]
            planned = next_pass(waiting, self._turn, ready=self._versions.ready, max_tokens=self._max_tokens)
            if planned is not None:
                self._turn, parts = planned
                await self._run_pass(self._turn.version, parts)
                continue
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _run_pass(self, version: int, parts: tuple[Part, ...]) -> None:
        started = time.monotonic()
        rows = [self._in_hand[part.sequence].row(part) for part in parts]
        scored = await self._in_thread(self._scorer.score, version, rows)
        for part, logprobs in zip(parts, scored, strict=True):
            self._tokens_scored += self._in_hand[part.sequence].fill(part, logprobs)
        self._busy_seconds += time.monotonic() - started

    def _give_up_what_cannot_come(self) -> None:
        now = time.monotonic()
        for held in self._in_hand.values():
            for part in tuple(held.open.values()):
                standing = self._versions.standing(part.version)
                waits = standing is Standing.COMING and now - held.since < VERSION_WAIT_SECONDS
                if standing is Standing.READY or waits:
                    continue
                reason = {Standing.OVER_BOUND: "OverBound", Standing.GONE: "VersionGone"}.get(standing, "VersionLate")
                tokens = held.give_up(part)
                self._given_up[reason] += tokens
                if standing is not Standing.OVER_BOUND:
                    self._logger.warning(
                        "tokens cannot be scored",
                        extra=fields(
                            trajectory=f"{held.trajectory.header.task}/{held.trajectory.header.sample}",
                            weight_version=part.version,
                            tokens=tokens,
                            reason=reason,
                        ),
                    )

    async def _store_finished(self) -> None:
        finished = [held for held in self._in_hand.values() if not held.open]
        await asyncio.gather(*(self._store(held) for held in finished))

    async def _store(self, held: InHand) -> None:
        """Scores first, then the lease: a worker that dies in between scores twice, and loses nothing."""
        header = held.trajectory.header
        try:
            await self._scores.append(header.task, header.sample, encode_scores(held.scores(self._settings.worker)))
        except DeadlineExceeded as error:  # an outage: the next round tries again
            self._logger.warning("scores were not stored", extra=fields(error=str(error)))
            return
        await self._let_go(held.claimed)
        del self._in_hand[held.claimed.sequence]
        self._trajectories_scored += 1

    # -------------------------------------------------------------------------------------------------------- reports

    async def _report_loop(self) -> None:
        """Produces: the worker's state, and its readiness. Consumes: counters. Waits for: a second. Unblocked by: that."""
        while True:
            self._readiness.max_versions = self._versions.max_versions
            self._readiness.update(self._versions.newest, self._versions.published)
            await self._report("")
            await asyncio.sleep(BEAT_SECONDS)

    async def _count_backlog(self) -> None:
        while True:
            try:
                self._backlog = await self._claims.backlog()
            except ProtocolError as error:
                self._logger.warning("the backlog could not be read", extra=fields(error=str(error)))
            await asyncio.sleep(BACKLOG_SECONDS)

    async def _report(self, message: str) -> None:
        self._revision += 1
        newest = self._versions.newest
        seconds = time.monotonic() - self._started_at
        state = OldPolicyState(
            worker=self._settings.worker,
            incarnation=self._settings.incarnation,
            revision=self._revision,
            epoch=0 if newest is None else newest.epoch,
            version=None if newest is None else newest.version,
            trajectories_scored=self._trajectories_scored,
            tokens_scored=self._tokens_scored,
            backlog=self._backlog,
            busy_share=min(1.0, self._busy_seconds / seconds) if seconds > 0 else 0.0,
            message=message or self._message(),
        )
        try:
            await self._link.beat(old_policy_key(self._settings.worker), state)
        except ProtocolError as error:  # an outage; the next report carries all that happened meanwhile
            self._logger.warning("the state could not be written", extra=fields(error=str(error)))

    def _message(self) -> str:
        if self._versions.last_error:
            return self._versions.last_error
        if self._versions.newest is None:
            return "waiting for the first published version"
        lost = {reason: tokens for reason, tokens in sorted(self._given_up.items()) if tokens}
        return (
            "tokens not scored: " + ", ".join(f"{tokens} {reason}" for reason, tokens in lost.items()) if lost else ""
        )

    async def _report_end(self, ended: _End) -> None:
        self._logger.log(
            logging.INFO if ended.code == EXIT_STOPPED else logging.ERROR,
            "stopped",
            extra=fields(
                exit_code=ended.code,
                reason=ended.reason,
                trajectories_scored=self._trajectories_scored,
                tokens_scored=self._tokens_scored,
                tokens_given_up=dict(self._given_up),
            ),
        )
        try:
            async with asyncio.timeout(LAST_REPORT_SECONDS):
                await self._report(ended.reason)
        except TimeoutError:
            self._logger.warning("the last state could not be written")

    # -------------------------------------------------------------------------------------------------------- the end

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Let a failure end the worker in order, with a word about it."""
        try:
            await work
        except Exception as error:  # the top of every task
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            if not isinstance(error, RljobError):
                self._logger.exception("a task of the worker failed")
                self._stop(EXIT_RESTART, f"{type(error).__name__}: {error}")
            else:
                self._stop(EXIT_CONFIGURATION if isinstance(error, SpecError) else EXIT_RESTART, str(error))

    def _stop(self, code: int, reason: str) -> None:
        assert self._end is not None
        if not self._end.done():
            self._end.set_result(_End(code, reason))

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """On the scorer's thread, in the order of the calls."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*arguments))
