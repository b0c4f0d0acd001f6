"""containerd, runc, CNI plugins, nft and busybox from Debian, by this machine's own apt configuration.

containerd must be 2.0 or newer for this kubelet. Where the installed release has an older one, the package of a newer
release is fetched from the same mirror with a private apt state and unpacked into the cache: the system stays as it is.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tools.devcluster.commands import run
from tools.devcluster.errors import DevClusterError
from tools.devcluster.layout import Layout

_PROGRAMS = {"runc": "runc", "nft": "nftables", "busybox": "busybox-static", "ip": "iproute2", "nsenter": "util-linux"}
_CNI_FOLDER = Path("/usr/lib/cni")
_NEWER_RELEASE = "forky"
_CONTAINERD_PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def install_packages() -> None:
    """Install what is missing with apt-get; does nothing when all is there."""
    wanted = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    if not (_CNI_FOLDER / "bridge").exists():
        wanted.append("containernetworking-plugins")
    if not wanted:
        return
    if shutil.which("apt-get") is None:
        raise DevClusterError(f"missing: {', '.join(wanted)} (Debian's package names). Install them and run again.")
    hint = "These packages must come from this machine's own apt sources."
    run(["apt-get", "update", "-qq"], timeout_seconds=300, hint=hint)
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *wanted]
    run(command, timeout_seconds=600, hint=hint)


def containerd_folder(layout: Layout) -> Path:
    """The folder with containerd, its shim and ctr, 2.0 or newer."""
    kept = layout.cache / "debian" / "containerd"
    if (kept / "usr/bin/containerd").exists():
        return kept / "usr/bin"
    installed = shutil.which("containerd")
    if installed is not None and _is_new_enough(run([installed, "--version"])):
        return Path(installed).resolve().parent
    _fetch_containerd(kept)
    return kept / "usr/bin"


def _is_new_enough(version_line: str) -> bool:
    """Kubernetes from 1.36 on refuses containerd 1."""
    found = re.search(r"\bv?(\d+)\.\d+\.\d+", version_line)
    return found is not None and int(found[1]) >= 2


def _fetch_containerd(kept: Path) -> None:
    mirror = _debian_mirror(
        run(["apt-get", "indextargets", "--format", "$(ORIGIN) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"])
    )
    if mirror is None or not _KEYRING.exists():
        raise DevClusterError(
            "containerd 2.0 or newer is needed and neither installed nor to be had: no Debian mirror in this machine's apt "
            "sources. Put containerd, containerd-shim-runc-v2 and ctr of a 2.x release on PATH."
        )
    work = kept.with_name("containerd.partial")
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("apt/lists/partial", "apt/cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    sources = work / "apt" / "sources.list"
    sources.write_text(f"deb [signed-by={_KEYRING}] {mirror} {_NEWER_RELEASE} main\n")
    options = [
        f"Dir::Etc::sourcelist={sources}",
        "Dir::Etc::sourceparts=-",
        "Dir::Etc::preferencesparts=-",
        f"Dir::State::lists={work}/apt/lists",
        f"Dir::Cache={work}/apt/cache",
        "APT::Sandbox::User=root",
    ]
    apt = ["apt-get", *(word for option in options for word in ("-o", option)), "-qq"]
    run([*apt, "update"], timeout_seconds=300)
    run(
        [
            "sh",
            "-c",
            'cd "$1" && shift && exec "$@"',
            "sh",
            str(work),
            *apt,
            "download",
            f"containerd/{_NEWER_RELEASE}",
        ],
        timeout_seconds=300,
    )
    (package,) = work.glob("containerd_*.deb")
    run(["dpkg", "-x", package, work])
    shutil.rmtree(work / "apt")
    if not _is_new_enough(run([work / "usr/bin/containerd", "--version"])):
        raise DevClusterError(f"Debian {_NEWER_RELEASE} has a containerd older than 2.0: put a newer one on PATH.")
    work.rename(kept)


def _debian_mirror(index_targets: str) -> str | None:
    """The first Debian archive among apt's own index targets, security archives left out."""
    for line in index_targets.splitlines():
        origin, component, address = [*line.split(), "", "", ""][:3]
        if origin == "Debian" and component == "main" and "security" not in address:
            return address
    return None
