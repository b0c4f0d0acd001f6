"""Runs made up for the tests: reports, workers and a record whose numbers are right unless a test breaks them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_numpy
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rljob.run_directory import RunDirectory, RunInfo
from rljob_api.diagnostics import Diagnostics, LeakCell
from rljob_api.messages import (
    BucketStats,
    Distribution,
    Outcome,
    StepReport,
    TrajectoryHeader,
    WorkerCounters,
    WorkerPhase,
    WorkerState,
)
from rljob_api.weights import Blob, Probe, WeightManifest

TEMPERATURE = 0.7
VOCABULARY = 16
SOURCES = {"0": "none", "1": "resident", "2": "snapshot", "3": "current", "4": "engine", "5": "missing"}


def report(step: int, **changes: Any) -> StepReport:
    """A plausible step report; `changes` replace fields."""
    fields: dict[str, Any] = {
        "epoch": 1,
        "step": step,
        "version": step,
        "reward": min(1.0, step / 50),
        "baseline": 0.1,
        "loss": 0.01,
        "entropy": 2.0 / step,
        "gradient_norm": 0.5,
        "learning_rate": 1e-3,
        "route": "Snapshot",
        "exact_fraction": 1.0,
        "staleness": Distribution(mean=1.0, p50=1, p95=2, max=2, histogram={"0": 60, "1": 30, "2": 10}),
        "discrepancy_by_staleness": {
            str(bucket): BucketStats(tokens=10, rms_log_discrepancy=1e-3, max_abs_log_discrepancy=5e-3)
            for bucket in range(3)
        },
        "keep_fraction": 0.99,
        "clip_fraction": 0.02,
        "active_fraction": 0.97,
        "trajectories": 8,
        "trajectories_spanning_versions": 2,
        "mean_trajectory_tokens": 20.0,
        "tokens_trained": 100 * step,
        "tokens_dropped": {"Stale": 3 * step},
        "tokens_received": {"main-0/a": 103 * step},
        "last_sequence": 8 * step,
        "seconds_waiting": 0.2,
        "seconds_scoring": 0.1,
        "seconds_training": 0.3,
        "seconds_publishing": 0.1,
        "seconds_total": 0.7,
    }
    return StepReport(**(fields | changes))


def leaking(step: int, *, rising: float = 0.0) -> Diagnostics:
    """Diagnostics of a step whose RMS of log r_d is the same at staleness 0 to 2, or grows by `rising` a version."""
    cells = tuple(
        LeakCell(step - 1 - n, n, 0, 1000, 1e-3 * (1 + rising * n) * (1 + 0.02 * (-1) ** (step + n)))
        for n in range(min(step, 3))
    )
    return Diagnostics(tokens=1000 * len(cells), leak_cells=cells)


def worker(generated: int, delivered: int, **changes: Any) -> WorkerState:
    """A worker that stopped in order, with what it did not deliver in flight."""
    fields: dict[str, Any] = {
        "worker": "main-0",
        "pool": "main",
        "incarnation": "a",
        "phase": WorkerPhase.STOPPED,
        "serving_version": 3,
        "counters": WorkerCounters(
            tokens_generated=generated,
            tokens_delivered=delivered,
            tokens_in_flight=generated - delivered,
            interruptions=5,
        ),
        "pause_seconds": (0.05, 0.02, 0.4),
    }
    return WorkerState(**(fields | changes))


def write_run(
    root: Path, steps: Sequence[StepReport], workers: Sequence[WorkerState], *, name: str = "toy"
) -> RunDirectory:
    """The files of a run that has ended, as far as report and verify read them."""
    root.mkdir(parents=True)
    directory = RunDirectory(root)
    directory.write_info(RunInfo("uid", name, "2026-01-01T00:00:00Z", 1))
    directory.steps_file.write_bytes(b"".join(step.to_bytes() + b"\n" for step in steps))
    directory.write_workers(workers)
    directory.summary_file.write_text(json.dumps({"unread": {}}))
    return directory


@dataclass
class RecordedRun:
    """A run whose record was made by scoring random tokens with plain models of three versions."""

    directory: RunDirectory
    steps: dict[int, dict[str, np.ndarray[Any, Any]]] = field(default_factory=dict)
    headers: dict[int, list[TrajectoryHeader]] = field(default_factory=dict)
    reports: list[StepReport] = field(default_factory=list)
    workers: list[WorkerState] = field(default_factory=list)

    @property
    def record(self) -> Path:
        return self.directory.record

    def write(self) -> None:
        """Write steps, reports and workers as they are now."""
        for step, tensors in self.steps.items():
            header = {
                "step": step,
                "epoch": 1,
                "version_start": step - 1,
                "temperature": TEMPERATURE,
                "compute_type": "Float32",
                "source_names": SOURCES,
                "headers": [h.model_dump(mode="json", by_alias=True) for h in self.headers[step]],
            }
            data = save_numpy(tensors, {"rljob": json.dumps(header)})
            (self.record / "steps" / f"{step:06d}.safetensors").write_bytes(data)
        self.directory.steps_file.write_bytes(b"".join(r.to_bytes() + b"\n" for r in self.reports))
        self.directory.write_workers(self.workers)


def recorded_run(root: Path) -> RecordedRun:
    """Three steps of four rows; step s starts at version s - 1, its rows hold tokens of all versions so far."""
    run = RecordedRun(write_run(root, [], []))
    for folder in ("model", "versions", "steps"):
        (run.record / folder).mkdir(parents=True)
    (run.record / "notes.json").write_text('{"truncated_at_step": null}')
    models = [_write_version(run.record, version) for version in range(3)]
    generator = np.random.default_rng(7)
    trained = 0
    for step in (1, 2, 3):
        rows = [_row(generator, models[:step]) for _ in range(4)]
        run.steps[step] = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} | {
            "row_offsets": np.cumsum([0, *(len(row["tokens"]) for row in rows)], dtype=np.int64)
        }
        run.headers[step] = [_header(task=step, sample=sample) for sample in range(4)]
        trained += int((run.steps[step]["turn"] >= 0).sum())
        run.reports.append(
            report(step, tokens_trained=trained, tokens_dropped={}, tokens_received={"main-0/a": trained})
        )
    run.workers.append(worker(trained + 11, trained))
    run.write()
    return run


def _header(task: int, sample: int) -> TrajectoryHeader:
    return TrajectoryHeader(
        task=task, sample=sample, attempt=1, epoch=1, worker="main-0", incarnation="a", outcome=Outcome.FINISHED
    )


def _write_version(record: Path, version: int) -> LlamaForCausalLM:
    torch.manual_seed(version)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    config.save_pretrained(record / "model")
    folder = record / "versions" / f"1-{version}"
    folder.mkdir()
    weights = folder / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    data = weights.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    manifest = WeightManifest(
        epoch=1,
        version=version,
        compute_type="Float32",
        blobs=(Blob(name="w", sha256=digest, num_bytes=len(data)),),
        sha256=digest,
        num_bytes=len(data),
        model_files=(),
        probe=Probe(tokens=(1, 2), logprobs=(-1.0,), compute_type="Float32"),
    )
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return model


def _row(generator: np.random.Generator, models: Sequence[LlamaForCausalLM]) -> dict[str, np.ndarray[Any, Any]]:
    """Prompt, a turn, an observation, a turn; the turns' tokens go through the versions in order."""
    turn = np.array([-1] * 3 + [0] * 9 + [-1] * 2 + [1] * 9, np.int32)
    tokens = generator.integers(0, VOCABULARY, turn.size).astype(np.int32)
    is_model = turn >= 0
    version = np.full(turn.size, -1, np.int32)
    version[is_model] = np.sort(generator.integers(0, len(models), int(is_model.sum())))
    old = np.zeros(turn.size, np.float32)
    for number, model in enumerate(models):
        with torch.inference_mode():
            logits = model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].double() / TEMPERATURE
        scored = torch.log_softmax(logits, -1).numpy()
        for place in np.flatnonzero(version == number):
            old[place] = scored[place - 1, tokens[place]]
    source = np.zeros(turn.size, np.uint8)
    source[is_model] = np.where(version[is_model] == len(models) - 1, 1, 2)
    return {
        "tokens": tokens,
        "turn": turn,
        "weight_version": version,
        "behavior_logprobs": np.where(is_model, old + np.float32(1e-4), 0).astype(np.float32),
        "old_logprobs": old,
        "old_source": source,
        "target_logprobs": old.copy(),
        "advantages": np.zeros(turn.size, np.float32),
        "loss_mask": is_model.astype(np.uint8),
    }
