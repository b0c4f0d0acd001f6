"""OCI images with the standard library: layers are uncompressed tars named by their digest.

Image specification: https://github.com/opencontainers/image-spec. Nothing depends on when or where a layer is written:
same files, same digest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_COPY_BYTES = 1 << 20
_EPOCH = "1970-01-01T00:00:00Z"
_PLATFORM = {"architecture": "amd64", "os": "linux"}


@dataclass(frozen=True, slots=True)
class File:
    """A file of this machine. It keeps its modification time (else Python's .pyc files count as stale) and whether it
    may be executed; everyone may read it, since pods run as nobody."""

    source: Path


@dataclass(frozen=True, slots=True)
class Text:
    content: bytes
    is_executable: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    target: str


@dataclass(frozen=True, slots=True)
class Folder:
    mode: int = 0o755


Entry = File | Text | Link | Folder
Entries = Mapping[str, Entry]  # by absolute path in the image; parents are made by themselves


@dataclass(frozen=True, slots=True)
class Layer:
    """An uncompressed tar; its digest is its diff id too. `path` is None when only containerd has it."""

    digest: str
    num_bytes: int
    path: Path | None


@dataclass(frozen=True, slots=True)
class Image:
    """A name, layers from the bottom up, and how it is run."""

    name: str
    layers: tuple[Layer, ...]
    entrypoint: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str = "65534:65534"


def write_layer(entries: Entries, path: Path) -> Layer:
    """Write the layer's tar to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as raw:
        out = _Forward(raw, digest.update)
        with _tar(out) as archive:
            for destination, entry in sorted(_with_parents(entries).items()):
                _add(archive, destination, entry)
    return Layer(f"sha256:{digest.hexdigest()}", out.tell(), path)


def write_archive(images: Iterable[Image], out: IO[bytes], *, without: Collection[str] = ()) -> None:
    """Write a tar of an OCI layout with all images to `out`; layers whose digest is in `without` are left out."""
    with _tar(_Forward(out, lambda _: None)) as archive:
        _add(archive, "/oci-layout", Text(b'{"imageLayoutVersion":"1.0.0"}'))
        manifests = []
        written: set[str] = set(without)
        for image in images:
            config, manifest = describe(image)
            for layer in image.layers:
                if layer.digest not in written:
                    assert layer.path is not None, f"layer {layer.digest} of {image.name} is only in containerd"
                    _add(archive, _blob_path(layer.digest), File(layer.path))
                    written.add(layer.digest)
            for blob in (config, manifest):
                if digest_of(blob) not in written:
                    _add(archive, _blob_path(digest_of(blob)), Text(blob))
                    written.add(digest_of(blob))
            name = {"io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": image.name}
            manifests.append({**_descriptor(_MANIFEST_TYPE, manifest), "platform": _PLATFORM, "annotations": name})
        index = {"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": manifests}
        _add(archive, "/index.json", Text(_json(index)))


def describe(image: Image) -> tuple[bytes, bytes]:
    """The image's configuration and its manifest, as they are stored."""
    config = _json(
        {
            **_PLATFORM,
            "created": _EPOCH,
            "config": {
                "Entrypoint": list(image.entrypoint),
                "Env": [f"{name}={value}" for name, value in image.environment.items()],
                "User": image.user,
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in image.layers]},
            "history": [{"created": _EPOCH, "created_by": "rljob dev cluster"} for _ in image.layers],
        }
    )
    layers = [{"mediaType": _LAYER_TYPE, "digest": layer.digest, "size": layer.num_bytes} for layer in image.layers]
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "config": _descriptor(_CONFIG_TYPE, config),
            "layers": layers,
        }
    )
    return config, manifest


def digest_of(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(blob), "size": len(blob)}


def _blob_path(digest: str) -> str:
    return f"/blobs/sha256/{digest.removeprefix('sha256:')}"


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class _Forward(io.RawIOBase):
    """Passes bytes on to `out`, which may be a pipe, and shows them to `see`."""

    def __init__(self, out: IO[bytes], see: Callable[[Buffer], None]) -> None:
        self._out = out
        self._see = see
        self._num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        self._see(data)
        written = self._out.write(data)
        self._num_bytes += written
        return written

    def tell(self) -> int:
        return self._num_bytes


def _tar(out: _Forward) -> tarfile.TarFile:
    # With the default of 16 KiB a layer of gigabytes takes twice as long.
    return tarfile.TarFile(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, copybufsize=_COPY_BYTES)


def _with_parents(entries: Entries) -> dict[str, Entry]:
    complete = dict(entries)
    for destination in entries:
        for parent in Path(destination).parents:
            if parent != Path("/"):
                complete.setdefault(str(parent), Folder())
    return complete


def _add(archive: tarfile.TarFile, destination: str, entry: Entry) -> None:
    info = tarfile.TarInfo(destination.lstrip("/"))
    match entry:
        case Folder(mode):
            info.type, info.mode = tarfile.DIRTYPE, mode
            archive.addfile(info)
        case Link(target):
            info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, target
            archive.addfile(info)
        case Text(content, is_executable):
            info.mode, info.size = (0o755 if is_executable else 0o644), len(content)
            archive.addfile(info, io.BytesIO(content))
        case File(source):
            with source.open("rb") as file:
                found = os.fstat(file.fileno())
                info.mode = 0o755 if found.st_mode & stat.S_IXUSR else 0o644
                info.mtime, info.size = int(found.st_mtime), found.st_size
                archive.addfile(info, file)
