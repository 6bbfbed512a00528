"""The work directory of a quantisation: what makes it resumable, and its output all or nothing.

    OUT.partial/.awq-compile             the mark that it is ours (`ours`), and the lock
    OUT.partial/partial.json             what determines the bytes; another one starts afresh
    OUT.partial/hidden-00002.safetensors hidden states after the last finished layer
    OUT.partial/checkpoint/              becomes OUT by one rename, when everything is in it

A layer is finished when its file appears in `checkpoint/`: it is written under another name, synced and
renamed, after the hidden states that the next layer needs. So a kill at any moment leaves finished layers.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from awq_compile.awq.checkpoint import LinearReport, write_json
from awq_compile.errors import CheckpointError, EnvironmentMissingError
from awq_compile.models.weights import read_header
from awq_compile.ours import MARK, clear, foreign, is_ours, remove, taken

Arrays = dict[str, npt.NDArray[Any]]


def sync(path: Path) -> None:
    """Makes a file or a directory entry durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def contiguous(arrays: Arrays) -> Arrays:
    """safetensors writes an array's memory as it lies, in whatever order its strides give."""
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def clear_finished(out: Path) -> None:
    """Removes what a kill right after the last rename leaves beside a finished `out`."""
    root = out.parent / f"{out.name}.partial"
    if (root / MARK).is_file() and not (root / "checkpoint").exists():
        remove(root, MARK)


class WorkDirectory:
    """`OUT.partial`, locked against a second process."""

    def __init__(self, out: Path, needed_bytes: int) -> None:
        self.out = out
        self.root = out.parent / f"{out.name}.partial"
        self.checkpoint = self.root / "checkpoint"
        self._lock: IO[bytes] | None = None
        self._made_parents: list[Path] = []
        try:
            parent = out.parent
            while not parent.exists():
                self._made_parents.append(parent)
                parent = parent.parent
            if taken(self.root) and not is_ours(self.root):
                raise foreign(self.root)
            free = shutil.disk_usage(parent).free
            held = sum(f.stat().st_size for f in self.root.rglob("*") if f.is_file()) if self.root.exists() else 0
            if free + held < needed_bytes:
                raise EnvironmentMissingError(
                    f"{parent} has {free / 1e6:.0f} MB free, and quantising needs {needed_bytes / 1e6:.0f} MB there",
                    hint="free some space, or choose another disk with -o",
                )
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / MARK).open("ab")
            self.checkpoint.mkdir(exist_ok=True)
        except OSError as problem:
            self._remove_parents()
            raise EnvironmentMissingError(
                f"{self.root} cannot be written: {problem.strerror}", hint="choose another -o"
            ) from None
        with suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise CheckpointError(
                    f"another awq-compile is writing {self.out}",
                    hint="wait for it: then the same command takes what it made",
                ) from None

    def prepare(self, key: dict[str, Any]) -> tuple[int, bool]:
        """(finished layers to go on from, whether something else lay there and was dropped)."""
        record = self.root / "partial.json"
        dropped = False
        if self._replaced.exists() and not self.out.exists():  # killed between the two renames of `finish`
            self._replaced.rename(self.out)
        try:
            same = json.loads(record.read_text(encoding="utf-8")) == json.loads(json.dumps(key))
        except FileNotFoundError:
            same = False
        except (OSError, ValueError):
            same = False
            dropped = True
        if not same:
            dropped = dropped or record.exists()
            clear(self.root, MARK)
            self.checkpoint.mkdir()
            self._write(lambda path: write_json(path, key), record)
        for path in [*self.root.glob("*.tmp"), *self.checkpoint.glob("*.tmp")]:
            path.unlink()
        done = 0
        while self.layer_file(done).exists():
            done += 1
        return done, dropped

    def layer_file(self, index: int) -> Path:
        """Where a finished layer lies."""
        return self.checkpoint / f"layer-{index:05d}.safetensors"

    @property
    def embedding_file(self) -> Path:
        """Where the embedding lies, rounded before the layers."""
        return self.checkpoint / "embedding.safetensors"

    @property
    def head_file(self) -> Path:
        """Where final norm and LM head lie, rounded after the layers."""
        return self.checkpoint / "head.safetensors"

    @property
    def _replaced(self) -> Path:
        return self.root / "replaced"

    def _hidden_file(self, index: int) -> Path:
        return self.root / f"hidden-{index:05d}.safetensors"

    def _write(self, save: Any, path: Path) -> None:
        """Writes by `save(temporary path)`, syncs and renames."""
        temporary = path.with_name(path.name + ".tmp")
        try:
            save(temporary)
            temporary.chmod(0o644)  # safetensors writes for the owner only
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except (OSError, SafetensorError) as problem:
            raise EnvironmentMissingError(
                f"{path} cannot be written: {problem}", hint="free some space, or choose another -o"
            ) from None

    def commit(self, path: Path, arrays: Arrays, reports: list[LinearReport]) -> None:
        """Writes one file of the checkpoint."""
        metadata = {"reports": json.dumps([report.to_json() for report in reports])}
        dense = contiguous(arrays)
        self._write(lambda temporary: save_file(dense, temporary, metadata), path)

    def commit_layer(self, index: int, arrays: Arrays, reports: list[LinearReport], hidden: Arrays) -> None:
        """Finishes a layer; `hidden` are the states that the next one reads."""
        if hidden:
            dense = contiguous(hidden)
            self._write(lambda temporary: save_file(dense, temporary), self._hidden_file(index))
        self.commit(self.layer_file(index), arrays, reports)
        if index:
            self._hidden_file(index - 1).unlink(missing_ok=True)

    def hidden(self, index: int) -> Arrays:
        """The states after a finished layer."""
        return self.arrays(self._hidden_file(index))

    def arrays(self, path: Path) -> Arrays:
        """What `commit` wrote into a file."""
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118 (not a dict)

    def reports(self, path: Path) -> list[LinearReport]:
        """What `commit` recorded with a file."""
        with safe_open(path, framework="numpy") as file:
            return [LinearReport.from_json(entry) for entry in json.loads(file.metadata()["reports"])]

    def write_index(self) -> None:
        """The index over every file of the checkpoint."""
        files = sorted(self.checkpoint.glob("*.safetensors"))
        weight_map = {name: path.name for path in files for name in read_header(path)}
        total = sum(path.stat().st_size for path in files)
        self._write(
            lambda path: write_json(path, {"metadata": {"total_size": total}, "weight_map": weight_map}),
            self.checkpoint / "model.safetensors.index.json",
        )

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file of the checkpoint."""
        self._write(lambda path: write_json(path, value), self.checkpoint / name)

    def copy(self, source: Path) -> None:
        """A file of the model, links resolved."""
        self._write(lambda path: shutil.copyfile(source.resolve(), path), self.checkpoint / source.name)

    def finish(self) -> None:
        """The checkpoint appears under its name, by one rename; an earlier one there is moved aside first."""
        if self.out.exists():
            self.out.rename(self._replaced)
        self.checkpoint.rename(self.out)
        sync(self.out.parent)
        self.close()
        remove(self.root, MARK)

    def close(self) -> None:
        """Gives the lock back; what is finished stays for the next run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def discard(self) -> None:
        """Leaves nothing behind."""
        self.close()
        with suppress(OSError):
            remove(self.root, MARK)
        self._remove_parents()

    def _remove_parents(self) -> None:
        for parent in self._made_parents:
            with suppress(OSError):
                parent.rmdir()
