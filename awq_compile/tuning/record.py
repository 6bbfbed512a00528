"""`Record`: one measured schedule, as a line of the database.

    {"bucket": "gemv", "device": {…}, "machine": "avx512-l16r32", "problem": {…}, "schedule": {"template": …}, …}

Lines come from outside as well, from another machine or by hand: every value is checked.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from typing import Any, Final

from awq_compile.errors import AwqCompileError, CompileError
from awq_compile.formats import Float16Spec, QuantSpec
from awq_compile.json_input import parse_json
from awq_compile.problem import ROW_BUCKETS, MatmulProblem, decode_problem, serves
from awq_compile.targets.base import TargetSpec
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.templates import (
    VERSIONS,
    Schedule,
    decode_schedule,
    encode_schedule,
    fits_bucket,
    template_of,
)

_MOST: Final = 1 << 24  # of N and K
_SHORTEST, _LONGEST = 1e-12, 1e6  # seconds of a kernel
_TEXT: Final = 200  # characters of a name
_WORD: Final = re.compile(r"[A-Za-z0-9_.:@+-]{0,64}")  # may become a part of a file's name


@cache
def tvm_version() -> str:
    """Of the TVM that is installed, without importing it."""
    return version("apache-tvm")


@dataclass(frozen=True)
class Key:
    """What a record is found by. `preset` is empty for records that serve every target of their machine."""

    machine: str
    preset: str
    problem: str
    bucket: str
    template: str
    template_version: int
    tvm: str


@dataclass(frozen=True)
class Record:
    """The fastest schedule that was found for `problem` in `bucket`, measured at `rows` rows of x.

    `machine` is `TargetSpec.machine`. `preset` restricts it to one target: the generic OpenCL target measured on a
    CPU's OpenCL says nothing about a GPU's. Times are medians over cold weights, in seconds; `untuned_seconds` that
    of the target's rule, measured in turns with it; `roofline_seconds` what no kernel can beat.
    """

    machine: str
    preset: str
    problem: MatmulProblem
    bucket: str
    rows: int
    schedule: Schedule
    template_version: int
    tvm: str
    device: Fingerprint
    seconds: float
    low: float
    high: float
    untuned_seconds: float
    roofline_seconds: float
    trials: int
    runner_up: Schedule | None = None
    runner_up_seconds: float | None = None

    @property
    def key(self) -> Key:
        """See `Key`."""
        name, template = self.problem.name, template_of(self.schedule)
        return Key(self.machine, self.preset, name, self.bucket, template, self.template_version, self.tvm)

    @property
    def current(self) -> bool:
        """Whether it was measured with this version of its template and this TVM."""
        return self.template_version == VERSIONS[template_of(self.schedule)] and self.tvm == tvm_version()

    def serves(self, spec: TargetSpec) -> bool:
        """Whether a target has the limits that it was measured under, and is not excluded."""
        return self.machine == spec.machine and self.preset in ("", preset_of(spec))

    def line(self) -> str:
        """The JSON of it, without an end of line; equal records give equal lines."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        data["problem"], data["device"] = asdict(self.problem), asdict(self.device)
        data["schedule"] = encode_schedule(self.schedule)
        if self.runner_up is not None:
            data["runner_up"] = encode_schedule(self.runner_up)
        for name in ("seconds", "low", "high", "untuned_seconds", "roofline_seconds", "runner_up_seconds"):
            if name in data:
                data[name] = float(f"{data[name]:.4g}")
        return json.dumps(data, sort_keys=True, ensure_ascii=False)


def preset_of(spec: TargetSpec) -> str:
    """A target's name without its host."""
    return spec.name.partition("@")[0]


def parse_record(line: str) -> Record:
    """Inverse of `Record.line`, for a line from outside. Raises `CompileError` saying what does not fit."""
    try:
        data = parse_json(line)
    except ValueError as error:
        raise CompileError(str(error)) from None
    if not isinstance(data, dict):
        raise CompileError(f"a JSON object is expected, found {type(data).__name__}")
    known = {f.name for f in fields(Record)}
    if unknown := sorted(set(data) - known):
        raise CompileError(f"unknown keys {', '.join(unknown)[:_TEXT]}")
    bucket, schedule, problem = _text(data, "bucket"), decode_schedule(_object(data, "schedule")), parse_problem(data)
    if bucket not in ROW_BUCKETS or not fits_bucket(template_of(schedule), bucket):
        raise CompileError(f"{template_of(schedule)} in the bucket {bucket!r}")
    rows = _integer(data, "rows")
    if not serves(bucket, rows):
        raise CompileError(f"{rows} rows in the bucket {bucket}")
    device = _object(data, "device")
    if set(device) != {f.name for f in fields(Fingerprint)}:
        raise CompileError(f"a device with the keys {', '.join(sorted(device))[:_TEXT]}")
    fingerprint = Fingerprint(
        _text(device, "name"), _text(device, "kind"), _text(device, "driver"), _integer(device, "units")
    )
    return Record(
        machine=_word(data, "machine"),
        preset=_word(data, "preset"),
        problem=problem,
        bucket=bucket,
        rows=rows,
        schedule=schedule,
        template_version=_integer(data, "template_version"),
        tvm=_word(data, "tvm"),
        device=fingerprint,
        **{name: _seconds(data, name) for name in ("seconds", "low", "high", "untuned_seconds", "roofline_seconds")},
        trials=_integer(data, "trials"),
        runner_up=decode_schedule(_object(data, "runner_up")) if "runner_up" in data else None,
        runner_up_seconds=_seconds(data, "runner_up_seconds") if "runner_up_seconds" in data else None,
    )


def parse_problem(data: dict[str, Any]) -> MatmulProblem:
    """The entry `problem` of a JSON object from outside. Raises `CompileError`."""
    found = _object(data, "problem")
    for name in ("n", "k"):
        if not 0 < _integer(found, name) <= _MOST:
            raise CompileError(f"{name} is {found[name]}, expected 1 to {_MOST}")
    try:
        problem = decode_problem(json.dumps(found))
        spec = problem.spec
        typed = isinstance(spec, Float16Spec) or (
            type(spec.bits) is int and type(spec.group) is int and type(spec.symmetric) is bool
        )
    except (AwqCompileError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CompileError(f"not a problem: {error!r:.200}") from None
    epilogue = problem.epilogue
    flags = all(type(flag) is bool for flag in (epilogue.bias, epilogue.residual, epilogue.wide))
    if not typed or not flags or problem.dtype not in ("float16", "float32"):
        raise CompileError(f"not a problem: {str(found)[:_TEXT]}")
    if isinstance(spec, QuantSpec) and problem.k % spec.group:
        raise CompileError(f"K = {problem.k} is not a multiple of the group {spec.group}")
    return problem


def _object(data: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(value := data.get(key), dict):
        raise CompileError(f"{key} is {value!r:.60}, expected an object")
    return value


def _text(data: dict[str, Any], key: str) -> str:
    if not isinstance(value := data.get(key), str) or len(value) > _TEXT or not value.isprintable():
        raise CompileError(f"{key} is {value!r:.60}, expected a line of at most {_TEXT} characters")
    return value


def _word(data: dict[str, Any], key: str) -> str:
    if not _WORD.fullmatch(value := _text(data, key)):
        raise CompileError(f"{key} is {value!r:.60}, expected letters, digits and . _ - + : @, at most 64 of them")
    return value


def _integer(data: dict[str, Any], key: str) -> int:
    if type(value := data.get(key)) is not int or value < 0:
        raise CompileError(f"{key} is {value!r:.60}, expected a whole number")
    return value


def are_seconds(value: Any) -> bool:
    """Whether a value from outside is a time that a kernel can take."""
    return type(value) in (int, float) and _SHORTEST <= value <= _LONGEST


def _seconds(data: dict[str, Any], key: str) -> float:
    if not are_seconds(value := data.get(key)):
        raise CompileError(f"{key} is {value!r:.60}, expected seconds from {_SHORTEST:g} to {_LONGEST:g}")
    return float(value)  # type: ignore[arg-type]
