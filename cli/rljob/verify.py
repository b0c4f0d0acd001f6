"""`rljob verify RUN`: re-scores what was trained, independently of the trainer.

Nothing of the trainer or of the correction is imported: the recorded weight versions are loaded into plain transformers
models, whole trajectories are scored one by one, and the result is compared with the old log-probabilities that the loss
used. Then the books: every token that the engines generated was trained, dropped for a reason, in flight or lost in a
crash, and no sample was trained twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rljob.run_directory import RunDirectory
from rljob.summary import Summary
from rljob_api.errors import RljobError
from rljob_api.weights import WeightManifest

EXACT_SOURCES = ("resident", "snapshot", "pool", "dedicated")
LIMITS = {"Float32": 1e-5, "BFloat16": 5e-2}
"""Largest difference allowed. In bf16 another batch layout alone moves a log-probability by about 1e-2."""


@dataclass(frozen=True, slots=True)
class Row:
    """One trained trajectory of the record; arrays [T]."""

    step: int
    epoch: int
    version_start: int
    task: int
    sample: int
    temperature: float
    compute_type: str
    tokens: NDArray[np.int32]
    turn: NDArray[np.int32]
    weight_version: NDArray[np.int32]
    behavior_logprobs: NDArray[np.float32]
    old_logprobs: NDArray[np.float32]
    exact: NDArray[np.bool_]

    def staleness(self) -> NDArray[np.int32]:
        """[T], in version numbers."""
        return self.version_start - self.weight_version


@dataclass(slots=True)
class Bucket:
    """Differences of one staleness."""

    tokens: int = 0
    largest: float = 0.0
    squares: float = 0.0
    largest_discrepancy: float = 0.0
    discrepancy_squares: float = 0.0

    def add(self, difference: NDArray[np.float64], discrepancy: NDArray[np.float64]) -> None:
        self.tokens += difference.size
        self.largest = max(self.largest, float(np.abs(difference).max()))
        self.squares += float((difference**2).sum())
        self.largest_discrepancy = max(self.largest_discrepancy, float(np.abs(discrepancy).max()))
        self.discrepancy_squares += float((discrepancy**2).sum())


@dataclass(slots=True)
class Findings:
    """What verify saw."""

    buckets: dict[int, Bucket] = field(default_factory=lambda: defaultdict(Bucket))
    problems: list[str] = field(default_factory=list)


def verify(root: Path, *, minimum_tokens: int, out: TextIO) -> int:
    """Check a run; 0 when everything holds, 1 otherwise.

    Raises:
        RljobError: there is no record.
    """
    directory = RunDirectory(root)
    rows = list(read_record(directory.record))
    if not rows:
        raise RljobError(
            f"{directory.record} holds no step: the run was started with --record-bytes 0, or trained nothing"
        )
    findings = Findings()
    rescore(directory.record, rows, minimum_tokens, findings)
    _check_once(rows, findings)
    _print_buckets(findings, out)
    scored = sum(bucket.tokens for bucket in findings.buckets.values())
    if scored < minimum_tokens:
        findings.problems.append(f"only {scored} tokens could be re-scored, {minimum_tokens} were asked for")
    summary = _summary(directory)
    tokens = summary.conservation
    print(
        f"conservation: {tokens.generated:,} generated = {tokens.trained:,} trained + {sum(tokens.dropped.values()):,} dropped "
        f"+ {tokens.in_flight:,} in flight + {tokens.lost:,} lost in crashes",
        file=out,
    )
    balance = tokens.generated - tokens.trained - sum(tokens.dropped.values()) - tokens.in_flight - tokens.lost
    if balance:
        findings.problems.append(f"{balance} generated tokens are not accounted for")
    findings.problems += tokens.problems
    note = json.loads((directory.record / "notes.json").read_text())["truncated_at_step"]
    if note is None:
        recorded = sum(int((row.turn >= 0).sum()) for row in rows)
        stated = tokens.trained + tokens.dropped.get("Stale", 0) + tokens.dropped.get("MissingOldLogprob", 0)
        # Whole groups can be dropped as stale too; those never reach a step.
        if not tokens.trained <= recorded <= stated:
            findings.problems.append(
                f"the record holds {recorded} model tokens, the counters say {tokens.trained} were trained"
            )
    else:
        print(f"note: the record ends at step {note}, where its byte bound was reached", file=out)
    for problem in findings.problems:
        print(f"problem: {problem}", file=out)
    print("verify: " + ("everything holds" if not findings.problems else "FAILED"), file=out)
    return 1 if findings.problems else 0


def read_record(record: Path) -> Iterator[Row]:
    """Rows of all recorded steps, in order.

    Raises:
        RljobError: a step's file cannot be read.
    """
    for path in sorted((record / "steps").glob("*.safetensors")) if record.exists() else ():
        with safe_open(path, framework="np") as file:
            header = json.loads(file.metadata()["rljob"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        exact_codes = [int(code) for code, name in header["source_names"].items() if name in EXACT_SOURCES]
        offsets = tensors["row_offsets"]
        for index, (start, end) in enumerate(itertools.pairwise(offsets)):
            part: dict[str, Any] = {
                name: tensor[start:end] for name, tensor in tensors.items() if name != "row_offsets"
            }
            yield Row(
                step=header["step"],
                epoch=header["epoch"],
                version_start=header["version_start"],
                task=header["headers"][index]["task"],
                sample=header["headers"][index]["sample"],
                temperature=header["temperature"],
                compute_type=header["compute_type"],
                tokens=part["tokens"],
                turn=part["turn"],
                weight_version=part["weight_version"],
                behavior_logprobs=part["behavior_logprobs"],
                old_logprobs=part["old_logprobs"],
                exact=np.isin(part["old_source"], exact_codes) & (part["turn"] >= 0),
            )


def rescore(record: Path, rows: Sequence[Row], minimum_tokens: int, findings: Findings) -> None:
    """Score rows until every staleness bucket has its share of `minimum_tokens`."""
    buckets = sorted({int(s) for row in rows for s in np.unique(row.staleness()[row.exact])})
    share = math.ceil(minimum_tokens / max(1, len(buckets))) * 2
    wanted = dict.fromkeys(buckets, share)
    chosen: dict[int, list[Row]] = defaultdict(list)
    for row in random.Random(0).sample(list(rows), len(rows)):
        counts = Counter(row.staleness()[row.exact].tolist())
        if any(wanted.get(staleness, 0) > 0 for staleness in counts):
            for staleness, count in counts.items():
                wanted[staleness] -= count
            for version in np.unique(row.weight_version[row.exact]):
                chosen[int(version)].append(row)
    for version, of_version in sorted(chosen.items()):
        _rescore_version(record, version, of_version, findings)


def _rescore_version(record: Path, version: int, rows: Sequence[Row], findings: Findings) -> None:
    folders = sorted((record / "versions").glob(f"*-{version}"))
    if not folders:
        findings.problems.append(f"version {version} was trained on and is not in the record")
        return
    manifest = WeightManifest.from_bytes((folders[-1] / "manifest.json").read_bytes())
    weights = folders[-1] / "weights.safetensors"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != manifest.sha256:
        findings.problems.append(f"version {version}: its recorded bytes are not those that its manifest names")
        return
    dtype = torch.float32 if manifest.compute_type == "Float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(record / "model"), dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        findings.problems.append(f"version {version}: tensors missing {missing} or unknown {unexpected}")
        return
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for row in rows:
        chosen = row.exact & (row.weight_version == version)
        scored = _logprobs(model, row)
        difference = scored[chosen] - row.old_logprobs[chosen].astype(np.float64)
        discrepancy = row.old_logprobs[chosen].astype(np.float64) - row.behavior_logprobs[chosen]
        for staleness in np.unique(row.staleness()[chosen]):
            at = row.staleness()[chosen] == staleness
            findings.buckets[int(staleness)].add(difference[at], discrepancy[at])
        limit = LIMITS[row.compute_type]
        worst = float(np.abs(difference).max())
        if not worst <= limit:
            findings.problems.append(
                f"step {row.step}, sample {row.task}/{row.sample}, version {version}: an old log-probability is off by "
                f"{worst:.3g} (allowed: {limit:g})"
            )


def _logprobs(model: Any, row: Row) -> NDArray[np.float64]:
    """Log-probability of every token of a row; 0 for the first."""
    with torch.inference_mode():
        logits = model(torch.from_numpy(row.tokens[None].astype(np.int64)), use_cache=False).logits[0, :-1].float()
    table = torch.log_softmax(logits / row.temperature, -1)
    picked = table.gather(1, torch.from_numpy(row.tokens[1:].astype(np.int64))[:, None])[:, 0]
    return np.concatenate([[0.0], picked.double().numpy()])


def _check_once(rows: Sequence[Row], findings: Findings) -> None:
    seen = Counter((row.task, row.sample) for row in rows)
    for (task, sample), times in seen.items():
        if times > 1:
            findings.problems.append(f"sample {task}/{sample} was trained {times} times")


def _print_buckets(findings: Findings, out: TextIO) -> None:
    print("staleness   tokens   re-scored - used: max       RMS   log r_d: max       RMS", file=out)
    for staleness, bucket in sorted(findings.buckets.items()):
        print(
            f"{staleness:9d} {bucket.tokens:8,d} {bucket.largest:23.2e} {math.sqrt(bucket.squares / bucket.tokens):9.2e} "
            f"{bucket.largest_discrepancy:14.2e} {math.sqrt(bucket.discrepancy_squares / bucket.tokens):9.2e}",
            file=out,
        )


def _summary(directory: RunDirectory) -> Summary:
    try:
        return Summary.model_validate_json(directory.summary_file.read_bytes())
    except (OSError, ValueError) as error:
        raise RljobError(f"{directory.summary_file} cannot be read: the run has not ended, or was killed") from error
