"""Random packed weights, and a quantised linear run beside its float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from awq_compile import reference
from awq_compile.formats import Float16Spec, QuantizedMatrix, WeightSpec, quantize_matrix
from awq_compile.problem import MatmulProblem

F64 = npt.NDArray[np.float64]


def random_matrix(
    spec: WeightSpec, n: int, k: int, rng: np.random.Generator
) -> QuantizedMatrix | npt.NDArray[np.float16]:
    """(n, k) with every code, scales of both signs, and zero points."""
    if isinstance(spec, Float16Spec):
        return (rng.standard_normal((n, k)) * 0.1).astype(np.float16)
    codes = rng.integers(0, spec.levels, (n, k)).astype(np.uint8)
    scales = rng.uniform(0.5, 1.5, (n, k // spec.group)) * rng.choice([-1, 1], (n, k // spec.group)) / spec.levels
    zeros = None if spec.symmetric else rng.integers(0, spec.levels, scales.shape).astype(np.uint8)
    return quantize_matrix(codes, (scales if spec.symmetric else np.abs(scales)).astype(np.float16), zeros, spec)


def arrays_of(matrix: QuantizedMatrix | npt.NDArray[np.float16]) -> list[npt.NDArray[Any]]:
    """The arrays that a kernel takes."""
    return list(matrix.arrays().values()) if isinstance(matrix, QuantizedMatrix) else [matrix]


def product_and_bound(x: npt.NDArray[Any], matrix: QuantizedMatrix | npt.NDArray[np.float16]) -> tuple[F64, F64]:
    """x Wᵀ in float64, and how far a kernel that sums in float32 may be from it."""
    unit = 2.0**-24
    if isinstance(matrix, QuantizedMatrix):
        return reference.linear(x, matrix), reference.linear_bound(x, matrix, unit_roundoff=unit)
    wide, values = x.astype(np.float64), matrix.astype(np.float64)
    return wide @ values.T, (x.shape[1] + 8) * unit * (np.abs(wide) @ np.abs(values).T)


def check_linear(function: Any, problem: MatmulProblem, rows: tuple[int, ...], target: Any, seed: int = 0) -> None:
    """Runs a PrimFunc of `problem` for several M on fresh inputs and a poisoned output, against the oracle."""
    rng = np.random.default_rng(seed)
    call = tvm.compile(tvm.IRModule({"linear": function.with_attr("global_symbol", "linear")}), target=target)["linear"]
    matrix = random_matrix(problem.spec, problem.weight_rows, problem.k, rng)
    epilogue = problem.epilogue
    for m in rows:
        x = rng.standard_normal((m, problem.k)).astype(np.float32)
        expected, bound = product_and_bound(x, matrix)
        extra: list[npt.NDArray[Any]] = []
        if epilogue.bias:
            extra.append(rng.standard_normal(problem.n).astype(np.float16))
            expected = expected + extra[-1]
        if epilogue.activation == "relu":
            expected = np.maximum(expected, 0)
        if epilogue.activation == "silu_mul":
            gate, up = expected[:, : problem.n], expected[:, problem.n :]
            # |silu'| < 1.1; exp, division and product add a few roundings of the result.
            bound = 1.1 * np.abs(up) * bound[:, : problem.n] + np.abs(reference.silu(gate)) * bound[:, problem.n :]
            expected = reference.silu(gate) * up
            bound = bound + 2.0**-20 * np.abs(expected)
        if epilogue.residual:
            extra.append(rng.standard_normal((m, problem.n)).astype(np.float32))
            expected = expected + extra[-1]
        bound = bound + 2.0**-22 * np.abs(expected) + 1e-6
        y = tvm.runtime.tensor(np.full((m, problem.n), np.nan, np.float32))
        call(*(tvm.runtime.tensor(a) for a in [x, *arrays_of(matrix), *extra]), y)
        error = np.abs(y.numpy() - expected)
        worst = np.unravel_index(np.argmax(np.nan_to_num(error - bound, nan=np.inf)), error.shape)
        assert (error <= bound).all(), f"{problem.name} M={m}: {error[worst]} over {bound[worst]} at {worst}"
