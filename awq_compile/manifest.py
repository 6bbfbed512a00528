"""A DIST directory, read back: `open_dist` checks it like input from a stranger.

    dist/<model>-<scheme>/
      manifest.json            format, versions, options, and size and sha256 of every other file
      mlc-chat-config.json     what the MLC runtime reads first
      tensor-cache.json        name, shape, dtype, file and offset of every parameter
      params_shard_<i>.bin     the parameters, raw
      tokenizer.json …         copied from the model
      lib/<model>-<scheme>-<target>.so
      report.json report.html

Nothing here imports torch or tvm.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from awq_compile.errors import ArtifactError, UsageError
from awq_compile.formats import QuantScheme
from awq_compile.json_input import read_object

FORMAT: Final = "awq-compile dist"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
CHAT_CONFIG: Final = "mlc-chat-config.json"
TENSOR_CACHE: Final = "tensor-cache.json"

_MAX_JSON_BYTES: Final = 256 << 20
_MAX_RANK, _MAX_SIZE = 8, 1 << 48  # of an array
_DTYPES: Final = {"uint32": 4, "uint8": 1, "float16": 2, "float32": 4}
T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class LibraryEntry:
    """One compiled library: its path within DIST and the TVM target it was built for."""

    path: str
    tvm_target: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """manifest.json. No time and no machine path, so equal inputs give equal bytes."""

    model: str
    scheme: str
    libraries: dict[str, LibraryEntry]  # by target name
    options: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileEntry]

    def dumps(self) -> str:
        """The file's text."""
        return dump_json({"format": FORMAT, "version": VERSION, **asdict(self)})


@dataclass(frozen=True)
class TensorRecord:
    """One parameter: bytes [offset, offset + nbytes) of `file` hold a `dtype` array of `shape`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Dist:
    """A DIST directory whose names, sizes and offsets have been checked."""

    path: Path
    manifest: Manifest
    chat_config: dict[str, Any]
    tensors: tuple[TensorRecord, ...]

    def library(self, target: str | None = None) -> Path:
        """The library for `target`, or the only (else the first) one."""
        libraries = self.manifest.libraries
        if not libraries:
            raise ArtifactError(f"{self.path / MANIFEST} names no library", hint="compile again")
        name = next(iter(libraries)) if target is None else target
        if name not in libraries:
            raise UsageError(
                f"{self.path} has no library for target {name!r}, only for {', '.join(libraries)}",
                hint=f"leave --target out, or compile the model with --target {name or 'cpu'}",
            )
        return self.path / libraries[name].path

    def read(self, record: TensorRecord) -> npt.NDArray[Any]:
        """The parameter's values, mapped from its file."""
        shape = record.shape
        file = self.path / record.file
        return np.memmap(file, dtype=record.dtype, mode="r", offset=record.offset, shape=shape)

    def verify(self) -> None:
        """Compares the sha256 of every file with the manifest."""
        for name in self.manifest.files:
            self.verify_file(self.path / name)

    def verify_file(self, path: Path) -> None:
        """Compares the sha256 of one file with the manifest."""
        expected = self.manifest.files[path.relative_to(self.path).as_posix()].sha256
        if (found := file_sha256(path)) != expected:
            raise ArtifactError(
                f"{path}: sha256 is {found}, and {MANIFEST} says {expected}",
                hint="the file was changed or damaged: compile again",
            )


def dump_json(data: Any) -> str:
    """JSON as every file of a DIST is written."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_dist(path: Path) -> bool:
    """Whether `path` is a directory that this program wrote as a DIST (or one that claims so)."""
    try:
        return (path / MANIFEST).is_file() and json_object(path / MANIFEST).get("format") == FORMAT
    except ArtifactError:
        return False


def unlisted_files(dist: Path) -> list[str]:
    """Files in a DIST that its manifest does not name."""
    listed = json_object(dist / MANIFEST).get("files")
    known = {MANIFEST, *(listed if isinstance(listed, dict) else ())}
    found = (p.relative_to(dist).as_posix() for p in dist.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(name for name in found if name not in known)


def open_dist(path: Path) -> Dist:
    """Reads and checks a DIST; `Dist.verify` compares the digests too.

    Raises `ArtifactError` for anything missing, mistyped, out of range or leading out of the directory.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory", hint="give a directory that awq-compile wrote")
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"{path} holds no {MANIFEST}, so it is not a compiled model", hint="awq-compile MODEL -o DIR writes one"
        )
    manifest = read_manifest(path / MANIFEST)
    for name, entry in manifest.files.items():
        _check_file(path, name, entry.nbytes, MANIFEST)
    for target, library in manifest.libraries.items():
        if library.path not in manifest.files:
            raise ArtifactError(
                f"{path / MANIFEST}: library {library.path!r} of target {target!r} is not among its files"
            )
    for required in (CHAT_CONFIG, TENSOR_CACHE):
        if required not in manifest.files:
            raise ArtifactError(f"{path / MANIFEST}: {required} is not among its files")
    return Dist(path, manifest, json_object(path / CHAT_CONFIG), _read_tensor_cache(path))


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    return read_object(path, ArtifactError, _MAX_JSON_BYTES)


def json_field(data: Any, key: str, kind: type[T], where: str) -> T:
    """`data[key]` as `kind`; integers must not be negative."""
    value = data.get(key) if isinstance(data, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise ArtifactError(f"{where}: {key} is {value!r:.80}, expected {kind.__name__}")
    return value


def _check_file(root: Path, name: str, nbytes: int, where: str) -> None:
    """`name` must be a relative path to a regular file inside `root`, of `nbytes` bytes."""
    pure = PurePosixPath(name)
    plain = all(len(part) < 256 for part in pure.parts) and len(name) < 1024
    plain = plain and bool(re.fullmatch(r"[\w.+@/ -]+", name)) and str(pure) == name
    if not plain or pure.is_absolute() or ".." in pure.parts:
        raise ArtifactError(f"{root / where}: {name!r} is not a path within the directory")
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ArtifactError(f"{root / where}: {name!r} leads out of the directory through a link")
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing, and {where} names it", hint="compile again, or copy the whole directory"
        )
    if (size := path.stat().st_size) != nbytes:
        raise ArtifactError(
            f"{path}: {size} bytes, and {where} says {nbytes}", hint="the file is truncated: compile again"
        )


def read_manifest(path: Path) -> Manifest:
    """manifest.json, typed. Raises `ArtifactError` for what is none."""
    data, where = json_object(path), str(path)
    if data.get("format") != FORMAT:
        raise ArtifactError(f"{where}: format is {data.get('format')!r:.80}, expected {FORMAT!r}")
    if data.get("version") != VERSION:
        raise ArtifactError(
            f"{where}: version is {data.get('version')!r:.80}, and this program reads {VERSION}", hint="compile again"
        )
    files = {
        name: FileEntry(
            json_field(entry, "nbytes", int, f"{where}: {name}"), json_field(entry, "sha256", str, f"{where}: {name}")
        )
        for name, entry in json_field(data, "files", dict, where).items()
    }
    libraries = {
        name: LibraryEntry(
            json_field(entry, "path", str, f"{where}: {name}"),
            json_field(entry, "tvm_target", dict, f"{where}: {name}"),
        )
        for name, entry in json_field(data, "libraries", dict, where).items()
    }
    versions = json_field(data, "versions", dict, where)
    scheme = json_field(data, "scheme", str, where)
    try:
        QuantScheme.parse(scheme)
    except UsageError as error:
        raise ArtifactError(f"{where}: scheme is {scheme!r:.80}: {error}") from None
    return Manifest(
        json_field(data, "model", str, where),
        scheme,
        libraries,
        json_field(data, "options", dict, where),
        {str(k): str(v) for k, v in versions.items()},
        files,
    )


def _read_tensor_cache(root: Path) -> tuple[TensorRecord, ...]:
    """tensor-cache.json, with every offset checked against its file."""
    path = root / TENSOR_CACHE
    found: dict[str, TensorRecord] = {}
    for shard in json_field(json_object(path), "records", list, str(path)):
        file, size = json_field(shard, "dataPath", str, str(path)), json_field(shard, "nbytes", int, str(path))
        _check_file(root, file, size, TENSOR_CACHE)
        for item in json_field(shard, "records", list, f"{path}: {file}"):
            name = json_field(item, "name", str, f"{path}: {file}")
            where = f"{path}: {name}"
            shape, dtype = json_field(item, "shape", list, where), json_field(item, "dtype", str, where)
            offset, nbytes = json_field(item, "byteOffset", int, where), json_field(item, "nbytes", int, where)
            if dtype not in _DTYPES or json_field(item, "format", str, where) != "raw":
                raise ArtifactError(f"{where}: dtype {dtype!r} and format {item['format']!r} are not supported")
            if len(shape) > _MAX_RANK or not all(type(d) is int and 0 < d <= _MAX_SIZE for d in shape):
                raise ArtifactError(
                    f"{where}: shape is {shape!s:.80}, expected positive integers up to {_MAX_SIZE}, and at most "
                    f"{_MAX_RANK} of them"
                )
            if nbytes != math.prod(shape) * _DTYPES[dtype]:
                raise ArtifactError(
                    f"{where}: {nbytes} bytes, and {dtype} {shape} takes {math.prod(shape) * _DTYPES[dtype]}"
                )
            if offset + nbytes > size:
                raise ArtifactError(f"{where}: bytes {offset} to {offset + nbytes} lie outside {file} of {size} bytes")
            if name in found:
                raise ArtifactError(f"{where}: the name appears twice")
            found[name] = TensorRecord(name, tuple(shape), dtype, file, offset, nbytes)
    return tuple(found.values())
