"""Sweeps: every model with every scheme on every device, tuned one after the other, from a TOML file.

    models = ["./demo", "Qwen/Qwen3-0.6B"]    # as `awq-compile tune` takes them
    schemes = ["w4g128"]                      # left out: each target's own
    buckets = ["gemv", "gemm"]                # left out: all (also pair, quad, small, medium, broad, large, wide)
    trials = 64                               # these five are those of `awq-compile tune`
    patience = 24
    seed = 0
    seconds = 3600
    ray = "192.168.1.10:6379"                 # a Ray cluster that builds for the devices elsewhere

    [[device]]
    target = "cpu"                            # this machine

    [[device]]
    name = "phones"
    target = "android"
    tracker = "192.168.1.10:9190"             # or server = "HOST:PORT"
    key = "8gen3"

A finished cell is a line of `sweep.jsonl`, and is not run again; a cell that failed is.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from awq_compile.errors import AwqCompileError, CompileError, UsageError
from awq_compile.formats import QuantScheme
from awq_compile.json_input import parse_json
from awq_compile.problem import ROW_BUCKETS
from awq_compile.targets import resolve_target
from awq_compile.tuning.ray_builds import check_address
from awq_compile.tuning.record import are_seconds
from awq_compile.tuning.rpc import Place

STATE: Final = "sweep.jsonl"
_KEYS: Final = {"models": list, "schemes": list, "buckets": list, "trials": int, "patience": int, "seed": int}
_DEVICE_KEYS: Final = ("name", "target", "tracker", "server", "key")
_MOST: Final = 1 << 20  # bytes of the file; and any number in it


@dataclass(frozen=True)
class SweepDevice:
    """`tracker`, `server` and `key` are those of `Place.parse`."""

    name: str
    target: str
    tracker: str | None = None
    server: str | None = None
    key: str | None = None

    @property
    def place(self) -> Place:
        """Where it is."""
        return Place.parse(self.tracker, self.server, self.key)


@dataclass(frozen=True)
class Cell:
    """One model with one scheme on one device. `scheme` None: the model's or the target's own; `ray` as in `Place`."""

    model: str
    scheme: str | None
    device: SweepDevice
    buckets: tuple[str, ...]
    trials: int
    patience: int
    seed: int
    seconds: float | None
    ray: str = ""

    @property
    def place(self) -> Place:
        """Where to measure and to build."""
        place = self.device.place
        return replace(place, ray=self.ray) if place.tracker or place.server else place

    @property
    def label(self) -> str:
        """For people."""
        return " ".join(word for word in (self.model, self.scheme, "on", self.device.name) if word)

    def key(self) -> str:
        """Equal for equal cells, wherever their kernels are built."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "ray"}, sort_keys=True)


@dataclass(frozen=True)
class CellResult:
    """`kernels` as `tune --json` gives them, or the `error` that ended the cell; `devices` measured how many."""

    cell: Cell
    kernels: list[dict[str, Any]]
    devices: dict[str, int]
    error: str = ""

    @property
    def speedup(self) -> float:
        """The geometric mean."""
        return math.exp(sum(math.log(k["untuned_seconds"] / k["seconds"]) for k in self.kernels) / len(self.kernels))


def read_sweep(path: Path) -> list[Cell]:
    """The cells of a TOML file. Raises `UsageError` naming the key that does not fit."""
    try:
        data = path.read_bytes()
        if len(data) > _MOST:
            raise UsageError(f"{path}: {len(data)} bytes, and at most {_MOST} are read")
        found = tomllib.loads(data.decode("utf-8"))
        return list(_cells(found))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    except AwqCompileError as error:
        raise UsageError(f"{path}: {error}", hint=error.hint) from None


def _cells(found: dict[str, Any]) -> Iterator[Cell]:
    known = [*_KEYS, "seconds", "ray", "device"]
    if unknown := sorted(set(found) - set(known)):
        raise UsageError(f"unknown keys {', '.join(unknown):.200}", hint=f"known: {', '.join(known)}")
    for key, kind in _KEYS.items():
        if key in found and type(found[key]) is not kind:
            raise UsageError(f"{key} is {found[key]!r:.60}, expected {'a list' if kind is list else 'a whole number'}")
    numbers = {key: found.get(key, usual) for key, usual in (("trials", 64), ("patience", 24), ("seed", 0))}
    for key, value in numbers.items():
        if not (key != "seed") <= value <= _MOST:
            raise UsageError(f"{key} is {value}, expected {int(key != 'seed')} to {_MOST}")
    seconds = found.get("seconds")
    if seconds is not None and (type(seconds) not in (int, float) or not 1 <= seconds <= 1e9):
        raise UsageError(f"seconds is {seconds!r:.60}, expected a number from 1")
    ray = found.get("ray", "")
    if not isinstance(ray, str):
        raise UsageError(f"ray is {ray!r:.60}, expected the address of a Ray cluster")
    if "ray" in found:
        check_address(ray)
    buckets = _words(found, "buckets") or list(ROW_BUCKETS)
    if strange := [bucket for bucket in buckets if bucket not in ROW_BUCKETS]:
        raise UsageError(f"buckets: unknown {', '.join(strange):.60}", hint=f"known: {', '.join(ROW_BUCKETS)}")
    schemes: list[str | None] = [*_words(found, "schemes")]
    for scheme in schemes:
        QuantScheme.parse(str(scheme))
    if not (models := _words(found, "models")):
        raise UsageError("models is missing", hint='models = ["./demo"]')
    devices = _devices(found.get("device"))
    for device, model, scheme in product(devices, models, schemes or [None]):
        yield Cell(model, scheme, device, tuple(buckets), **numbers, seconds=seconds, ray=ray)


def _words(found: dict[str, Any], key: str) -> list[str]:
    words: list[Any] = found.get(key, [])
    if not all(isinstance(word, str) and word for word in words) or len(set(words)) < len(words):
        raise UsageError(f"{key} is {words!r:.80}, expected different words")
    return words


def _devices(tables: Any) -> list[SweepDevice]:
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError("no device is given", hint='[[device]] with target = "cpu"')
    devices = []
    for table in tables:
        if unknown := sorted(set(table) - set(_DEVICE_KEYS)):
            raise UsageError(
                f"device: unknown keys {', '.join(unknown):.200}", hint=f"known: {', '.join(_DEVICE_KEYS)}"
            )
        for key, value in table.items():
            if not isinstance(value, str) or not value:
                raise UsageError(f"device: {key} is {value!r:.60}, expected a word")
        if "target" not in table:
            raise UsageError("device: target is missing", hint="awq-compile targets lists them")
        resolve_target(table["target"])
        device = SweepDevice(**{"name": table["target"]} | table)
        str(device.place)  # what does not fit together is said now
        devices.append(device)
    if len({device.name for device in devices}) < len(devices):
        raise UsageError("device: two have the same name", hint='name = "another"')
    return devices


def run_sweep(
    cells: list[Cell], folder: Path, tune: Callable[[Cell], tuple[list[dict[str, Any]], dict[str, int]]]
) -> Iterator[tuple[CellResult, bool]]:
    """(result, whether it is of an earlier run) of each cell, in order; `tune` gives kernels and shares of a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    done = _finished(folder / STATE)
    for cell in cells:
        if (known := done.get(cell.key())) is not None:
            yield CellResult(cell, known["kernels"], known["devices"]), True
            continue
        try:
            kernels, devices = tune(cell)
        except AwqCompileError as error:
            yield CellResult(cell, [], {}, f"{error} ({error.hint})" if error.hint else str(error)), False
            continue
        kernels = [_comparable(kernel) for kernel in kernels]
        with (folder / STATE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": cell.key(), "kernels": kernels, "devices": devices}) + "\n")
        yield CellResult(cell, kernels, devices), False


def _comparable(kernel: dict[str, Any]) -> dict[str, Any]:
    """With the chosen time where the untuned schedule gave a wrong result, and so has none."""
    if math.isfinite(kernel["untuned_seconds"]):
        return kernel
    return kernel | {"untuned_seconds": kernel["seconds"], "speedup": 1.0}


def _finished(path: Path) -> dict[str, dict[str, Any]]:
    """Key → line of each cell that is done. What a kill left of a last line is cut off."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        lines = [parse_json(line) for line in whole.decode("utf-8").splitlines()]
        for number, line in enumerate(lines, 1):
            if not _is_finished_cell(line):
                raise ValueError(f"line {number} is no finished cell: {line!s:.120}")
    except ValueError as error:
        raise CompileError(f"{path} is damaged: {error}", hint=f"remove {path}: its cells run again") from None
    return {line["cell"]: line for line in lines}


def _is_finished_cell(line: Any) -> bool:
    """Whether a line holds all that a report is made of."""
    if not isinstance(line, dict) or not isinstance(line.get("cell"), str):
        return False
    kernels, devices = line.get("kernels"), line.get("devices")
    return (
        isinstance(kernels, list)
        and isinstance(devices, dict)
        and all(type(count) is int for count in devices.values())
        and all(
            isinstance(kernel, dict)
            and all(isinstance(kernel.get(key), str) and kernel[key].isprintable() for key in ("kernel", "bucket"))
            and all(are_seconds(kernel.get(key)) for key in ("seconds", "untuned_seconds", "roofline_seconds"))
            and type(kernel.get("share")) in (int, float)
            and 0 < kernel["share"] < 2  # of 1, with the rounding of a sum
            for kernel in kernels
        )
    )
