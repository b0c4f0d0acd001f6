"""Images: what is written is what the specification asks for, and depends on nothing but the files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from tools.devcluster.oci import Entry, File, Folder, Image, Layer, Link, Text, describe, write_archive, write_layer


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_bytes(b"#!/bin/sh\n")
    path.chmod(0o700)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


def entries(program: Path) -> dict[str, Entry]:
    return {
        "/usr/bin/program": File(program),
        "/usr/bin/link": Link("program"),
        "/etc/passwd": Text(b"nobody\n"),
        "/tmp": Folder(0o1777),
    }


def members(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as archive:
        return {member.name: member for member in archive.getmembers()}


def test_a_layer_s_digest_is_the_sha256_of_its_tar(tmp_path: Path, program: Path) -> None:
    layer = write_layer(entries(program), tmp_path / "layer.tar")
    content = (tmp_path / "layer.tar").read_bytes()
    assert layer.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert layer.num_bytes == len(content)


def test_the_same_files_make_the_same_layer_whatever_their_order(tmp_path: Path, program: Path) -> None:
    one = write_layer(entries(program), tmp_path / "one.tar")
    other = write_layer(dict(reversed(entries(program).items())), tmp_path / "other.tar")
    assert one.digest == other.digest


def test_a_changed_byte_makes_another_layer(tmp_path: Path, program: Path) -> None:
    one = write_layer(entries(program), tmp_path / "one.tar")
    other = write_layer(entries(program) | {"/etc/passwd": Text(b"nobodY\n")}, tmp_path / "other.tar")
    assert one.digest != other.digest


def test_others_may_read_what_only_its_owner_may_here(tmp_path: Path, program: Path) -> None:
    private = tmp_path / "private"
    private.write_bytes(b"x")
    private.chmod(0o600)
    write_layer({"/a/program": File(program), "/a/private": File(private)}, tmp_path / "layer.tar")
    found = members(tmp_path / "layer.tar")
    assert (found["a/program"].mode, found["a/private"].mode, found["a"].mode) == (0o755, 0o644, 0o755)


def test_files_keep_their_time_for_python_s_byte_code_and_belong_to_root(tmp_path: Path, program: Path) -> None:
    write_layer(entries(program), tmp_path / "layer.tar")
    found = members(tmp_path / "layer.tar")["usr/bin/program"]
    assert (found.mtime, found.uid, found.gid) == (1_700_000_000, 0, 0)


def test_parents_come_before_what_is_in_them(tmp_path: Path, program: Path) -> None:
    write_layer(entries(program), tmp_path / "layer.tar")
    names = list(members(tmp_path / "layer.tar"))
    assert names == ["etc", "etc/passwd", "tmp", "usr", "usr/bin", "usr/bin/link", "usr/bin/program"]


def test_a_manifest_names_its_configuration_and_layers_by_digest_and_size(tmp_path: Path, program: Path) -> None:
    layer = write_layer(entries(program), tmp_path / "layer.tar")
    config, manifest = describe(Image("localhost/x:dev", (layer,), ("/usr/bin/program",), {"A": "1"}))
    document = json.loads(manifest)
    assert document["config"]["digest"] == f"sha256:{hashlib.sha256(config).hexdigest()}"
    assert document["config"]["size"] == len(config)
    assert document["layers"] == [
        {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer.digest, "size": layer.num_bytes}
    ]
    assert json.loads(config)["rootfs"] == {"type": "layers", "diff_ids": [layer.digest]}
    assert json.loads(config)["config"]["Env"] == ["A=1"]
    assert json.loads(config)["config"]["User"] == "65534:65534"


def test_every_descriptor_of_an_archive_leads_to_a_blob_with_that_digest(tmp_path: Path, program: Path) -> None:
    layer = write_layer(entries(program), tmp_path / "layer.tar")
    images = [Image("localhost/a:dev", (layer,), ("/a",)), Image("localhost/b:dev", (layer,), ("/b",))]
    blobs = unpacked(images)
    index = json.loads(blobs["index.json"])
    assert [item["annotations"]["io.containerd.image.name"] for item in index["manifests"]] == [
        "localhost/a:dev",
        "localhost/b:dev",
    ]
    for item in index["manifests"]:
        manifest = blob(blobs, item)
        for descriptor in (json.loads(manifest)["config"], *json.loads(manifest)["layers"]):
            blob(blobs, descriptor)
    assert len(blobs) == 2 + 1 + 2 * 2, "a layer that two images share is written once"


def test_layers_that_containerd_has_are_left_out(tmp_path: Path, program: Path) -> None:
    base = Layer("sha256:" + "0" * 64, 5, path=None)
    top = write_layer(entries(program), tmp_path / "top.tar")
    image = Image("localhost/a:dev", (base, top), ("/a",))
    blobs = unpacked([image], without={base.digest})
    assert f"blobs/sha256/{'0' * 64}" not in blobs
    assert f"blobs/{top.digest.replace(':', '/')}" in blobs
    with pytest.raises(AssertionError, match="is only in containerd"):
        unpacked([image])


def unpacked(images: list[Image], without: set[str] = frozenset()) -> dict[str, bytes]:  # type: ignore[assignment]
    out = io.BytesIO()
    write_archive(images, out, without=without)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        found = {}
        for member in archive.getmembers():
            file = archive.extractfile(member)
            if file is not None:
                found[member.name] = file.read()
        return found


def blob(blobs: dict[str, bytes], descriptor: dict[str, object]) -> bytes:
    content = blobs[f"blobs/{str(descriptor['digest']).replace(':', '/')}"]
    assert f"sha256:{hashlib.sha256(content).hexdigest()}" == descriptor["digest"]
    assert len(content) == descriptor["size"]
    return content
