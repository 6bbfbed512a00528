"""Weights in KN: the GPU kernels compute what the float64 oracle computes, run as emitted code."""

from __future__ import annotations

import pytest
from helpers_simt import check

from awq_compile.errors import CompileError
from awq_compile.formats import QuantSpec
from awq_compile.kernels.build import scheduled_linear
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.schedules import (
    ColumnGemvSchedule,
    LinearSchedule,
    MatrixGemmSchedule,
    SimtGemmSchedule,
    SimtGemvSchedule,
)
from awq_compile.targets import resolve_target

KINDS = ["cuda", "metal", "opencl"]
SPECS = [
    QuantSpec(4, 32, order="KN"),
    QuantSpec(4, 128, False, "KN"),
    QuantSpec(3, 64, order="KN"),
    QuantSpec(8, 32, False, "KN"),
]


def schedule(spec: QuantSpec, columns: int = 2, magic: bool = False) -> LinearSchedule:
    """Small blocks with tails everywhere."""
    unit = 32 if spec.bits == 3 else 8
    return LinearSchedule(
        ColumnGemvSchedule(16, 4, columns, unit, magic=magic),
        ColumnGemvSchedule(8, 5, columns, unit, 3, magic),
        SimtGemmSchedule(16, 32, 32, 2, 4, unit, magic=magic),
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format(kind: str, spec: QuantSpec) -> None:
    """N = 67: single columns and a tail; M in every bucket."""
    check(MatmulProblem(67, 384, spec, Epilogue(bias=True, residual=True), "float16"), kind, schedule(spec))


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_vector_loads_of_columns(kind: str, columns: int) -> None:
    """N = 76 divides into them, and a block still has a tail."""
    problem = MatmulProblem(76, 256, SPECS[0], Epilogue(residual=True), "float16")
    check(problem, kind, schedule(SPECS[0], columns, magic=kind == "cuda"))


@pytest.mark.parametrize("n", [50, 51])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_gated_linears(spec: QuantSpec, n: int) -> None:
    """Columns n and n + N meet in one thread, also where N is odd."""
    check(MatmulProblem(n, 256, spec, Epilogue(activation="silu_mul"), "float16"), "opencl", schedule(spec))


@pytest.mark.parametrize("instruction", ["m16n8k16", "simdgroup8x8"])
@pytest.mark.parametrize("spec", SPECS[:3], ids=lambda s: s.name)
def test_matrix_instructions(spec: QuantSpec, instruction: str) -> None:
    """The tiles in shared memory are the same, whichever order they are read from."""
    kind = "metal" if instruction == "simdgroup8x8" else "cuda"
    few = schedule(spec)
    unit = 32 if spec.bits == 3 else 8
    chosen = LinearSchedule(few.gemv, few.small, MatrixGemmSchedule(32, 64, 64, 2, 2, unit, instruction))
    for epilogue in (Epilogue(bias=True, residual=True), Epilogue(activation="silu_mul")):
        check(MatmulProblem(72, 256, spec, epilogue, "float16"), kind, chosen, (9, 70))


@pytest.mark.parametrize("target", ["opencl", "android", "android:mali", "cuda:sm_80", "cuda:sm_75", "metal"])
def test_the_rules_of_targets(target: str) -> None:
    """Untuned schedules are legal for KN and compute the same."""
    spec = resolve_target(target)
    kind = str(spec.tvm_target["kind"])
    problem = MatmulProblem(130, 256, SPECS[0], Epilogue(wide=True), "float16")
    check(problem, kind, spec.rule(problem), (1, 5, 33))


def test_templates_refuse_the_other_order() -> None:
    """A template reads one order, and says which when it is given the other."""
    kn, nk = MatmulProblem(64, 64, SPECS[0]), MatmulProblem(64, 64, QuantSpec(4, 32))
    columns = schedule(SPECS[0])
    rows = LinearSchedule(SimtGemvSchedule(32, 2, 2, 8), SimtGemvSchedule(32, 2, 2, 8), columns.gemm)
    for problem, wrong, order in ((kn, rows, "KN"), (nk, columns, "NK")):
        with pytest.raises(CompileError, match=f"does not read {order}"):
            scheduled_linear(problem, wrong)


def test_illegal_schedules() -> None:
    """Columns are vector widths, and as many as keep loads aligned."""
    with pytest.raises(CompileError, match="columns"):
        ColumnGemvSchedule(32, 4, 3, 8)
    assert [ColumnGemvSchedule(32, 4, 4, 8).fit(n).columns for n in (64, 66, 67)] == [4, 2, 1]
