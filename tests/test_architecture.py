"""Imports point one way, and the light packages stay light."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [str(ROOT / folder) for folder in ("api", "protocol", "operator", "runtime", "cli")]
HEAVY = ("torch", "numpy", "yaml", "nats", "kopf", "kubernetes", "vllm", "transformers", "asyncio", "matplotlib")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds this checkout's packages first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PACKAGES)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)


def heavy_modules_after(imports: str) -> list[str]:
    code = f"{imports}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    result = python(code)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_whole_api_leaves_heavy_modules_out() -> None:
    modules = sorted(path.stem for path in (ROOT / "api" / "rljob_api").glob("*.py") if path.stem != "__init__")
    assert "spec" in modules
    assert heavy_modules_after("\n".join(f"import rljob_api.{name}" for name in modules)) == []


def test_validating_a_file_needs_yaml_and_nothing_heavier() -> None:
    assert heavy_modules_after("import rljob.validate_command") == ["yaml"]


def test_the_check_for_heavy_modules_sees_them() -> None:
    assert heavy_modules_after("import asyncio, yaml") == ["yaml", "asyncio"]


def test_the_import_contracts_hold() -> None:
    pytest.importorskip("importlinter")
    result = python("import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_module_of_the_standard_library_is_shadowed_by_a_folder() -> None:
    shadows = [folder for folder in PACKAGES if (Path(folder) / "__init__.py").exists()]
    assert shadows == [], "operator/__init__.py would stop Python itself"
