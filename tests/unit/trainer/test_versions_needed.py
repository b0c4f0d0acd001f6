"""Which published versions a replay from a checkpoint may still name."""

from __future__ import annotations

from rljob_api.messages import PublishedVersion
from rljob_api.weights import Blob
from rljob_runtime.trainer.publisher import oldest_version_needed


def retained(*versions: tuple[int, int]) -> dict[int, PublishedVersion]:
    """(version, step) pairs as they were published."""
    blob = Blob(name="m", sha256="0" * 64, num_bytes=1)
    return {
        version: PublishedVersion(epoch=1, version=version, step=step, manifest=blob, num_bytes=1)
        for version, step in versions
    }


def test_the_bound_is_kept_back_from_the_checkpoint() -> None:
    assert oldest_version_needed(retained(*((v, v) for v in range(11))), checkpoint_step=10, max_versions=3) == 7


def test_a_resumes_second_version_of_a_step_costs_no_older_one() -> None:
    """Version 11 is step 10 again; a token of version 7 is still three steps old, and was lost when numbers counted."""
    versions = retained(*((v, v) for v in range(11)), (11, 10))
    assert oldest_version_needed(versions, checkpoint_step=10, max_versions=3) == 7


def test_versions_of_an_abandoned_attempt_are_kept_while_their_tokens_may_train() -> None:
    """Killed at step 14, resumed from step 10 as version 15: tokens of 11 to 14 count as of step 10."""
    versions = retained(*((v, v) for v in range(7, 15)), (15, 10), (16, 11), (17, 12), (18, 13))
    assert oldest_version_needed(versions, checkpoint_step=13, max_versions=3) <= 11


def test_nothing_published_needs_nothing_deleted() -> None:
    assert oldest_version_needed({}, checkpoint_step=0, max_versions=3) == 0
