"""Schedules as JSON, each with the template it belongs to and that template's version.

{"template": "simd_gemv", "lanes": 16, "rows": 4, "batch": 1, "prefetch": 1}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Final

from awq_compile.errors import CompileError
from awq_compile.problem import FEW_ROWS
from awq_compile.schedules import (
    ColumnGemvSchedule,
    FewRows,
    GemmSchedule,
    GemvSchedule,
    ManyRows,
    MatrixGemmSchedule,
    MatrixGemvSchedule,
    SimtGemmSchedule,
    SimtGemvSchedule,
    StagedMatrixSchedule,
    WarpgroupSchedule,
)

Schedule = FewRows | ManyRows

TEMPLATES: Final[dict[str, type[Schedule]]] = {
    "simd_gemv": GemvSchedule,
    "simd_gemm": GemmSchedule,
    "simt_gemv": SimtGemvSchedule,
    "column_gemv": ColumnGemvSchedule,
    "matrix_gemv": MatrixGemvSchedule,
    "simt_gemm": SimtGemmSchedule,
    "matrix_gemm": MatrixGemmSchedule,
    "staged_matrix": StagedMatrixSchedule,
    "warpgroup": WarpgroupSchedule,
}

# Raised whenever a change of a template in `kernels/` may change which of its schedules is the fastest, or what
# a field means: records of another version are not used.
VERSIONS: Final = dict.fromkeys(TEMPLATES, 1) | {"simt_gemv": 2, "matrix_gemv": 4, "staged_matrix": 3, "warpgroup": 4}

_FEW_ROWS_TEMPLATES: Final = ("simd_gemv", "simt_gemv", "column_gemv")  # of the buckets `problem.FEW_ROWS`
ANY_ROWS: Final = ("matrix_gemv",)
_NAMES: Final = {kind: name for name, kind in TEMPLATES.items()}
_TYPES: Final[dict[Any, type]] = {"int": int, "str": str, "bool": bool}
_MOST: Final = 1 << 16  # of any number in a schedule


def template_of(schedule: Schedule) -> str:
    """Name of the template that takes `schedule`."""
    return _NAMES[type(schedule)]


def fits_bucket(template: str, bucket: str) -> bool:
    """Whether a template serves a bucket of rows."""
    return template in ANY_ROWS or (template in _FEW_ROWS_TEMPLATES) == (bucket in FEW_ROWS)


def encode_schedule(schedule: Schedule) -> dict[str, Any]:
    """`schedule` as a JSON object."""
    return {"template": template_of(schedule), **asdict(schedule)}


def decode_schedule(data: Mapping[str, Any]) -> Schedule:
    """Inverse of `encode_schedule`, for data from outside. Raises `CompileError` saying what does not fit."""
    name = data.get("template")
    if not isinstance(name, str) or name not in TEMPLATES:
        raise CompileError(f"unknown template {name!r:.60}; known are {', '.join(TEMPLATES)}")
    kind, values = TEMPLATES[name], {key: value for key, value in data.items() if key != "template"}
    known = {f.name: _TYPES[f.type] for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise CompileError(f"{name} has no field {key!r:.60}")
        if type(value) is not known[key] or (type(value) is int and not 0 <= value <= _MOST):
            raise CompileError(f"{name}: {key} is {value!r:.60}, expected {known[key].__name__} up to {_MOST}")
    try:
        return kind(**values)
    except TypeError as error:  # a field without a default is missing
        raise CompileError(f"{name}: {error}") from None
    except (ArithmeticError, KeyError) as error:  # sizes of zero, an instruction that does not exist
        raise CompileError(f"{name}: illegal values {values}: {error!r}") from None


def describe_schedule(schedule: Schedule) -> str:
    """`lanes=16 rows=4 batch=1 prefetch=1`."""
    return " ".join(f"{name}={value}" for name, value in asdict(schedule).items())
