"""Writes a DIST (see `manifest`): everything into a hidden sibling, renamed when it is complete.

    with DistWriter(out) as dist:
        dist.write_parameters(model_parameters(config, scheme), model)
        dist.write_tokenizer(folder)
        …
        dist.commit(manifest data)

Leaving the block without `commit`, by an error or Ctrl-C, removes what was written; a SIGKILL leaves the
hidden sibling, which the next run removes. The final name only ever holds a whole DIST. Hidden siblings are known by
our mark (`ours`) while they are written, by their manifest when they are whole.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from awq_compile import __version__
from awq_compile.errors import ArtifactError, EnvironmentMissingError, ModelError, UsageError
from awq_compile.formats import QuantScheme
from awq_compile.manifest import (
    MANIFEST,
    TENSOR_CACHE,
    FileEntry,
    LibraryEntry,
    Manifest,
    dump_json,
    file_sha256,
    is_dist,
    unlisted_files,
)
from awq_compile.models.parameters import Parameter
from awq_compile.models.stored import WeightSource, stored_arrays
from awq_compile.ours import MARK, clear, foreign, is_ours, remove, taken

SHARD_BYTES: Final = 32 << 20  # MLC's; a larger tensor gets a shard of its own

# What tokenizers of the supported families consist of; the MLC runtime prefers tokenizer.json.
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)

# Packages whose version can change the bytes that come out.
_VERSIONED: Final = ("apache-tvm", "apache-tvm-ffi", "numpy", "torch", "transformers", "ziglang")

_DISK_ERRNOS: Final = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the size limit",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENOTDIR: "a part of the path is not a directory",
    errno.EIO: "input/output error",
    errno.ENAMETOOLONG: "the name is too long",
}


def disk_error(error: BaseException, path: Path | str | None = None) -> EnvironmentMissingError | None:
    """The message for an error that means "the disk does not take it", else None.

    Libraries that write for us (safetensors, TVM, the linker) lose the errno: their text is searched.
    """
    reason = _DISK_ERRNOS.get(error.errno or 0) if isinstance(error, OSError) else None
    if reason is None and not isinstance(error, OSError):
        text = str(error)
        known = {"No space left on device": errno.ENOSPC, "File too large": errno.EFBIG, "NoSpaceLeft": errno.ENOSPC}
        reason = next((_DISK_ERRNOS[code] for word, code in known.items() if word in text), None)
    if reason is None:
        return None
    where = path or (error.filename if isinstance(error, OSError) else None)
    return EnvironmentMissingError(
        f"cannot write{f' {where}' if where else ''}: {reason}",
        hint="free some space, or choose another folder with -o DIR",
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of the disk under `path` into one clear `EnvironmentMissingError`."""
    try:
        yield
    except Exception as error:
        if (clear := disk_error(error, path)) is not None:
            raise clear from error
        raise


class DistWriter:
    """One DIST being written. `path` is the hidden sibling that `commit` renames to `final`."""

    def __init__(self, final: Path) -> None:
        self.final = final.resolve()
        self.path, self._old = _hidden(self.final)
        self._lock: int | None = None
        self._made_parents = [parent for parent in self.final.parents if not parent.exists()]
        self.libraries: dict[str, LibraryEntry] = {}

    def __enter__(self) -> Self:
        check_output(self.final)
        try:
            self._begin()
        except BaseException:
            self._unlock()
            self._remove_parents()
            raise
        return self

    def _begin(self) -> None:
        """Makes the hidden sibling, empty, and locks it."""
        with disk_errors(self.final):
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ArtifactError(
                    f"another awq-compile is writing {self.final}", hint="wait for it, or choose -o DIR"
                ) from None
            check_output(self.final)
            (self.path / MARK).touch()
            _remove_dist(self._old)
            clear(self.path, MARK)
            (self.path / "lib").mkdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_parents(self) -> None:
        """Takes back the folders that were made for a DIST that did not come to be."""
        for parent in self._made_parents:
            with suppress(OSError):  # not empty, or not made
                parent.rmdir()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove_dist(self.path)
        self._unlock()
        if not self.final.exists():
            self._remove_parents()

    def write_text(self, name: str, text: str) -> None:
        """One text file."""
        with disk_errors(self.final):
            (self.path / name).parent.mkdir(exist_ok=True)
            (self.path / name).write_text(text, encoding="utf-8", newline="\n")

    def write_parameters(self, parameters: Iterable[Parameter], source: WeightSource) -> int:
        """Shards and tensor-cache.json, one parameter in memory at a time. Returns the bytes of all."""
        shards: list[dict[str, Any]] = []
        total = 0
        with disk_errors(self.final):
            for name, shape, dtype, parts in stored_arrays(parameters, source):
                nbytes = sum(part.nbytes for part in parts)
                if not shards or shards[-1]["nbytes"] + nbytes > SHARD_BYTES:
                    data_path = f"params_shard_{len(shards)}.bin"
                    shards.append({"dataPath": data_path, "format": "raw-shard", "nbytes": 0, "records": []})
                shard = shards[-1]
                with (self.path / shard["dataPath"]).open("ab") as file:
                    for part in parts:
                        file.write(np.ascontiguousarray(part).data)
                record = {"name": name, "shape": list(shape), "dtype": dtype, "format": "raw", "nbytes": nbytes}
                shard["records"].append({**record, "byteOffset": shard["nbytes"]})
                shard["nbytes"] += nbytes
                total += nbytes
        count = sum(len(shard["records"]) for shard in shards)
        self.write_text(
            TENSOR_CACHE, dump_json({"metadata": {"ParamSize": count, "ParamBytes": total}, "records": shards})
        )
        return total

    def write_tokenizer(self, source: Path) -> list[str]:
        """Copies the tokenizer's files; returns their names."""
        names = tokenizer_files(source)
        with disk_errors(self.final):
            for name in names:
                shutil.copyfile(source / name, self.path / name)
        return names

    def library_path(
        self, model: str, scheme: QuantScheme, target: str, suffix: str, tvm_target: dict[str, Any]
    ) -> Path:
        """Where the library for `target` goes; noted for the manifest."""
        name = f"lib/{model}-{scheme.name}-{target.replace(':', '-')}{suffix}"
        self.libraries[target] = LibraryEntry(name, tvm_target)
        return self.path / name

    def manifest(self, model: str, scheme: QuantScheme, options: dict[str, Any]) -> Manifest:
        """Writes manifest.json for the files written so far."""
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.name not in (MANIFEST, MARK))
        entries = {p.relative_to(self.path).as_posix(): FileEntry(p.stat().st_size, file_sha256(p)) for p in files}
        manifest = Manifest(model, scheme.name, self.libraries, options, versions(), entries)
        self.write_text(MANIFEST, manifest.dumps())
        return manifest

    def commit(self) -> None:
        """Gives the finished directory its final name, in one step where the file system can."""
        assert (self.path / MANIFEST).is_file()
        check_output(self.final)
        with disk_errors(self.final):
            (self.path / MARK).unlink()
            if self.final.is_dir() and any(self.final.iterdir()):
                if _exchange(self.path, self.final):
                    return  # the old DIST now has the hidden name, and __exit__ removes it
                self.final.rename(self._old)
            self.path.rename(self.final)
            _remove_dist(self._old)


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer's files in a model directory; tokenizer.json must be among them."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if "tokenizer.json" not in names:
        raise ModelError(
            f"{folder} has no tokenizer.json",
            hint="write one: transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    return names


def _hidden(final: Path) -> tuple[Path, Path]:
    """Where a DIST is written, and where the former one waits for its end if two names cannot be swapped."""
    folder = final.resolve()
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")


def _remove_dist(folder: Path) -> None:
    """Removes a hidden sibling, if it is there."""
    with suppress(OSError):
        remove(folder, MANIFEST, MARK)


def check_output(final: Path) -> None:
    """Refuses to replace or remove anything but empty directories and what we wrote ourselves."""
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise UsageError(f"{final} exists and is not a directory", hint="choose another folder with -o DIR")
    try:
        if final.is_dir() and any(final.iterdir()):
            if not is_dist(final):
                raise UsageError(
                    f"{final} exists and was not written by awq-compile, so it is not replaced",
                    hint="choose another folder with -o DIR",
                )
            if others := unlisted_files(final):
                raise UsageError(
                    f"{final} holds files that its {MANIFEST} does not name, so it is not replaced: "
                    f"{', '.join(others):.200}",
                    hint="move them away, or choose another folder with -o DIR",
                )
        for folder in _hidden(final):
            if taken(folder) and not is_ours(folder) and (not is_dist(folder) or unlisted_files(folder)):
                raise foreign(folder)
    except OSError as error:
        raise disk_error(error, final) or error from None


def check_writable(folder: Path, option: str, given: Path) -> None:
    """Raises `EnvironmentMissingError` unless files can be made in `folder`, which `given` of `option` needs.

    The folder need not be there: it is made, and taken back.
    """
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reasons = _DISK_ERRNOS | {errno.ENOENT: "no folder can be made there"}
        raise EnvironmentMissingError(
            f"cannot write {given}: {reasons.get(error.errno or 0, error.strerror)}",
            hint=f"choose another folder with {option} DIR",
        ) from None
    finally:
        for path in made:
            with suppress(OSError):  # not made
                path.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two directories' names atomically (Linux renameat2); False where that is not possible."""
    if not sys.platform.startswith("linux"):
        return False
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0)


def versions() -> dict[str, str]:
    """Version of this program and of every package that can change the bytes."""
    found = {"awq-compile": __version__}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
