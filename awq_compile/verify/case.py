"""`Case`: arguments of a PrimFunc and what must be in its buffers afterwards. Outputs start as poison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.verify.executors.base import Argument, KernelError
from awq_compile.verify.launch_table import Table, View
from awq_compile.verify.tolerance import within

Array = npt.NDArray[Any]
POISON: Final = 0xCD
_INTEGERS: Final = (3, 512)  # elements before and behind
_OTHERS: Final = (64, 0)  # kernels load vectors, and must not leave these
_PART: Final = 1 << 20


@dataclass(frozen=True)
class Expected:
    """A buffer's contents after the call: `values` in float64, and the largest error of each element."""

    values: npt.NDArray[np.float64]
    bound: npt.ArrayLike = 0.0


@dataclass(frozen=True)
class Case:
    """`arguments` in the PrimFunc's order; `expected` by argument number.

    All other arrays must stay as they were, but for those numbered in `scratch`.
    """

    label: str
    arguments: Sequence[Argument]
    expected: Mapping[int, Expected]
    scratch: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Outcome:
    """Of one case: the error nearest to its bound, and why it failed."""

    error: float
    bound: float
    reason: str = ""


def judge(case: Case, after: Sequence[Argument]) -> Outcome:
    """Compares the arguments after the call with what the case expects."""
    worst = Outcome(0.0, 0.0)
    for number, (before, now) in enumerate(zip(case.arguments, after, strict=True)):
        if not isinstance(now, np.ndarray) or number in case.scratch:
            continue
        if number not in case.expected:
            if not same_bytes(now, np.asarray(before)):
                return Outcome(np.inf, 0.0, f"argument {number}, an input, was changed")
            continue
        expected = case.expected[number]
        error, bound, reason = within(now, expected.values, expected.bound)
        if reason:
            return Outcome(error, bound, f"argument {number}: {reason}")
        if error * (worst.bound or np.inf) >= worst.error * (bound or np.inf) or worst.bound == 0:
            worst = Outcome(error, bound)
    return worst


def call_arguments(
    table: Table, case: Case, kept: dict[int, tuple[Array, Array]] | None = None
) -> list[Argument | View]:
    """Copies to run on. `kept` has those of the last case, by identity: inputs that it left as they were serve again.

    An array that the host code takes with an offset gets one. Integers lie in the midst of a larger buffer, as the
    runtime passes them: TVM's kernels read, but do not use, entries behind the end.
    """
    found: list[Argument | View] = []
    for number, (param, argument) in enumerate(zip(table["params"], case.arguments, strict=True)):
        if not isinstance(argument, np.ndarray):
            found.append(argument)
        elif "elem_offset" in param:
            before, behind = _INTEGERS if argument.dtype == np.int32 else _OTHERS
            around = [poisoned((n,), str(argument.dtype)) for n in (before, behind)]
            base = np.concatenate([around[0], argument.reshape(-1), around[1]])
            found.append(View(base, before, argument.shape))
        elif kept is not None and number not in case.expected and number not in case.scratch:
            if id(argument) not in kept:
                kept[id(argument)] = argument, argument.copy()
            found.append(kept[id(argument)][1])
        else:
            found.append(argument.copy())
    if kept is not None:
        for key in kept.keys() - {id(argument) for argument in case.arguments}:
            del kept[key]
    return found


def arrays_after(arguments: Sequence[Argument | View]) -> list[Argument]:
    """What the arguments of a call hold. Raises `KernelError` when something beside them was written."""
    found: list[Argument] = []
    for number, argument in enumerate(arguments):
        if isinstance(argument, View):
            base, start = argument.base, argument.offset
            stop = start + int(np.prod(argument.shape, dtype=np.int64))
            beside = (base[:start], base[stop:])
            if not all(same_bytes(part, poisoned(part.shape, str(part.dtype))) for part in beside):
                raise KernelError(f"something beside argument {number} was written")
            found.append(base[start:stop].reshape(argument.shape))
        else:
            found.append(argument)
    return found


def same_bytes(one: Array, other: Array) -> bool:
    """Whether two contiguous arrays of one size hold the same, NaNs too; a part at a time, for weights are large."""
    a, b = (array.reshape(-1).view(np.uint8) for array in (one, other))
    return a.size == b.size and all(
        np.array_equal(a[start : start + _PART], b[start : start + _PART]) for start in range(0, a.size, _PART)
    )


def poisoned(shape: Sequence[int], dtype: str) -> Array:
    """NaN, or bytes 0xCD for integers: what a kernel does not write is seen."""
    if np.dtype(dtype).kind == "f":
        return np.full(tuple(shape), np.nan, dtype)
    array = np.empty(tuple(shape), dtype)
    array.reshape(-1).view(np.uint8)[...] = POISON
    return array


def ints(values: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """As the runtime passes positions and indices."""
    return np.ascontiguousarray(values, np.int32)


def shape_of(table: Table, name: str) -> list[Any]:
    """Shape of a parameter in a launch table: numbers and expressions."""
    return next(list(p["shape"]) for p in table["params"] if p["name"] == name)
