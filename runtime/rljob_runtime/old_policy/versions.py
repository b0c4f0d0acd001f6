"""The weight versions that an old-policy worker holds: those whose tokens a step may still train.

Level-triggered: what is wanted is read from the trainer's pointers whenever they change, after a reconnect and on a timer;
what is missing is fetched, what is no longer wanted is dropped.

    produces    versions held by the scorer
    consumes    the keys `retained`, `published` and `settings`; weight blobs
    waits for   a change of what is wanted; the scorer's thread
    unblocked by  the keys, hints, and a timer that tries again what failed
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from rljob_api.errors import ProtocolError, StorageError
from rljob_api.messages import JobSettings, PublishedVersion, RetainedVersions
from rljob_api.names import KEY_PUBLISHED, KEY_RETAINED, KEY_SETTINGS
from rljob_protocol.link import Link
from rljob_protocol.logs import fields
from rljob_runtime.old_policy.plan import Standing, standing, wanted_versions
from rljob_runtime.old_policy.scorer import Scorer
from rljob_runtime.weights.blobs import BlobStore
from rljob_runtime.weights.fetch import fetch_manifest, fetch_model_files, fetch_weights

SETTINGS_SECONDS = 5.0
AGAIN_SECONDS = 1.0

InThread = Callable[..., Awaitable[None]]
"""`await in_thread(function, *arguments)` runs it on the scorer's thread."""


class Versions:
    """Which versions there are, which are here, and what follows for their tokens."""

    def __init__(
        self,
        link: Link,
        store: BlobStore,
        scorer: Scorer,
        in_thread: InThread,
        cache: Path,
        *,
        max_versions: int,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called on the loop whenever a version came or went."""
        self._link = link
        self._store = store
        self._scorer = scorer
        self._in_thread = in_thread
        self._cache = cache
        self._max_versions = max_versions
        self._changed = changed
        self._wake = asyncio.Event()
        self._retained: dict[int, PublishedVersion] = {}
        self._held: dict[int, PublishedVersion] = {}
        self._logger = logging.getLogger(__name__)
        self.published: PublishedVersion | None = None
        """The newest that was announced."""
        self.last_error = ""
        """Why a version could not be fetched, while that is so."""

    @property
    def ready(self) -> frozenset[int]:
        """Versions that can be scored with now."""
        return frozenset(self._held)

    @property
    def newest(self) -> PublishedVersion | None:
        """The newest of them."""
        return self._held[max(self._held)] if self._held else None

    @property
    def max_versions(self) -> int:
        """Bound on the staleness of a trained token; may change while the job runs."""
        return self._max_versions

    def standing(self, version: int) -> Standing:
        """What can be done with the tokens of a version now."""
        return standing(version, retained=self._retained, held=self._held, max_versions=self._max_versions)

    async def run(self) -> None:
        """Follow and fetch until cancelled.

        Raises:
            EngineError: a version's values are not the trainer's.
            SpecError: the model cannot be built.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_retained())
            group.create_task(self._follow_published())
            group.create_task(self._follow_settings())
            group.create_task(self._keep_up())

    async def _follow_retained(self) -> None:
        hint = self._link.names.published_hint
        async for seen in self._link.follow(KEY_RETAINED, RetainedVersions, hint_subject=hint):
            self._retained = {version.version: version for version in seen.value.versions}
            self._notify()

    async def _follow_published(self) -> None:
        hint = self._link.names.published_hint
        async for seen in self._link.follow(KEY_PUBLISHED, PublishedVersion, hint_subject=hint):
            self.published = seen.value
            self._notify()

    async def _follow_settings(self) -> None:
        async for seen in self._link.follow(KEY_SETTINGS, JobSettings, interval_seconds=SETTINGS_SECONDS):
            self._max_versions = seen.value.staleness.max_versions
            self._notify()

    async def _keep_up(self) -> None:
        while True:
            self._wake.clear()
            await self._drop_unwanted()
            failed: set[int] = set()
            while missing := [v for v in self._wanted() if v not in self._held and v not in failed]:
                if not await self._fetch(self._retained[missing[0]]):
                    failed.add(missing[0])  # the others do not wait for it
            try:
                async with asyncio.timeout(AGAIN_SECONDS if failed else None):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _wanted(self) -> tuple[int, ...]:
        return wanted_versions(self._retained, self._max_versions)

    async def _drop_unwanted(self) -> None:
        for version in sorted(set(self._held) - set(self._wanted())):
            del self._held[version]  # before anything is awaited: no pass that is planned from here on names it
            await self._in_thread(self._scorer.drop, version)

    async def _fetch(self, published: PublishedVersion) -> bool:
        """Bring a version here; False when the store cannot give it now."""
        try:
            manifest = await fetch_manifest(self._store, published.manifest, self._cache)
            path = await fetch_weights(self._store, manifest, self._cache)
            try:
                if not self._scorer.is_open:
                    directory = self._cache / "model"
                    await fetch_model_files(self._store, manifest, directory)
                    await asyncio.to_thread(_link_or_copy, path, directory / "model.safetensors")
                    await self._in_thread(self._scorer.open, directory)
                await self._in_thread(self._scorer.load, published.version, path, manifest.probe)
            finally:
                path.unlink(missing_ok=True)
        except (StorageError, ProtocolError, OSError) as error:
            self.last_error = f"version {published.version} could not be fetched: {error}"
            self._logger.warning(
                "version could not be fetched", extra=fields(weight_version=published.version, error=str(error))
            )
            return False
        self.last_error = ""
        self._held[published.version] = published
        self._logger.info("version held", extra=fields(weight_version=published.version, held=sorted(self._held)))
        self._changed()
        return True

    def _notify(self) -> None:
        self._wake.set()
        self._changed()


def _link_or_copy(path: Path, destination: Path) -> None:
    destination.unlink(missing_ok=True)
    try:
        os.link(path, destination)
    except OSError:
        shutil.copyfile(path, destination)
