"""The images that change only with the installed environment, and the layers under the project's own images.

localhost/pause:dev       what holds a pod's network namespace
localhost/busybox:dev
localhost/nats:dev        the nats-server of the installed environment
localhost/rljob-base:dev  the interpreter and the installed environment (with torch and vLLM)
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tools.devcluster import oci, python_files, system_files
from tools.devcluster.oci import File, Folder, Image, write_layer
from tools.devcluster.python_files import ENVIRONMENT_PREFIX, Environment

PAUSE = "localhost/pause:dev"
BUSYBOX = "localhost/busybox:dev"
NATS = "localhost/nats:dev"
PYTHON_BASE = "localhost/rljob-base:dev"

_PATH = {"PATH": "/bin:/usr/bin"}
PYTHON_ENVIRONMENT = {
    "PATH": f"{ENVIRONMENT_PREFIX}/bin:/usr/local/bin:/usr/bin:/bin",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    # As in the Makefile: one thread a process on CPUs, nothing fetched at run time.
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def base_key(environment: Environment) -> str:
    """What the base images are made from: the environment, busybox, and the recipe (these modules)."""
    digest = hashlib.sha256(environment.key().encode())
    for module in (__file__, oci.__file__, python_files.__file__, system_files.__file__):
        digest.update(Path(module).read_bytes())
    digest.update(system_files.BUSYBOX.read_bytes())
    return digest.hexdigest()[:16]


def build_base(environment: Environment, layers: Path, bytecode: Path) -> tuple[Image, ...]:
    """Write the base layers into the folder `layers` (minutes when nothing is compiled yet)."""
    python_files.compile_bytecode(environment, bytecode)
    etc, busybox = system_files.etc(), system_files.busybox()
    shell = write_layer({**etc, **busybox}, layers / "busybox.tar")
    server = environment.prefix / "bin" / "nats-server"
    nats = write_layer(
        {**etc, "/bin/nats-server": File(server.resolve()), "/data": Folder(0o1777)}, layers / "nats.tar"
    )
    own = (environment.prefix, environment.base_prefix)
    libraries = system_files.libraries(environment.extension_modules(), own)
    python = (
        shell,
        write_layer(libraries, layers / "libraries.tar"),
        write_layer(python_files.interpreter(environment, bytecode), layers / "interpreter.tar"),
        write_layer(python_files.packages(environment, bytecode), layers / "packages.tar"),
    )
    return (
        # Sleeping is all it does; containerd ends it with SIGKILL.
        Image(PAUSE, (shell,), ("/bin/sleep", "2147483647"), _PATH),
        Image(BUSYBOX, (shell,), ("/bin/sh",), _PATH),
        Image(NATS, (nats,), ("/bin/nats-server",), _PATH),
        Image(PYTHON_BASE, python, (f"{ENVIRONMENT_PREFIX}/bin/python",), PYTHON_ENVIRONMENT),
    )
