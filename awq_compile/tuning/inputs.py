"""Arguments to measure a kernel with, and what it must compute, by the float64 oracle.

The rows of a large W repeat with a prime period, and many rows of x with another, so that every output of a kernel is
checked at the oracle's price for a few; no tile is a multiple of either, so a kernel that takes a wrong row is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.formats import QuantSpec
from awq_compile.tuning.measure import Work
from awq_compile.verify.case import POISON
from awq_compile.verify.oracles.linear import arrays_of, epilogue, products, random_matrix
from awq_compile.verify.tolerance import within

PERIOD: Final = 251  # of the outputs
ROWS_PERIOD: Final = 37  # of x

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Inputs:
    """`x`, the arrays of W, then bias and residual where the epilogue has them; y comes last and is not here."""

    work: Work
    x: Array
    weight: list[Array]
    extra: list[Array]
    expected: npt.NDArray[np.float64]
    bound: npt.NDArray[np.float64]

    @cached_property
    def _before(self) -> list[bytes]:
        return [array.tobytes() for array in (self.x, *self.extra)]

    def output(self) -> Array:
        """A poisoned y."""
        y = np.empty(self.expected.shape, self.work.problem.out_dtype)
        y.reshape(-1).view(np.uint8)[...] = POISON
        return y

    def wrong(self, y: Array, x: Array | None = None) -> str:
        """What is wrong with a result, or with `x` after the run; empty when nothing is."""
        if x is not None and x.tobytes() != self._before[0]:
            return "x was changed"
        return within(y, self.expected, self.bound)[2]

    def copies(self, total_bytes: int) -> int:
        """How many copies of W are read in turns so that none is found in a cache of half of `total_bytes`."""
        return max(1, -(-total_bytes // self.work.problem.weight_nbytes))


def make_inputs(work: Work, seed: int = 0) -> Inputs:
    """Random x and packed codes, the same for the same seed."""
    problem, rng = work.problem, np.random.default_rng(seed)
    rows = problem.weight_rows
    base = random_matrix(problem.spec, min(rows, PERIOD), problem.k, rng)
    index = np.arange(rows) % PERIOD
    of_x = np.arange(work.rows) % ROWS_PERIOD
    columns = isinstance(problem.spec, QuantSpec) and problem.spec.order == "KN"
    weight = [np.ascontiguousarray(a[:, index] if columns else a[index]) for a in arrays_of(base)]
    x = rng.standard_normal((min(work.rows, ROWS_PERIOD), problem.k)).astype(problem.dtype)
    outputs = index[: problem.n]
    bias = residual = None
    if problem.epilogue.bias:
        bias = rng.standard_normal(PERIOD).astype(np.float16)[outputs]
    if problem.epilogue.residual:
        residual = rng.standard_normal((len(x), PERIOD)).astype(problem.dtype)[:, outputs]
    acc, error = (part[:, index] for part in products(problem, x, base))
    expected, bound = (part[of_x] for part in epilogue(problem, acc, error, bias, residual))
    extra = [a for a in (bias, None if residual is None else residual[of_x]) if a is not None]
    return Inputs(work, x[of_x], weight, extra, expected, bound)
