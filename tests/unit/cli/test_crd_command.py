"""`rljob crd`: plain YAML, the same that lies in crds/."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rljob.crd_command import crd_yaml
from rljob.loader import load_document
from rljob.main import main
from rljob_api.crd import custom_resource_definition

COMMITTED = Path(__file__).parents[3] / "crds" / "rljob.yaml"


def test_the_committed_file_is_what_the_models_say() -> None:
    assert COMMITTED.read_text() == crd_yaml(), (
        "crds/rljob.yaml is behind the models: run `make generate` and commit it"
    )


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crd"]) == 0
    assert capsys.readouterr().out == crd_yaml()


def test_yaml_of_either_version_reads_it_back_without_loss() -> None:
    # kubectl reads YAML 1.1, in which `None` and `On` could be something else than text.
    assert yaml.safe_load(crd_yaml()) == custom_resource_definition()
    assert load_document(COMMITTED) == custom_resource_definition()


def test_it_holds_no_anchors_and_says_that_it_is_generated() -> None:
    first = crd_yaml().splitlines()[0]
    assert first.startswith("# Generated") and "make generate" in first
    assert not [event for event in yaml.parse(crd_yaml()) if getattr(event, "anchor", None)]
