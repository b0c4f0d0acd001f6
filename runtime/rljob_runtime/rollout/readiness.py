"""Whether a rollout pod counts as ready: it serves a version within the staleness bound.

With hysteresis, so that neither a swap nor a burst of versions nor a trainer's restart moves it: a worker becomes ready
within the bound, and stops being ready only when it is more than twice the bound and MARGIN behind.
"""

from __future__ import annotations

from pathlib import Path

from rljob_api.messages import PublishedVersion

MARGIN = 2


class Readiness:
    """Keeps the file that the kubelet's probe looks for. `path` None: nobody looks."""

    def __init__(self, path: Path | None, max_versions: int) -> None:
        self._path = path
        self.max_versions = max_versions
        """Staleness bound, in weight versions; may change while the job runs."""
        self.is_ready = False
        self._set(is_ready=False)  # a container that was started again finds the files of the one before

    def update(self, serving: PublishedVersion | None, newest: PublishedVersion | None) -> None:
        """Compare what is served with the newest version that is known."""
        if serving is None:
            self._set(is_ready=False)
            return
        behind = 0 if newest is None else newest.version - serving.version
        limit = 2 * self.max_versions + MARGIN if self.is_ready else self.max_versions
        self._set(is_ready=behind <= limit)

    def end(self) -> None:
        """The worker drains or ends."""
        self._set(is_ready=False)

    def _set(self, *, is_ready: bool) -> None:
        self.is_ready = is_ready
        if self._path is None:
            return
        if is_ready:
            self._path.touch()
        else:
            self._path.unlink(missing_ok=True)
