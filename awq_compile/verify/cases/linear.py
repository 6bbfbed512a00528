"""Cases of planned linears and embeddings: always against float64 from the packed codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from awq_compile.formats import WeightSpec
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import ARRANGED_BEHIND
from awq_compile.verify.case import Case, Expected, ints, poisoned
from awq_compile.verify.launch_table import Table
from awq_compile.verify.oracles.linear import (
    arrays_of,
    epilogue,
    products_of_all,
    random_matrix,
    rows_of,
    values_of,
)
from awq_compile.verify.tolerance import stored, summed


def linear_cases(
    problem: MatmulProblem, rows: Sequence[int], rng: np.random.Generator, table: Table | None = None
) -> Iterator[Case]:
    """M of each of `rows`; fresh x, and one W for all, which is decoded once.

    `table` is the function's: it may take memory for x as its kernels arrange it.
    """
    matrix = random_matrix(problem.spec, problem.weight_rows, problem.k, rng)
    xs = [rng.standard_normal((m, problem.k)).astype(problem.dtype) for m in rows]
    for x, (acc, error) in zip(xs, products_of_all(problem, xs, matrix), strict=True):
        m = len(x)
        bias = rng.standard_normal(problem.n).astype(np.float16) if problem.epilogue.bias else None
        residual = rng.standard_normal((m, problem.n)).astype(problem.dtype) if problem.epilogue.residual else None
        expected, bound = epilogue(problem, acc, error, bias, residual)
        extra: list[Any] = [array for array in (bias, residual) if array is not None]
        arguments = [x, *arrays_of(matrix), *extra, poisoned((m, problem.n), problem.out_dtype)]
        y, scratch = len(arguments) - 1, frozenset[int]()
        if table is not None and len(table["params"]) > len(arguments):
            scratch = frozenset((len(arguments),))
            arguments.append(poisoned((m + ARRANGED_BEHIND, problem.k), problem.dtype))
        yield Case(f"M={m}", arguments, {y: Expected(expected, bound)}, scratch)


def embedding_cases(
    spec: WeightSpec, vocab: int, hidden: int, dtype: str, rows: Sequence[int], rng: np.random.Generator
) -> Iterator[Case]:
    """Ids over the whole vocabulary, its ends and beyond among them: those are clipped."""
    matrix = random_matrix(spec, vocab, hidden, rng)
    for n in rows:
        ids = rng.integers(0, vocab, n)
        edges = [vocab - 1, 0, -1, vocab]
        ids[: len(edges)] = edges[:n]
        expected = values_of(rows_of(matrix, np.clip(ids, 0, vocab - 1)))
        bound = summed(0, np.abs(expected)) + stored(expected, dtype)
        arguments = [ints(ids), *arrays_of(matrix), poisoned((n, hidden), dtype)]
        yield Case(f"n={n}", arguments, {len(arguments) - 1: Expected(expected, bound)})
