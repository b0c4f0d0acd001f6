"""What of an environment goes into an image, and under which path. The environment is a small made-up one."""

from __future__ import annotations

import marshal
import os
import sys
from pathlib import Path
from types import CodeType

import pytest
from tools.devcluster import python_files
from tools.devcluster.errors import DevClusterError
from tools.devcluster.oci import File, Link, Text
from tools.devcluster.python_files import SITE_PACKAGES, Environment

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    base, prefix = tmp_path / "base", tmp_path / "venv"
    library = base / "lib" / f"python{VERSION}"
    packages = prefix / "lib" / f"python{VERSION}" / "site-packages"
    files = {
        base / "bin" / "python": "ELF",
        base / "lib" / f"libpython{VERSION}.so.1.0": "ELF",
        library / "os.py": "x = 1\n",
        library / "test" / "test_os.py": "x = 1\n",
        library / "site-packages" / "pip.py": "x = 1\n",
        packages / "other" / "__init__.py": "y = 2\n",
        packages / "other" / "__pycache__" / "stale.pyc": "stale",
        packages / "_rljob.pth": "/somewhere/api\n",
        packages / "rljob-0.1.0.dist-info" / "METADATA": "Name: rljob\n",
        packages / "rljob-0.1.0.dist-info" / "direct_url.json": "{}",
        packages
        / "rljob-0.1.0.dist-info"
        / "RECORD": "_rljob.pth,,\n../../../bin/rljob,,\nrljob-0.1.0.dist-info/METADATA,,\nrljob-0.1.0.dist-info/direct_url.json,,\nrljob-0.1.0.dist-info/RECORD,,\n",
        prefix / "bin" / "rljob": f"#!{prefix}/bin/python\nimport rljob\n",
        prefix / "bin" / "torchrun": f"#!{prefix}/bin/python3\nimport torch\n",
        prefix / "bin" / "nats-server": "\x7fELF",
        prefix / "bin" / "activate.sh": "#!/bin/sh\nexit\n",
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (prefix / "bin" / "python").symlink_to(base / "bin" / "python")
    return Environment(prefix, base, base / "bin" / "python", library, packages, "rljob")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    package = root / "api" / "rljob_api"
    package.mkdir(parents=True)
    (package / "spec.py").write_text("z = 3\n")
    (package / "rules.json").write_text("{}")
    (root / "pyproject.toml").write_text('[tool.hatch.build.targets.wheel]\npackages = ["api/rljob_api"]\n')
    return root


def test_the_interpreter_comes_without_tests_and_other_people_s_packages(
    environment: Environment, tmp_path: Path
) -> None:
    entries = python_files.interpreter(environment, tmp_path / "bytecode")
    assert sorted(entries) == [
        "/usr/lib/libpython" + VERSION + ".so.1.0",
        "/usr/local/bin/python3",
        f"/usr/local/bin/python{VERSION}",
        f"/usr/local/lib/python{VERSION}/os.py",
    ]


def test_packages_come_without_the_project_and_without_stale_byte_code(
    environment: Environment, tmp_path: Path
) -> None:
    entries = python_files.packages(environment, tmp_path / "bytecode")
    inside = [path for path in entries if path.startswith(SITE_PACKAGES)]
    assert inside == [f"{SITE_PACKAGES}/other/__init__.py"]
    assert "/opt/rljob/bin/rljob" not in entries


def test_scripts_start_the_image_s_interpreter_and_programs_stay_as_they_are(
    environment: Environment, tmp_path: Path
) -> None:
    entries = python_files.packages(environment, tmp_path / "bytecode")
    assert entries["/opt/rljob/bin/torchrun"] == Text(b"#!/opt/rljob/bin/python\nimport torch\n", is_executable=True)
    assert entries["/opt/rljob/bin/activate.sh"] == Text(b"#!/bin/sh\nexit\n", is_executable=True)
    assert entries["/opt/rljob/bin/nats-server"] == File(environment.prefix / "bin" / "nats-server")
    assert entries["/opt/rljob/bin/python"] == Link(f"/usr/local/bin/python{VERSION}")


def test_byte_code_of_the_cache_lies_beside_its_source(environment: Environment, tmp_path: Path) -> None:
    python_files.compile_bytecode(environment, tmp_path / "bytecode")
    entries = python_files.packages(environment, tmp_path / "bytecode")
    name = f"{SITE_PACKAGES}/other/__pycache__/__init__.{sys.implementation.cache_tag}.pyc"
    compiled = entries[name]
    assert isinstance(compiled, File)
    source = environment.site_packages / "other" / "__init__.py"
    recorded = int.from_bytes(compiled.source.read_bytes()[8:12], "little")
    assert recorded == int(source.stat().st_mtime), "the image keeps the source's time, so the byte code is not stale"
    assert not list(environment.prefix.rglob("__init__.*.pyc")), "the environment itself is left alone"


def test_the_project_is_laid_out_as_installed_with_byte_code_that_names_its_path(
    environment: Environment, repository: Path, tmp_path: Path
) -> None:
    entries = python_files.project(environment, repository, tmp_path)
    compiled = f"{SITE_PACKAGES}/rljob_api/__pycache__/spec.{sys.implementation.cache_tag}.pyc"
    assert sorted(entries) == [
        "/opt/rljob/bin/rljob",
        f"{SITE_PACKAGES}/rljob-0.1.0.dist-info/METADATA",
        compiled,
        f"{SITE_PACKAGES}/rljob_api/rules.json",
        f"{SITE_PACKAGES}/rljob_api/spec.py",
    ]
    content = entries[compiled]
    assert isinstance(content, Text)
    code = marshal.loads(content.content[16:])
    assert isinstance(code, CodeType)
    assert code.co_filename == f"{SITE_PACKAGES}/rljob_api/spec.py"


def test_no_file_of_the_project_s_layer_names_this_machine(
    environment: Environment, repository: Path, tmp_path: Path
) -> None:
    entries = python_files.project(environment, repository, tmp_path)
    texts = [entry.content for entry in entries.values() if isinstance(entry, Text)]
    assert len(texts) == len(entries)
    assert not [text for text in texts if os.fsencode(tmp_path) in text]


def test_the_key_changes_with_a_package_and_not_with_the_project(environment: Environment) -> None:
    before = environment.key()
    (environment.prefix / "bin" / "rljob").write_text("changed")
    assert environment.key() == before
    (environment.site_packages / "other" / "__init__.py").write_text("y = 3  # longer\n")
    assert environment.key() != before


def test_an_environment_without_the_project_is_refused(environment: Environment) -> None:
    (environment.site_packages / "rljob-0.1.0.dist-info" / "RECORD").unlink()
    (environment.site_packages / "rljob-0.1.0.dist-info").rename(environment.site_packages / "x")
    with pytest.raises(DevClusterError, match=r"rljob is not installed in .*: run `make setup`"):
        environment.project_files()
