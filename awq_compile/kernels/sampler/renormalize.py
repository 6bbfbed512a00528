"""Keeps the most probable elements of each row, as many as reach top_p of its sum, on a GPU.

    S(t) = sum of p[j] ≥ t        t: the largest with S(t) ≥ top_p S(0)        p[j] ← p[j] / S(t) where p[j] ≥ t, else 0

Elements as probable as the last one stay; top_p ≥ 1 keeps everything. Non-negative floats are ordered like their bits,
so t is found by its hexadecimal digits, the highest first: each round adds up, by their next digit, the elements that
agree with t so far. S is float32 and its terms always come in the same order.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.sampler.block import COLUMNS, THREADS, Cell, each_column, function, shared_array
from awq_compile.kernels.simt import Registers, barrier

_DIGITS: Final = 16
_PARTS: Final = THREADS // _DIGITS  # of a digit's sums, each of as many threads
_MORE: Final = 3e38  # than any row sums to


def renormalize_top_p(name: str, vocab_size: int) -> Any:
    """The PrimFunc `name(probs (b, V), top_p (b,), renormalized (b, V))`, all float32. A row of zeros stays."""
    b, v = tirx.Var("b", "int32"), vocab_size
    shapes = {"probs": (b, v), "top_p": (b,), "renormalized": (b, v)}
    with (
        function(name, {n: (shape, "float32") for n, shape in shapes.items()}) as (builder, (probs, top_p, result)),
        T.launch_thread("blockIdx.x", b) as row,
        T.launch_thread("threadIdx.x", THREADS) as tx,
    ):
        # S of the elements above those that agree with the digits so far, and S of the least.
        least, above, kept, goal = Cell(0, "uint32"), Cell(0.0, "float32"), Cell(0.0, "float32"), Cell(0.0, "float32")
        loaded = Registers(COLUMNS)
        sums = _Sums(tx)

        def load(columns: list[Any]) -> None:
            for e, column in enumerate(columns):
                loaded[e] = probs[row, column]

        with T.serial(0, 8) as i:
            shift = T.bind(tirx.Cast("uint32", 28 - 4 * i))

            def add(columns: list[Any]) -> None:
                load(columns)
                for e in range(len(columns)):
                    # Below `least` the difference wraps around, and gives no digit either.
                    sums.add((tirx.reinterpret("uint32", loaded[e]) - least.value) >> shift, loaded[e])

            sums.clear()
            each_column(v, tx, add)
            sums.add_up()
            with T.If(i == 0), T.Then():
                for digit in reversed(range(_DIGITS)):
                    kept.set(kept.value + sums.of_digit(digit))
                goal.set(tirx.Select(top_p[row] < 1.0, top_p[row] * kept.value, tirx.const(_MORE, "float32")))
            found = Cell(0, "uint32")
            for digit in reversed(range(_DIGITS)):
                with T.If(found.value == 0), T.Then():
                    kept.set(above.value + sums.of_digit(digit))
                    with T.If(tirx.any(kept.value >= goal.value, digit == 0)):
                        with T.Then():
                            found.set(1)
                            least.set(least.value + (tirx.const(digit, "uint32") << shift))
                        with T.Else():
                            above.set(kept.value)

        def store(columns: list[Any]) -> None:
            load(columns)
            for e, column in enumerate(columns):
                share = Cell(0.0, "float32")
                with T.If(tirx.reinterpret("uint32", loaded[e]) >= least.value), T.Then():
                    share.set(loaded[e] / kept.value)
                T.buffer_store(result, share.value, [row, column])

        each_column(v, tx, store)
    return builder.get()


class _Sums:
    """Sums by digit: of each thread in a column of its own, then of parts of the threads, then of all."""

    def __init__(self, tx: Any) -> None:
        self._tx = tx
        self._of_threads = shared_array(_DIGITS * THREADS, "float32")
        self._of_parts, self._of_all = shared_array(THREADS, "float32"), shared_array(_DIGITS, "float32")
        self._digit, self._total = Cell(0, "uint32"), Cell(0.0, "float32")

    def clear(self) -> None:
        """Before a round."""
        for digit in range(_DIGITS):
            T.buffer_store(self._of_threads, tirx.const(0, "float32"), [digit * THREADS + self._tx])
        barrier()  # TVM does not see that a column is one thread's

    def add(self, digit: Any, value: Any) -> None:
        """Adds to a digit's sum; `digit` may be none."""
        self._digit.set(digit)
        with T.If(self._digit.value < _DIGITS), T.Then():
            at = tirx.Cast("int32", self._digit.value) * THREADS + self._tx
            T.buffer_store(self._of_threads, self._of_threads[at] + value, [at])

    def add_up(self) -> None:
        """After a round."""
        barrier()
        self._store(self._of_parts, self._of_threads, THREADS // _PARTS)
        barrier()
        with T.If(self._tx < _DIGITS), T.Then():
            self._store(self._of_all, self._of_parts, _PARTS)
        barrier()

    def of_digit(self, digit: int) -> Any:
        """The sum of a digit."""
        return self._of_all[digit]

    def _store(self, target: Any, source: Any, count: int) -> None:
        self._total.set(0.0)
        for i in range(count):
            self._total.set(self._total.value + source[self._tx * count + i])
        T.buffer_store(target, self._total.value, [self._tx])
