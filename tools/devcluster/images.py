"""The images of this checkout, on the base images' layers, without a registry.

    localhost/rljob-runtime:dev   entry point `rljob`
    localhost/rljob-operator:dev  the same layers, entry point `rljob operator`

The base is unpacked once into an image store (image_store.py). The project's layer is made at each `up` and imported
into the running nodes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tools.devcluster import python_files
from tools.devcluster.base_images import PYTHON_BASE, PYTHON_ENVIRONMENT, build_base
from tools.devcluster.layout import REPOSITORY
from tools.devcluster.oci import Image, Layer, write_archive, write_layer
from tools.devcluster.python_files import ENVIRONMENT_PREFIX, Environment

RUNTIME = "localhost/rljob-runtime:dev"
OPERATOR = "localhost/rljob-operator:dev"


def export(environment: Environment, bytecode: Path, archive: Path) -> None:
    """Write all images, whole, into one OCI archive for another cluster; about 6 GB with torch and vLLM."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as work:
        base = build_base(environment, Path(work), bytecode)
        (python,) = (image for image in base if image.name == PYTHON_BASE)
        project = build_project(environment, python.layers, Path(work))
        with archive.open("wb") as out:
            write_archive([*base, *project], out)


def build_project(environment: Environment, base: tuple[Layer, ...], folder: Path) -> tuple[Image, Image]:
    """The runtime's and the operator's image of this checkout, on the layers of PYTHON_BASE."""
    with tempfile.TemporaryDirectory() as work:
        entries = python_files.project(environment, REPOSITORY, Path(work))
    project = write_layer(entries, folder / "project.tar")
    command = f"{ENVIRONMENT_PREFIX}/bin/rljob"
    return (
        Image(RUNTIME, (*base, project), (command,), PYTHON_ENVIRONMENT),
        Image(OPERATOR, (*base, project), (command, "operator"), PYTHON_ENVIRONMENT),
    )
