"""`rljob verify RUN`: proof, from the record alone, that a run trained on what it says it trained on.

Independent of the trainer's code: weights are loaded and scored by plain transformers, and the token counters of trainer
and workers are checked against each other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from rljob.record import Record, RecordedStep, RecordedVersion, read_step
from rljob.run_directory import RunDirectory
from rljob.summary import conservation
from rljob_api.errors import BlobCorrupt, StorageError

EXIT_OK, EXIT_FAILED = 0, 1
SEED = 2605

FLOAT32_MAX = 1e-5
"""Largest difference of one log-probability: the same weights and arithmetic in another batch layout."""
BFLOAT16_RMS = 0.05
"""Bound of the root mean square. bf16 logits have 8 bits, so one token may differ by a tenth; another layout rounds otherwise."""


@dataclass(frozen=True, slots=True)
class Check:
    """One claim and whether it holds."""

    passed: bool
    claim: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChosenRow:
    """A row that is re-scored."""

    path: Path
    index: int


@dataclass(frozen=True, slots=True)
class Overview:
    """What the whole record holds, from one pass over it."""

    steps: int
    epochs: int
    rows: int
    trained: int
    compute_type: str
    available: dict[int, int]
    """Staleness -> tokens with an exact old log-probability."""
    log_discrepancy: dict[int, NDArray[np.float32]]
    """Staleness -> log r_d = old - behavior of these tokens."""
    row_buckets: dict[ChosenRow, dict[int, int]]
    """Row -> its exact tokens whose version is in the record, by staleness."""
    repeated: tuple[str, ...]
    """Samples that were trained more than once."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Differences of recorded and re-scored log-probabilities, by staleness."""

    differences: dict[int, NDArray[np.float64]]
    rows: int
    versions: int

    @property
    def tokens(self) -> int:
        return sum(values.size for values in self.differences.values())


def verify(run: Path, *, minimum_tokens: int, out: TextIO) -> int:
    """Check a run's record and counters, print what was found; 0 when every claim holds, else 1.

    Raises:
        RljobError: the folder is no run, or has no readable record.
    """
    directory = RunDirectory(run)
    directory.read_info()
    record = Record(directory.record)
    versions = record.versions()
    print(f"rljob verify {run}", file=out, flush=True)
    checks = [_digests(versions)]
    overview = _overview(record.steps(), versions)
    print(
        f"  record: {overview.steps} steps, {overview.rows:,} trajectories, {len(versions)} weight versions, "
        f"{sum(overview.available.values()):,} tokens with an exact old log-probability",
        file=out,
        flush=True,
    )
    truncated = record.truncated_at_step
    if truncated is not None:
        print(f"  note: nothing was recorded from step {truncated} on: its byte bound was reached", file=out)
    if overview.epochs > 1:
        print(
            "  note: staleness is in version numbers; each resume gives one step another number, and numbers that were "
            "trained over are skipped",
            file=out,
        )
    if checks[0].passed:
        chosen = choose_rows(overview.row_buckets, minimum_tokens)
        compared = _compare(record, versions, chosen)
        print(f"\n{_table(overview, compared)}\n", file=out)
        checks.append(_exactness(compared, overview.compute_type, minimum_tokens))
    checks.append(_once(overview))
    checks += _conserved(directory, overview, truncated)
    for check in checks:
        print(f"  {'PASS' if check.passed else 'FAIL'}  {check.claim}", file=out)
        for detail in check.details:
            print(f"        {detail}", file=out)
    failed = sum(not check.passed for check in checks)
    print("verify: everything holds" if not failed else f"verify: FAILED, {failed} of {len(checks)} claims", file=out)
    return EXIT_FAILED if failed else EXIT_OK


# ------------------------------------------------------------------------------------------------ what the record holds


def _digests(versions: Mapping[int, RecordedVersion]) -> Check:
    damaged = []
    for version in versions.values():
        try:
            version.check_digest()
        except BlobCorrupt as error:
            damaged.append(str(error))
        except OSError as error:
            damaged.append(f"{version.weights}: {error.strerror}")
    return Check(
        not damaged, f"the bytes of all {len(versions)} recorded versions have their manifest's digest", tuple(damaged)
    )


def _overview(steps: Iterable[RecordedStep], versions: Mapping[int, RecordedVersion]) -> Overview:
    seen: Counter[tuple[int, int]] = Counter()
    discrepancy: dict[int, list[NDArray[np.float32]]] = {}
    row_buckets: dict[ChosenRow, dict[int, int]] = {}
    num_steps = num_rows = trained = 0
    compute_types: set[str] = set()
    epochs: set[int] = set()
    for step in steps:
        num_steps += 1
        num_rows += len(step.headers)
        trained += step.num_trained
        compute_types.add(step.compute_type)
        epochs.add(step.epoch)
        seen.update((header.task, header.sample) for header in step.headers)
        exact, staleness = step.is_exact, step.staleness
        log_discrepancy = step.tensors["old_logprobs"] - step.tensors["behavior_logprobs"]
        for bucket in np.unique(staleness[exact]).tolist():
            discrepancy.setdefault(bucket, []).append(log_discrepancy[exact & (staleness == bucket)])
        recorded = exact & np.isin(step.tensors["weight_version"], list(versions))
        for index in range(len(step.headers)):
            place = step.row(index)
            buckets, counts = np.unique(staleness[place][recorded[place]], return_counts=True)
            if buckets.size:
                row_buckets[ChosenRow(step.path, index)] = dict(zip(buckets.tolist(), counts.tolist(), strict=True))
    if len(compute_types) > 1:
        raise StorageError(f"the record mixes compute types {sorted(compute_types)}: it is not of one run")
    joined = {bucket: np.concatenate(parts) for bucket, parts in sorted(discrepancy.items())}
    return Overview(
        steps=num_steps,
        epochs=len(epochs),
        rows=num_rows,
        trained=trained,
        compute_type=next(iter(compute_types), "Float32"),
        available={bucket: values.size for bucket, values in joined.items()},
        log_discrepancy=joined,
        row_buckets=row_buckets,
        repeated=tuple(f"task {t}, sample {s}: {n} times" for (t, s), n in sorted(seen.items()) if n > 1),
    )


# ------------------------------------------------------------------------------------------------------------ exactness


def choose_rows(row_buckets: Mapping[ChosenRow, Mapping[int, int]], minimum_tokens: int) -> tuple[ChosenRow, ...]:
    """Rows with at least `minimum_tokens` tokens together, spread over all staleness buckets; all rows if that is too few.

    Each bucket gets its even share of the tokens where it has so many, rare buckets first.
    """
    rows = list(row_buckets)
    shuffled = [rows[i] for i in np.random.default_rng(SEED).permutation(len(rows))]
    available: Counter[int] = Counter()
    for buckets in row_buckets.values():
        available.update(buckets)
    share = -(-minimum_tokens // max(1, len(available)))
    chosen: dict[ChosenRow, None] = {}
    held: Counter[int] = Counter()
    for bucket, tokens in sorted(available.items(), key=lambda item: item[1]):
        for row in shuffled:
            if held[bucket] >= min(share, tokens):
                break
            if row not in chosen and bucket in row_buckets[row]:
                chosen[row] = None
                held.update(row_buckets[row])
    for row in shuffled:
        if held.total() >= minimum_tokens:
            break
        if row not in chosen:
            chosen[row] = None
            held.update(row_buckets[row])
    return tuple(chosen)


def _compare(record: Record, versions: Mapping[int, RecordedVersion], chosen: Sequence[ChosenRow]) -> Compared:
    """Score the chosen rows under every version that sampled one of their exact tokens."""
    from rljob.rescore import score_rows

    by_step: dict[Path, list[int]] = {}
    for row in chosen:
        by_step.setdefault(row.path, []).append(row.index)
    by_version: dict[int, list[tuple[RecordedStep, slice]]] = {}
    for path, indices in by_step.items():
        step = read_step(path)
        for place in (step.row(index) for index in indices):
            for version in np.unique(step.tensors["weight_version"][place][step.is_exact[place]]).tolist():
                if version in versions:
                    by_version.setdefault(version, []).append((step, place))
    found: dict[int, list[NDArray[np.float64]]] = {}
    for version, places in sorted(by_version.items()):
        scored = score_rows(
            record.model,
            versions[version].weights,
            versions[version].manifest.compute_type,
            [(step.tensors["tokens"][place], step.temperature) for step, place in places],
        )
        for (step, place), logprobs in zip(places, scored, strict=True):
            of_version = step.is_exact[place] & (step.tensors["weight_version"][place] == version)
            difference = logprobs[of_version].astype(np.float64) - step.tensors["old_logprobs"][place][of_version]
            found.setdefault(step.version_start - version, []).append(difference)
    differences = {bucket: np.concatenate(parts) for bucket, parts in sorted(found.items())}
    return Compared(differences, rows=len(chosen), versions=len(by_version))


def _exactness(compared: Compared, compute_type: str, minimum_tokens: int) -> Check:
    everything = np.concatenate([*compared.differences.values(), np.zeros(0)])
    details = []
    if not np.isfinite(everything).all():
        details.append(f"{int((~np.isfinite(everything)).sum())} log-probabilities are not finite")
    elif compute_type == "Float32":
        bound = f"within {FLOAT32_MAX:g}"
        wrong = int((np.abs(everything) > FLOAT32_MAX).sum())
        if wrong:
            details.append(f"{wrong} tokens differ by more than {FLOAT32_MAX:g}, the worst by {_worst(everything):.3g}")
    else:
        bound = f"with a root mean square of at most {BFLOAT16_RMS:g} (bf16)"
        if _rms(everything) > BFLOAT16_RMS:
            details.append(f"the root mean square of the differences is {_rms(everything):.3g}")
    if compared.tokens < minimum_tokens:
        details.append(
            f"{minimum_tokens:,} tokens were asked for and {compared.tokens:,} can be checked: ask for fewer with --tokens, "
            "or record more with --record-bytes (baseline routes have no exact old log-probabilities)"
        )
    claim = (
        f"the old log-probabilities of {compared.tokens:,} tokens in {compared.rows:,} trajectories are those of the version "
        f"that sampled them, {bound if np.isfinite(everything).all() else 'finite and equal'}: "
        f"{compared.versions} versions rebuilt and scored with plain transformers"
    )
    return Check(not details, claim, tuple(details))


def _table(overview: Overview, compared: Compared) -> str:
    lines = ["  staleness      tokens   checked   max |diff|     RMS diff   max |log r_d|   RMS log r_d"]
    for bucket, tokens in overview.available.items():
        difference = compared.differences.get(bucket, np.zeros(0))
        discrepancy = overview.log_discrepancy[bucket].astype(np.float64)
        lines.append(
            f"  {bucket:>9} {tokens:>11,} {difference.size:>9,} {_worst(difference):>12.2e} {_rms(difference):>12.2e} "
            f"{_worst(discrepancy):>15.2e} {_rms(discrepancy):>13.2e}"
        )
    return "\n".join(lines)


def _worst(values: NDArray[np.float64]) -> float:
    return float(np.abs(values).max()) if values.size else 0.0


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


# ------------------------------------------------------------------------------------------------- once, and none missing


def _once(overview: Overview) -> Check:
    return Check(
        not overview.repeated, f"each of {overview.rows:,} recorded samples was trained once", overview.repeated[:10]
    )


def _conserved(directory: RunDirectory, overview: Overview, truncated: int | None) -> list[Check]:
    steps = directory.read_steps()
    try:
        unread = json.loads(directory.summary_file.read_text())["unread"]
    except (OSError, ValueError, KeyError) as error:
        return [
            Check(
                False,
                "no token is missing",
                (
                    f"{directory.summary_file} cannot be read ({type(error).__name__}): the run did not end in order; "
                    f"end it with rljob run --resume {directory.root}",
                ),
            )
        ]
    tokens = conservation(steps, directory.read_workers(), unread)
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in tokens.dropped.items()) or "none"
    checks = [
        Check(
            tokens.holds,
            f"no token is missing: {tokens.generated:,} generated = {tokens.trained:,} trained + "
            f"{sum(tokens.dropped.values()):,} dropped ({dropped}) + {tokens.in_flight:,} in flight at the end + "
            f"{tokens.lost:,} lost in crashes",
            tokens.problems,
        )
    ]
    if truncated is None and overview.steps == len(steps):
        checks.append(
            Check(
                overview.trained == tokens.trained,
                f"the record holds the {tokens.trained:,} tokens that the trainer counts as trained",
                () if overview.trained == tokens.trained else (f"it holds {overview.trained:,}",),
            )
        )
    return checks
