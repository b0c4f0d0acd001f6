"""The bottom of the Python images: busybox, and the C libraries that the environment's extension modules load."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from tools.devcluster.commands import run
from tools.devcluster.oci import Entry, File, Folder, Link, Text

BUSYBOX = Path("/bin/busybox")
# All of their files, not only what ldd finds: wheels open librt, libdl and libpthread by name at run time.
_LIBRARY_PACKAGES = ("libc6", "libstdc++6", "libgcc-s1", "libgomp1", "zlib1g")
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_LDD_BATCH = 64
LSCPU = Path("/usr/bin/lscpu")
"""vLLM on a CPU asks it for the cores it may use."""


def etc() -> dict[str, Entry]:
    """What every image needs: users, name resolution, a place for temporary files."""
    users = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/sh\n"
    return {
        "/etc/passwd": Text(users),
        "/etc/group": Text(b"root:x:0:\nnogroup:x:65534:\n"),
        "/etc/nsswitch.conf": Text(b"hosts: files dns\n"),
        "/tmp": Folder(0o1777),
    }


def busybox() -> dict[str, Entry]:
    applets = run([BUSYBOX, "--list"]).split()
    links: dict[str, Entry] = {f"/bin/{name}": Link("busybox") for name in applets if name != "busybox"}
    return {**links, "/bin/busybox": File(BUSYBOX.resolve())}


def libraries(modules: Sequence[Path], own_folders: Sequence[Path]) -> dict[str, Entry]:
    """The machine's libraries that `modules` load; libraries under `own_folders` come with their package."""
    found = {path for name in _LIBRARY_PACKAGES for path in _libraries_of_package(name)}
    found |= {
        path for path in _loaded_by([*modules, LSCPU]) if not any(path.is_relative_to(own) for own in own_folders)
    }
    files: dict[str, Entry] = {str(path): File(path.resolve()) for path in found}
    files[str(LSCPU)] = File(LSCPU.resolve())
    if _CERTIFICATES.exists():
        files[str(_CERTIFICATES)] = File(_CERTIFICATES.resolve())
    return files


def _libraries_of_package(name: str) -> Iterable[Path]:
    listing = subprocess.run(["dpkg", "-L", name], capture_output=True, text=True, check=False)
    for line in listing.stdout.splitlines():
        path = Path(line)
        if ".so" in path.name and path.is_file() and not {"gconv", "audit"} & set(path.parts) and "gdb" not in line:
            yield path


def _loaded_by(modules: Sequence[Path]) -> Iterable[Path]:
    """Absolute paths in ldd's answers; modules that are not dynamic have none."""
    for begin in range(0, len(modules), _LDD_BATCH):
        batch = [str(path) for path in modules[begin : begin + _LDD_BATCH]]
        answer = subprocess.run(["ldd", *batch], capture_output=True, text=True, timeout=300, check=False)
        for line in answer.stdout.splitlines():
            if line.startswith("\t"):
                yield from (Path(word) for word in line.split()[:3] if word.startswith("/"))
