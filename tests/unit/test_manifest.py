"""`open_dist` reads a directory from a stranger: what is wrong with it is named, and nothing outside is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_models import write_model
from test_artifact import write

from awq_compile.errors import ArtifactError, UsageError
from awq_compile.formats import QuantScheme
from awq_compile.manifest import file_sha256, is_dist, open_dist
from awq_compile.models.config import read_config


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    """A good DIST."""
    write(tmp_path / "dist", read_config(write_model(tmp_path / "model")), QuantScheme.parse("w4g128"))
    return tmp_path / "dist"


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Changes a JSON file, and the manifest's entry of it."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    if path.name != "manifest.json":
        entry = {"nbytes": path.stat().st_size, "sha256": file_sha256(path)}
        edit(path.parent / "manifest.json", lambda manifest: manifest["files"].update({path.name: entry}))


def first(data: Any) -> Any:
    """The first parameter of tensor-cache.json."""
    return data["records"][0]["records"][0]


CACHE_CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "parent": (lambda d: d["records"][0].update(dataPath="../secret"), "not a path within"),
    "absolute": (lambda d: d["records"][0].update(dataPath="/etc/passwd"), "not a path within"),
    "dotted": (lambda d: d["records"][0].update(dataPath="lib/../params_shard_0.bin"), "not a path within"),
    "nul": (lambda d: d["records"][0].update(dataPath="params\0"), "not a path within"),
    "missing": (lambda d: d["records"][0].update(dataPath="params_shard_9.bin"), "is missing"),
    "size": (lambda d: d["records"][0].update(nbytes=5), "bytes, and tensor-cache.json says 5"),
    "negative": (lambda d: first(d).update(byteOffset=-4), "byteOffset is -4"),
    "outside": (lambda d: first(d).update(byteOffset=1 << 40), "lie outside"),
    "boolean": (lambda d: first(d).update(byteOffset=True), "byteOffset is True"),
    "shape": (lambda d: first(d).update(shape=[4096, 129]), "takes"),
    "zero shape": (lambda d: first(d).update(shape=[0, 4]), "expected positive integers"),
    "text shape": (lambda d: first(d).update(shape=["a"]), "expected positive integers"),
    "dtype": (lambda d: first(d).update(dtype="object"), "dtype 'object'"),
    "format": (lambda d: first(d).update(format="pickle"), "format 'pickle'"),
    "twice": (lambda d: d["records"][0]["records"].append(first(d)), "appears twice"),
    "no records": (lambda d: d.update(records=None), "records is None"),
    "not objects": (lambda d: d.update(records=[3]), "dataPath is None"),
}


@pytest.mark.parametrize("name", CACHE_CHANGES)
def test_hostile_tensor_cache(dist: Path, name: str) -> None:
    """Each change to tensor-cache.json is refused with the reason."""
    change, message = CACHE_CHANGES[name]
    edit(dist / "tensor-cache.json", change)
    with pytest.raises(ArtifactError, match=message):
        open_dist(dist)


MANIFEST_CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "format": (lambda d: d.update(format="other"), "format is 'other'"),
    "version": (lambda d: d.update(version=2), "version is 2"),
    "scheme": (lambda d: d.update(scheme="w5g1"), "scheme is 'w5g1'"),
    "escape": (lambda d: d["files"].update({"../x": {"nbytes": 1, "sha256": ""}}), "not a path within"),
    "nbytes": (lambda d: d["files"]["tokenizer.json"].update(nbytes="1"), "nbytes is '1'"),
    "library": (lambda d: d["libraries"]["cpu"].update(path="/usr/lib/libc.so"), "not among its files"),
    "no library path": (lambda d: d["libraries"].update(cpu={}), "path is None"),
    "unlisted": (lambda d: d["files"].pop("tensor-cache.json"), "tensor-cache.json is not among"),
    "list": (lambda d: d.update(files=[]), "files is"),
}


@pytest.mark.parametrize("name", MANIFEST_CHANGES)
def test_hostile_manifest(dist: Path, name: str) -> None:
    """Each change to manifest.json is refused with the reason."""
    change, message = MANIFEST_CHANGES[name]
    edit(dist / "manifest.json", change)
    with pytest.raises(ArtifactError, match=message):
        open_dist(dist)


def test_a_link_out_of_the_directory_is_refused(dist: Path, tmp_path: Path) -> None:
    """A shard that is a link to a file elsewhere is not read, though its size fits."""
    shard = dist / "params_shard_0.bin"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="through a link"):
        open_dist(dist)


def test_truncated_and_changed_files(dist: Path) -> None:
    """A truncated file is found at once, a changed byte by `verify`."""
    library = dist / "lib" / "tiny-w4g128-cpu.so"
    library.write_bytes(b"LIBRARY")
    found = open_dist(dist)
    with pytest.raises(ArtifactError, match="sha256"):
        found.verify()
    library.write_bytes(b"LIB")
    with pytest.raises(ArtifactError, match="3 bytes, and manifest"):
        open_dist(dist)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_object(dist: Path, text: bytes) -> None:
    """Anything but a JSON object is one clear error, also when it is deeply nested."""
    (dist / "manifest.json").write_bytes(text)
    assert not is_dist(dist)
    with pytest.raises(ArtifactError):
        open_dist(dist)


def test_other_directories_are_named_as_such(tmp_path: Path) -> None:
    """A directory without manifest, and no directory, say what to give."""
    with pytest.raises(ArtifactError, match="holds no manifest"):
        open_dist(tmp_path)
    with pytest.raises(ArtifactError, match="not a directory"):
        open_dist(tmp_path / "none")


def test_library_by_target(dist: Path) -> None:
    """The library of a target, the only one by default, and a clear error for another."""
    found = open_dist(dist)
    assert found.library() == found.library("cpu") == dist / "lib" / "tiny-w4g128-cpu.so"
    with pytest.raises(UsageError, match="only for cpu"):
        found.library("cuda")
