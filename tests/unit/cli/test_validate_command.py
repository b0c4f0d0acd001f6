"""`rljob validate`: the verdict on a file, and the examples that the project ships."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from tests.unit.api.documents import MINIMAL, changed

from rljob.loader import load_document
from rljob.validate_command import validate
from rljob_api.validate import parse_job

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[3] / "examples").glob("*.yaml")
    if load_document(path).get("kind") == "RLJob"
)


def verdict(path: Path) -> tuple[int, str]:
    out = io.StringIO()
    return validate(path, out), out.getvalue()


def test_a_valid_file_is_called_valid(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(MINIMAL))
    assert verdict(path) == (0, f"{path}: valid\n")


def test_fields_for_a_cluster_are_named_below_the_verdict(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(changed({"spec.suspend": True, "spec.trainer.template": {"spec": {}}})))
    assert verdict(path) == (
        0,
        f"{path}: valid\n"
        "  spec.suspend is for a cluster: `rljob run` ignores it\n"
        "  spec.trainer.template is for a cluster: `rljob run` ignores it\n",
    )


def test_every_violation_has_a_line_and_the_exit_code_is_2(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(changed({"metadata.name": "Job\n", "spec.training.steps": 0})))
    assert verdict(path) == (
        2,
        "spec.training.steps: must be at least 1 (got 0). Choose a larger value.\n"
        'metadata.name: must be an RFC 1035 label of at most 40 characters (got "Job\\n"). '
        "Use lower-case letters, digits and `-`; start with a letter and end with a letter or a digit.\n",
    )


def test_a_file_that_cannot_be_read_is_a_violation_too(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("a: [\n")
    code, text = verdict(path)
    assert code == 2
    assert text.startswith(f"{path}:2:1: is not YAML: ") and text.endswith("Mend the YAML there.\n")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_valid_and_only_what_a_cluster_needs_is_ignored_on_one_machine(path: Path) -> None:
    code, said = verdict(path)
    first, *ignored = said.splitlines()
    assert (code, first) == (0, f"{path}: valid")
    claim = "  spec.storage.checkpoint.persistentVolumeClaim is for a cluster: `rljob run` ignores it"
    assert ignored in ([], [claim])


def test_the_quickstart_is_the_job_that_the_documents_speak_of() -> None:
    quickstart = {path.stem: path for path in EXAMPLES}["quickstart"]
    spec = parse_job(load_document(quickstart)).spec
    assert spec.model.random is not None
    assert (spec.model.random.hidden_size, spec.model.random.layers, spec.model.random.heads) == (64, 2, 2)
    assert spec.environment.parameters == {"digits": 4, "turns": 12}
    assert (spec.training.steps, spec.training.tasks_per_step, spec.sampling.samples_per_task) == (160, 8, 8)
    assert [pool.replicas for pool in spec.rollout_pools] == [2]


def test_a_small_learning_rate_of_an_example_is_a_number() -> None:
    smollm2 = {path.stem: path for path in EXAMPLES}["smollm2"]
    assert parse_job(load_document(smollm2)).spec.training.learning_rate == 1e-6


def test_a_cluster_asks_for_more_than_one_machine(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(MINIMAL))
    out = io.StringIO()
    assert validate(path, out, on_cluster=True) == 2
    assert out.getvalue() == (
        "spec.storage.checkpoint.persistentVolumeClaim: is required while failurePolicy.maxRestarts is above 0: a new "
        "trainer pod finds no checkpoint of the old one (got nothing; failurePolicy.maxRestarts is 3). Name a claim, or "
        "set failurePolicy.maxRestarts to 0.\n"
    )
    path.write_text(json.dumps(changed({"spec.failurePolicy.maxRestarts": 0, "spec.suspend": True})))
    out = io.StringIO()
    assert (validate(path, out, on_cluster=True), out.getvalue()) == (0, f"{path}: valid on a cluster\n")
