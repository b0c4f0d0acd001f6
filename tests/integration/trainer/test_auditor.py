"""The audit scores stale tokens by their own published version, whatever the route used, and finds what was left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.e2e.running import job
from tests.integration.trainer.toy import make_batch, make_model, make_policy, publish

from rljob_api.correction import Correction
from rljob_api.spec import RLJobSpec
from rljob_api.validate import parse_job
from rljob_runtime.correction.audit import is_audited
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.trainer.audit import EVERY_STEPS, Audited, Auditor, audited_share
from rljob_runtime.trainer.batch import TrainBatch
from rljob_runtime.trainer.distributed import World, distributed_world
from rljob_runtime.trainer.model import Policy
from rljob_runtime.trainer.scoring import score
from rljob_runtime.trainer.update import UpdateReport, UpdateSettings, resolve_batch, train_on

NEWEST = 2


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with distributed_world("cpu", timeout_seconds=30) as joined:
        yield joined


class Published:
    """Three versions of a policy that drifts, as files; rank 0 fetches a copy, as from a blob store."""

    def __init__(self, folder: Path, world: World) -> None:
        self.world = world
        self.fetched: list[int] = []
        self._folder = folder
        model = make_model(folder / "model")
        self.policy: Policy = make_policy(model, world)
        self.store = SnapshotStore(torch.float32)
        self.versions: dict[int, Path] = {}
        generator = torch.Generator().manual_seed(0)
        for version in range(NEWEST + 1):
            self.store.save(version, self.policy)
            self.versions[version] = publish(self.policy, model, folder / str(version))
            if version < NEWEST:
                with torch.no_grad():
                    for _, parameter in self.policy.published_parameters():
                        local = parameter.to_local()
                        local += 0.02 * torch.randn(local.shape, generator=generator)

    def fetch(self, version: int) -> Path | None:
        self.fetched.append(version)
        copy = self._folder / f"fetched-{version}.safetensors"
        copy.write_bytes((self.versions[version] / "model.safetensors").read_bytes())
        return copy

    def exact(self, batch: TrainBatch, version: int) -> list[NDArray[np.float32]]:
        """Every row under one version, by a policy that was loaded from its file."""
        loaded = make_policy(self.versions[version], self.world)
        rows = [row.tokens for row in batch.rows]
        return score(loaded, rows, temperature=1.0, token_budget=4096)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, world: World) -> Published:
    return Published(tmp_path_factory.mktemp("published"), world)


def spec(**correction: Any) -> RLJobSpec:
    return parse_job(job(correction=correction)).spec


def audit(
    published: Published, chosen: RLJobSpec, *, held: SnapshotStore | None = None, fetch: Any = None
) -> tuple[TrainBatch, Audited, UpdateReport, Auditor]:
    """One step at a learning rate of 0, audited."""
    store = SnapshotStore(torch.float32) if held is None else held
    batch = make_batch(5, version=NEWEST, groups=6)
    published.fetched.clear()
    auditor = Auditor(
        chosen,
        published.policy,
        store,
        published.world,
        fetch_version=fetch or published.fetch,
        scratch=published.versions[0],
    )
    settings = UpdateSettings.of(chosen)
    old = resolve_batch(published.policy, batch, store, settings, published.world)
    audited = auditor.score(batch, step=2 * EVERY_STEPS)
    optimizer = torch.optim.SGD(published.policy.parameters(), lr=0.0)
    update = train_on(published.policy, optimizer, batch, old, settings, published.world, rate=0.0)
    return batch, audited, update, auditor


def test_audited_tokens_have_the_value_of_their_own_version_and_the_leak_is_the_difference(
    published: Published,
) -> None:
    batch, audited, update, auditor = audit(published, spec(oldLogprobs="Current", auditFraction=0.05))
    exact = audited.exact
    chosen = [i for i, row in enumerate(batch.rows) if is_audited(row.task, row.sample, seed=0, fraction=0.5)]
    assert 3 <= len(chosen) < len(batch.rows)
    by_version = {version: published.exact(batch, version) for version in range(NEWEST)}
    squares: list[float] = []
    for index, row in enumerate(batch.rows):
        stale = row.trainable & (row.staleness > 0)
        if index not in chosen or not stale.any():
            assert index not in exact
            continue
        assert np.isfinite(exact[index]).tolist() == stale.tolist()
        for position in np.flatnonzero(stale):
            value = by_version[int(row.weight_version[position])][index][position]
            assert exact[index][position] == pytest.approx(value, abs=1e-5)
            for age in range(1, NEWEST + 1):
                seen, later = (
                    audited.by_age[index][age, position] if age < len(audited.by_age[index]) else np.nan,
                    NEWEST - age,
                )
                if later < row.weight_version[position]:
                    assert np.isnan(seen)
                else:
                    assert seen == pytest.approx(by_version[later][index][position], abs=1e-5)
            squares.append(float(update.records[index].old_logprobs[position] - value) ** 2)
    report = auditor.report(batch, update, audited, ())
    assert report is not None
    assert report.tokens == len(squares)
    assert report.leak_rms == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-4)
    assert report.leak_rms > 0.05, "the current policy is not the old one"
    assert report.version_weights == (1.0,)
    assert published.fetched == [0, 1]
    assert not list(published._folder.glob("fetched-*")), "what was fetched for the audit does not stay"


def test_an_exact_route_leaves_nothing_and_its_snapshots_need_no_fetch(published: Published) -> None:
    batch, audited, update, auditor = audit(published, spec(auditFraction=0.05), held=published.store)
    report = auditor.report(batch, update, audited, ())
    assert report is not None
    assert report.tokens > 20
    assert report.leak_rms <= 1e-5
    assert published.fetched == []


def test_a_version_that_is_gone_is_left_out(published: Published) -> None:
    def fetch(version: int) -> Path | None:
        return published.fetch(version) if version else None

    batch, audited, update, auditor = audit(published, spec(oldLogprobs="Current", auditFraction=0.05), fetch=fetch)
    report = auditor.report(batch, update, audited, ())
    assert report is not None
    assert list(report.by_staleness) == ["1"]


def test_between_audits_nothing_is_scored(published: Published) -> None:
    batch, _, update, auditor = audit(published, spec(oldLogprobs="Current", auditFraction=0.05))
    published.fetched.clear()
    nothing = auditor.score(batch, step=EVERY_STEPS + 1)
    assert nothing == Audited({}, {})
    assert auditor.report(batch, update, nothing, ()) is None
    assert published.fetched == []


@pytest.mark.parametrize(
    ("correction", "share"),
    [
        ({}, 0.0),
        ({"oldLogprobs": "Ewma"}, 0.02),
        ({"fallback": "Ewma"}, 0.02),
        ({"oldLogprobs": "Ewma", "auditFraction": 0.0}, 0.0),
        ({"auditFraction": 0.01}, 0.01),
    ],
)
def test_approximate_sources_are_audited_unless_the_job_says_otherwise(
    correction: dict[str, Any], share: float
) -> None:
    assert audited_share(Correction.model_validate(correction)) == share
