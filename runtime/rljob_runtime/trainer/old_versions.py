"""How many old versions the trainer holds in memory, and which ones go when the next one comes."""

from __future__ import annotations

from collections.abc import Mapping

from rljob_api.correction import OldLogprobs
from rljob_api.errors import SpecError, Violation
from rljob_api.spec import ComputeType, RLJobSpec
from rljob_runtime.correction.published import PublishedParameters, local_shard
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.trainer.distributed import World, largest
from rljob_runtime.trainer.model import compute_dtype


def capacity(spec: RLJobSpec, policy: PublishedParameters, world: World) -> int | None:
    """Versions that fit memory whatever their contents, the same on every rank; None where nothing bounds them. Collective.

    Raises:
        SpecError: there is no room for all versions within the staleness bound.
    """
    snapshots = spec.correction.snapshots
    if spec.correction.old_logprobs is not OldLogprobs.SNAPSHOT or snapshots.memory_bytes is None or snapshots.spill:
        return None
    elements = sum(local_shard(parameter).numel() for _, parameter in policy.published_parameters())
    copy_bytes = largest(elements * compute_dtype(spec.training.compute_type).itemsize, world.device)
    needed = (spec.staleness.max_versions + 1) * copy_bytes
    if needed > snapshots.memory_bytes:
        usually = (
            " BFloat16 versions usually take far less, as differences; spill makes that safe to rely on."
            if spec.training.compute_type is ComputeType.BFLOAT16
            else ""
        )
        raise SpecError(
            (
                Violation(
                    path="spec.correction.snapshots.memoryBytes",
                    value=str(snapshots.memory_bytes),
                    reason=(
                        f"staleness.maxVersions {spec.staleness.max_versions} may need "
                        f"{spec.staleness.max_versions + 1} weight versions of {copy_bytes:,} bytes each in a trainer "
                        f"process, {needed:,} bytes"
                    ),
                    remedy=(
                        f"Raise it to {needed}, set correction.snapshots.spill or lower staleness.maxVersions.{usually}"
                    ),
                ),
            )
        )
    return max(1, snapshots.memory_bytes // max(1, copy_bytes))


def make_room(
    store: SnapshotStore, version: int, *, max_versions: int, waiting: Mapping[int, int], capacity: int | None
) -> None:
    """Before `version` is saved: versions go that nothing in flight or waiting may name.

    Tokens in flight are within the bound as version numbers count it. Trajectories that wait are known, and may name older
    ones: a resume counts up the versions without a step, and the bound may have been raised. Those beyond the capacity go
    all the same, to be fetched again when a batch names them.

    Args:
        store: snapshots of this rank.
        version: about to be saved.
        max_versions: the staleness bound.
        waiting: tokens by weight version that may still train; the same on every rank.
        capacity: versions that there is room for.
    """
    store.retain(waiting)
    store.evict(version - max_versions)
    if capacity is not None:
        for oldest in store.versions[: max(0, len(store.versions) - capacity + 1)]:
            store.drop(oldest)
