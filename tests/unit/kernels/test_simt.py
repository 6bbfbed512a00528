"""The GPU kernels compute what the float64 oracle computes, run as emitted CUDA, Metal and OpenCL code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_kernels import build
from helpers_linear import arrays_of, product_and_bound, random_matrix

from awq_compile import reference
from awq_compile.formats import Float16Spec, QuantSpec, WeightSpec
from awq_compile.kernels.build import scheduled_linear
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.schedules import LinearSchedule, MatrixGemmSchedule, SimtGemmSchedule, SimtGemvSchedule
from awq_compile.verify.executors.base import Executor
from awq_compile.verify.executors.opencl import OpenCLExecutor
from awq_compile.verify.executors.simt import SimtExecutor
from awq_compile.verify.launch_table import run_prim_func

ROWS = (1, 2, 7, 8, 9, 37)
SPECS: list[WeightSpec] = [
    QuantSpec(4, 128),
    QuantSpec(4, 32, False),
    QuantSpec(3, 64),
    QuantSpec(8, 32),
    Float16Spec(),
]


def schedule(spec: WeightSpec, kind: str, magic: bool = False) -> LinearSchedule:
    """Small blocks with tails everywhere; CUDA and Metal reduce by shuffles."""
    subgroup = 0 if kind == "opencl" else 32
    unit = 32 if isinstance(spec, QuantSpec) and spec.bits == 3 else 8
    return LinearSchedule(
        SimtGemvSchedule(32, 2, 2, 32, subgroup=subgroup, magic=magic),
        SimtGemvSchedule(16, 4, 4, unit, 4, subgroup, magic),
        SimtGemmSchedule(16, 32, 32, 2, 4, unit, magic=magic),
    )


def check(problem: MatmulProblem, kind: str, chosen: LinearSchedule, rows: tuple[int, ...] = ROWS) -> None:
    """Runs the emitted code for several M on float16 activations and compares."""
    rng = np.random.default_rng(0)
    function = scheduled_linear(problem, chosen).with_attr("global_symbol", "linear")
    built = build(function, kind)
    device: Executor = OpenCLExecutor() if kind == "opencl" else SimtExecutor()
    device.load(built.code)
    matrix = random_matrix(problem.spec, problem.weight_rows, problem.k, rng)
    for m in rows:
        x = rng.standard_normal((m, problem.k)).astype(np.float16)
        expected, bound = product_and_bound(x, matrix)
        extra: list[Any] = []
        if problem.epilogue.activation == "silu_mul":
            gate, up = expected[:, : problem.n], expected[:, problem.n :]
            bound = 1.1 * np.abs(up) * bound[:, : problem.n] + np.abs(reference.silu(gate)) * bound[:, problem.n :]
            expected = reference.silu(gate) * up
        if problem.epilogue.bias:
            extra.append(rng.standard_normal(problem.n).astype(np.float16))
            expected = expected + extra[-1]
        if problem.epilogue.residual:
            extra.append(rng.standard_normal((m, problem.n)).astype(np.float16))
            expected = expected + extra[-1]
        # The result is rounded to float16; the tiled kernel rounds the decoded weights to float16 too.
        half = 2.0**-11
        if m > 8:
            weights = product_and_bound(np.abs(x), _absolute(matrix))[0]
            bound = bound + 2 * half * (weights if problem.epilogue.activation == "none" else 8 * np.abs(expected) + 4)
        bound = bound + 1.01 * half * np.abs(expected) + 1e-3
        y = np.full((m, problem.n), np.nan, np.float16)
        run_prim_func(built.tables["linear"], device, [x, *arrays_of(matrix), *extra, y])
        error = np.abs(y.astype(np.float64) - expected)
        assert (error <= bound).all(), f"M={m}: {np.nanmax(error)}, allowed {bound.max()}, {np.isnan(error).sum()} NaN"


def _absolute(matrix: Any) -> Any:
    """|W| as float16."""
    from awq_compile.formats import QuantizedMatrix, dequantize_matrix

    values = dequantize_matrix(matrix) if isinstance(matrix, QuantizedMatrix) else matrix
    return np.abs(values).astype(np.float16)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["cuda", "metal", "opencl"])
def test_every_format(kind: str, spec: WeightSpec) -> None:
    """N = 67 and K = 384: tails in every blocking."""
    check(MatmulProblem(67, 384, spec, Epilogue(bias=True, residual=True), "float16"), kind, schedule(spec, kind))


@pytest.mark.parametrize("kind", ["cuda", "metal", "opencl"])
def test_gated_linears(kind: str) -> None:
    """Rows n and n + N meet in one thread."""
    check(MatmulProblem(50, 256, SPECS[0], Epilogue(activation="silu_mul"), "float16"), kind, schedule(SPECS[0], kind))


def test_integers_become_floats_by_their_bits() -> None:
    """The same values as a conversion."""
    for spec in SPECS[:4]:
        check(
            MatmulProblem(16, 128, spec, Epilogue(), "float16"), "cuda", schedule(spec, "cuda", magic=True), (1, 3, 20)
        )


@pytest.mark.parametrize("instruction", ["m16n8k16", "m16n8k8", "simdgroup8x8"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_matrix_instructions(spec: WeightSpec, instruction: str) -> None:
    """Two warps by two, tails in M and N, and gates beside their ups."""
    kind = "metal" if instruction == "simdgroup8x8" else "cuda"
    unit = 32 if isinstance(spec, QuantSpec) and spec.bits == 3 else 8
    plain = schedule(spec, kind)
    chosen = LinearSchedule(plain.gemv, plain.small, MatrixGemmSchedule(32, 64, 64, 2, 2, unit, instruction))
    for epilogue in (Epilogue(bias=True, residual=True), Epilogue(activation="silu_mul")):
        check(MatmulProblem(72, 256, spec, epilogue, "float16"), kind, chosen, (9, 70))
