"""The interpreter, the installed environment and the project as files of an image.

    /usr/local        the interpreter and its standard library
    /opt/rljob        the virtual environment
                      (the project's own packages are in its site-packages, in a layer above)

The environment is this very one (`sys.prefix`). Paths inside it are rewritten, so an image says nothing of the machine
that made it. Byte code is compiled beforehand, into the cache and not into the environment: pods have a read-only root
and would compile for 20 s at each start.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import os
import py_compile
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.devcluster.errors import DevClusterError
from tools.devcluster.oci import Entry, File, Link, Text

INTERPRETER_PREFIX = "/usr/local"
ENVIRONMENT_PREFIX = "/opt/rljob"
_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
_CACHE_TAG = sys.implementation.cache_tag
SITE_PACKAGES = f"{ENVIRONMENT_PREFIX}/lib/{_PYTHON}/site-packages"
_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "idlelib", "tkinter", "ensurepip", "turtledemo"}
_COMPILE_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment, its interpreter and the project that is installed in it, as they lie on this machine."""

    prefix: Path
    base_prefix: Path
    executable: Path
    standard_library: Path
    site_packages: Path
    project: str

    @classmethod
    def of_this_interpreter(cls, project: str = "rljob") -> Environment:
        if sys.prefix == sys.base_prefix:
            raise DevClusterError("run this with the project's own interpreter: .venv/bin/python -m tools.devcluster")
        return cls(
            prefix=Path(sys.prefix),
            base_prefix=Path(sys.base_prefix),
            executable=Path(sys.executable).resolve(),
            standard_library=Path(sysconfig.get_path("stdlib")),
            site_packages=Path(sysconfig.get_path("purelib")),
            project=project,
        )

    def extension_modules(self) -> list[Path]:
        """Everything that the dynamic loader will have to load something for."""
        folders = (self.standard_library / "lib-dynload", self.site_packages)
        modules = [path for folder in folders for path in sorted(folder.rglob("*.so*")) if path.is_file()]
        return [self.executable, *(path for path in modules if not path.name.startswith("_tkinter"))]

    def key(self) -> str:
        """Changes with any file of the interpreter or the environment (by path, size and time), not with the project."""
        digest = hashlib.sha256(f"{self.executable} {self.prefix}".encode())
        for root in (self.standard_library, self.site_packages):
            for path in _walk(root, left_out=_LEFT_OUT if root == self.standard_library else {"__pycache__"}):
                found = path.lstat()
                digest.update(f"{path} {found.st_size} {found.st_mtime_ns} {found.st_mode}\n".encode())
        return digest.hexdigest()[:16]

    def project_files(self) -> frozenset[Path]:
        """What the project's own installation put there: its layer replaces it."""
        records = [path / "RECORD" for path in self.site_packages.glob(f"{self.project}-*.dist-info")]
        if len(records) != 1:
            raise DevClusterError(f"{self.project} is not installed in {self.prefix}: run `make setup`.")
        with records[0].open(newline="") as lines:
            return frozenset(Path(os.path.normpath(self.site_packages / row[0])) for row in csv.reader(lines))


def interpreter(environment: Environment, bytecode: Path) -> dict[str, Entry]:
    library = f"{INTERPRETER_PREFIX}/lib/{_PYTHON}"
    entries = _python_tree(environment.standard_library, library, bytecode, left_out=_LEFT_OUT)
    entries[f"{INTERPRETER_PREFIX}/bin/{_PYTHON}"] = File(environment.executable)
    entries[f"{INTERPRETER_PREFIX}/bin/python3"] = Link(_PYTHON)
    # Found by the loader's built-in search path, since the path that the executable names does not exist in the image.
    for path in (environment.base_prefix / "lib").glob(f"lib{_PYTHON}*.so*"):
        entries[f"/usr/lib/{path.name}"] = File(path.resolve())
    return entries


def packages(environment: Environment, bytecode: Path) -> dict[str, Entry]:
    """Everything that is installed, but for the project."""
    own = environment.project_files()
    entries = _python_tree(environment.site_packages, SITE_PACKAGES, bytecode, left_out={"__pycache__"}, without=own)
    for script in sorted((environment.prefix / "bin").iterdir()):
        if script not in own and not script.name.startswith("python"):
            entries[f"{ENVIRONMENT_PREFIX}/bin/{script.name}"] = _script(script)
    for name in ("python", "python3", _PYTHON):
        entries[f"{ENVIRONMENT_PREFIX}/bin/{name}"] = Link(f"{INTERPRETER_PREFIX}/bin/{_PYTHON}")
    config = (
        f"home = {INTERPRETER_PREFIX}/bin\ninclude-system-site-packages = false\nversion = {sys.version.split()[0]}\n"
    )
    entries[f"{ENVIRONMENT_PREFIX}/pyvenv.cfg"] = Text(config.encode())
    return entries


def project(environment: Environment, repository: Path, work: Path) -> dict[str, Entry]:
    """The project's packages as `pip install` would lay them out, with byte code that no clock can make stale."""
    entries: dict[str, Entry] = {}
    for folder in _wheel_packages(repository):
        for path in sorted((repository / folder).rglob("*")):
            relative = path.relative_to((repository / folder).parent)
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            destination = f"{SITE_PACKAGES}/{relative}"
            entries[destination] = Text(path.read_bytes())
            if path.suffix == ".py":
                entries[_cached(destination)] = Text(_compile(path, destination, work))
    for path in sorted(environment.project_files()):
        if path.parent == environment.prefix / "bin":
            entries[f"{ENVIRONMENT_PREFIX}/bin/{path.name}"] = _script(path)
        elif path.parent.name.endswith(".dist-info") and path.name in {"METADATA", "entry_points.txt", "WHEEL"}:
            entries[f"{SITE_PACKAGES}/{path.parent.name}/{path.name}"] = Text(path.read_bytes())
    return entries


def compile_bytecode(environment: Environment, bytecode: Path) -> None:
    """Compile what is new into the folder `bytecode` (a minute or two when all is)."""
    folders = [str(environment.standard_library), str(environment.site_packages)]
    skipped = r"/(test|tests|idlelib|lib2to3/tests|site-packages/.*/templates)/"
    if environment.standard_library in environment.site_packages.parents:
        folders = folders[:1]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "compileall",
        "-q",
        "-q",
        "-j",
        str(os.cpu_count() or 1),
        "-x",
        skipped,
        *folders,
    ]
    settings = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode)}
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    # Some packages ship files that are no Python: its exit code says so, and that is no reason to stop.
    subprocess.run(command, env=settings, timeout=_COMPILE_TIMEOUT_SECONDS, check=False, stdout=subprocess.DEVNULL)


def _python_tree(
    root: Path, destination: str, bytecode: Path, *, left_out: set[str], without: frozenset[Path] = frozenset()
) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for path in _walk(root, left_out=left_out):
        if path in without:
            continue
        target = f"{destination}/{path.relative_to(root)}"
        if path.is_symlink():
            entries[target] = Link(os.readlink(path))
            continue
        entries[target] = File(path)
        compiled = bytecode / path.relative_to("/").parent / f"{path.stem}.{_CACHE_TAG}.pyc"
        if path.suffix == ".py" and compiled.exists():
            entries[_cached(target)] = File(compiled)
    return entries


def _walk(root: Path, *, left_out: set[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in left_out and not name.startswith("config-"))
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in sorted([*files, *links]):
            yield Path(folder, name)


def _script(path: Path) -> Entry:
    """A console script with the image's interpreter in its first line; other programs as they are."""
    with path.open("rb") as file:
        begin = file.read(2)
        if begin != b"#!":
            return File(path.resolve())
        interpreter_line, _, rest = (begin + file.read()).partition(b"\n")
    if b"python" in interpreter_line:
        interpreter_line = f"#!{ENVIRONMENT_PREFIX}/bin/python".encode()
    return Text(interpreter_line + b"\n" + rest, is_executable=True)


def _wheel_packages(repository: Path) -> list[str]:
    configuration = tomllib.loads((repository / "pyproject.toml").read_text())
    packages_: list[str] = configuration["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return packages_


def _compile(path: Path, destination: str, work: Path) -> bytes:
    output = work / "compiled.pyc"
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(path), str(output), dfile=destination, doraise=True, invalidation_mode=mode)
    return output.read_bytes()


def _cached(destination: str) -> str:
    return importlib.util.cache_from_source(destination)
