"""Quantised linears and embeddings from the packed codes, in float64, with derived bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile import reference
from awq_compile.formats import Float16Spec, QuantizedMatrix, WeightSpec, dequantize_matrix, quantize_matrix
from awq_compile.problem import SMALL_ROWS, MatmulProblem
from awq_compile.verify.tolerance import FUNCTION, ROUNDOFF, stored, summed

Matrix = QuantizedMatrix | npt.NDArray[np.float16]
F64 = npt.NDArray[np.float64]
_SILU_SLOPE = 1.1  # |silu'| is below this
_BLOCK: Final = 1 << 20  # elements of W decoded at a time


def random_matrix(spec: WeightSpec, n: int, k: int, rng: np.random.Generator) -> Matrix:
    """(n, k) with every code, scales of both signs where the format has them, and every zero point."""
    if isinstance(spec, Float16Spec):
        found = np.empty((n, k), np.float16)
        for row in range(0, n, rows := max(1, _BLOCK // k)):
            found[row : row + rows] = rng.standard_normal(found[row : row + rows].shape, np.float32) * np.float32(0.1)
        return found
    codes = rng.integers(0, spec.levels, (n, k), np.uint8)
    shape = (n, k // spec.group)
    scales = (rng.uniform(0.5, 1.5, shape) / spec.levels).astype(np.float16)
    if spec.symmetric:
        return quantize_matrix(codes, scales * rng.choice([-1, 1], shape).astype(np.float16), None, spec)
    return quantize_matrix(codes, scales, rng.integers(0, spec.levels, shape, np.uint8), spec)


def arrays_of(matrix: Matrix) -> list[npt.NDArray[Any]]:
    """The arrays that a kernel takes."""
    return list(matrix.arrays().values()) if isinstance(matrix, QuantizedMatrix) else [matrix]


def rows_of(matrix: Matrix, rows: npt.NDArray[np.integer] | slice) -> Matrix:
    """Some rows of W."""
    if not isinstance(matrix, QuantizedMatrix):
        return np.asarray(matrix[rows])
    matrix = matrix.in_order("NK")
    zero = None if matrix.q_zero is None else matrix.q_zero[rows]
    return QuantizedMatrix(matrix.spec, matrix.q_weight[rows], matrix.q_scale[rows], zero)


def values_of(matrix: Matrix) -> F64:
    """W in float64."""
    if isinstance(matrix, QuantizedMatrix):
        return np.asarray(dequantize_matrix(matrix, np.float64))
    return matrix.astype(np.float64)


def products(problem: MatmulProblem, x: npt.NDArray[Any], matrix: Matrix) -> tuple[F64, F64]:
    """(x Wᵀ, bound)."""
    return _products(problem, x, *_decoded(matrix), tiled=len(x) > SMALL_ROWS)


def products_of_all(
    problem: MatmulProblem, xs: Sequence[npt.NDArray[Any]], matrix: Matrix
) -> Iterator[tuple[F64, F64]]:
    """`products` of each x, from one pass over W: its decoded values, in float64, are never there as a whole."""
    few = np.concatenate([x for x in xs if len(x) <= SMALL_ROWS] or [xs[0][:0]])
    many = np.concatenate([x for x in xs if len(x) > SMALL_ROWS] or [xs[0][:0]])
    found = [np.empty((2, len(x), problem.weight_rows)) for x in (few, many)]
    matrix = matrix.in_order("NK") if isinstance(matrix, QuantizedMatrix) else matrix
    rows = max(1, _BLOCK // problem.k)
    for start in range(0, problem.weight_rows, rows):
        columns = slice(start, start + rows)
        decoded = _decoded(rows_of(matrix, columns))
        for tiled, x in enumerate((few, many)):
            if len(x):
                found[tiled][:, :, columns] = _products(problem, x, *decoded, tiled=bool(tiled))
    at = [0, 0]
    for x in xs:
        tiled = int(len(x) > SMALL_ROWS)
        acc, error = found[tiled][:, at[tiled] : at[tiled] + len(x)]
        at[tiled] += len(x)
        yield acc, error


def _decoded(matrix: Matrix) -> tuple[F64, F64]:
    """W, and what its elements count for in a bound."""
    values = values_of(matrix)
    return values, reference.magnitudes(matrix) if isinstance(matrix, QuantizedMatrix) else np.abs(values)


def _products(
    problem: MatmulProblem, x: npt.NDArray[Any], values: F64, magnitudes: F64, *, tiled: bool
) -> tuple[F64, F64]:
    """The tiled kernels, for more than 8 rows, round the decoded weights to the type of x."""
    wide = x.astype(np.float64)
    error = summed(problem.k, np.abs(wide) @ magnitudes.T)
    if tiled and not isinstance(problem.spec, Float16Spec):
        error = error + 1.01 * ROUNDOFF[problem.dtype] * (np.abs(wide) @ np.abs(values).T)
    return wide @ values.T, error


def epilogue(
    problem: MatmulProblem,
    acc: F64,
    error: F64,
    bias: npt.NDArray[Any] | None,
    residual: npt.NDArray[Any] | None,
) -> tuple[F64, F64]:
    """(y, bound) from the products and their error."""
    single = ROUNDOFF["float32"]
    if bias is not None:
        acc = acc + bias
        error = error + single * np.abs(acc)
    if problem.epilogue.activation == "relu":
        acc = np.maximum(acc, 0.0)
    if problem.epilogue.activation == "silu_mul":
        gate, up = acc[:, : problem.n], acc[:, problem.n :]
        of_gate, of_up = error[:, : problem.n], error[:, problem.n :]
        activated = np.asarray(reference.silu(gate))
        slope = _SILU_SLOPE * of_gate
        error = slope * np.abs(up) + np.abs(activated) * of_up + slope * of_up
        acc = activated * up
        error = error + (FUNCTION + 4 * single) * np.abs(acc)
    if residual is not None:
        acc = acc + residual
        error = error + single * np.abs(acc)
    return acc, error + stored(np.abs(acc) + error, problem.out_dtype)
