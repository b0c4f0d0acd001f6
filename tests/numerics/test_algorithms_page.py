"""docs/algorithms.md names functions and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "algorithms.md").read_text()


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 20
    for file, test in named:
        (found,) = (ROOT / "tests").rglob(file)
        assert f"def {test}(" in found.read_text(), f"{file}::{test}"


def test_every_public_function_of_the_correction_is_on_the_page() -> None:
    for source in sorted((ROOT / "runtime" / "rljob_runtime" / "correction").glob("*.py")):
        for function in re.findall(r"^def ([a-z]\w+)\(", source.read_text(), flags=re.MULTILINE):
            assert f"`{function}`" in PAGE, f"{source.name}: {function}"
