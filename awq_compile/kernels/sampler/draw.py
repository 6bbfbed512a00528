"""Draws columns of a matrix by the probabilities in its rows, on a GPU.

    c[j] = p[0] + … + p[j]        drawn: the first j with c[j] > u c[V-1]

with u uniform in [0, 1); rows need not sum to 1. With top-p, the row being sorted descending:

    last: the first j with c[j] ≥ top_p c[V-1]        drawn: the first j with c[j] > u c[last]

Sums are float32 and taken in a tree of tiles, groups, threads and elements, always in the same order; the sums to the
left of a child are what its siblings add up to, one after the other. A search goes down the tree: at each level to the
first child whose sums reach the rest of the goal, else to the last child that has a sum. So rounding moves a draw at
most to where c is within rounding of the goal, and never to an element of probability 0 or beyond the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.sampler.block import (
    PER_THREAD,
    THREADS,
    TILE,
    Cell,
    function,
    shared_array,
    sum_over_block,
    tiles_of,
)
from awq_compile.kernels.simt import barrier, workspace

Expr = Any
Buffer = Any

_GROUPS = 16  # of threads


def draw(name: str, vocab_size: int) -> Any:
    """The PrimFunc `name(probs (b, V), uniform (k,), rows (k,) int32, drawn (k,) int32)`, floats being float32."""
    k, arguments = _arguments(vocab_size)
    with (
        function(name, {**arguments, "drawn": ((k,), "int32")}) as (builder, (probs, uniform, rows, drawn)),
        _searching(probs, rows, k, vocab_size) as search,
    ):
        with T.If(search.tx == 0), T.Then():
            search.goal.set(uniform[search.sample] * search.total())
        place = search.descend(or_equal=False)
        with T.If(search.tx == 0), T.Then():
            T.buffer_store(drawn, place.value, [search.sample])
    return builder.get()


def draw_top_p(name: str, vocab_size: int) -> Any:
    """The same from sorted rows: `name(probs, columns (b, V) int32, uniform, rows, top_p (b,), drawn)`."""
    k, arguments = _arguments(vocab_size)
    probs = arguments.pop("probs")
    shapes = {"probs": probs, "columns": (probs[0], "int32"), **arguments, "top_p": (probs[0][:1], "float32")}
    with function(name, {**shapes, "drawn": ((k,), "int32")}) as (builder, buffers):
        sorted_probs, columns, uniform, rows, top_p, drawn = buffers
        with _searching(sorted_probs, rows, k, vocab_size) as search:
            with T.If(search.tx == 0), T.Then():
                search.goal.set(top_p[search.row] * search.total())
            last = search.descend(or_equal=True)
            with T.If(search.tx == 0), T.Then():
                search.goal.set(uniform[search.sample] * search.reached.value)
            place = search.descend(or_equal=False)
            with T.If(search.tx == 0), T.Then():
                T.buffer_store(drawn, columns[search.row, T.min(place.value, last.value)], [search.sample])
    return builder.get()


def _arguments(vocab_size: int) -> tuple[Expr, dict[str, tuple[tuple[Any, ...], str]]]:
    b, k = tirx.Var("b", "int32"), tirx.Var("k", "int32")
    return k, {"probs": ((b, vocab_size), "float32"), "uniform": ((k,), "float32"), "rows": ((k,), "int32")}


def _tile_sums(probs: Buffer, rows: Buffer, k: Expr, v: int) -> Buffer:
    """(k, tiles) float32: the sums of the tiles of each sample's row."""
    sums = workspace("tile_sums", (k, tiles_of(v)), "float32")
    with (
        T.launch_thread("blockIdx.x", tiles_of(v)) as bx,
        T.launch_thread("blockIdx.y", k) as by,
        T.launch_thread("threadIdx.x", THREADS) as tx,
    ):
        shared = shared_array(THREADS, "float32")
        total = Cell(0.0, "float32")
        for e in range(PER_THREAD):
            at = bx * TILE + e * THREADS + tx
            with T.If(at < v), T.Then():
                total.set(total.value + probs[rows[by], at])
        T.buffer_store(shared, total.value, [tx])
        sum_over_block(shared, tx)
        with T.If(tx == 0), T.Then():
            T.buffer_store(sums, shared[0], [by, bx])
    return sums


@contextmanager
def _searching(probs: Buffer, rows: Buffer, k: Expr, v: int) -> Iterator[_Search]:
    """Sums the tiles, then opens a block of threads for each sample."""
    sums = _tile_sums(probs, rows, k, v)
    with T.launch_thread("blockIdx.x", k) as bx, T.launch_thread("threadIdx.x", THREADS) as tx:
        yield _Search(probs, sums, bx, rows[bx], tx, v)


class _Search:
    """One sample's way down the tree. What it finds, thread 0 knows; `goal` and `reached` are its registers.

    `reached` is the cumulative sum up to the element found, with it.
    """

    def __init__(self, probs: Buffer, sums: Buffer, sample: Expr, row: Expr, tx: Expr, v: int) -> None:
        self.sample, self.row, self.tx = sample, row, tx
        self.goal, self.reached = Cell(0.0, "float32"), Cell(0.0, "float32")
        self._probs, self._sums, self._v = probs, sums, v
        self._tile = shared_array(1, "int32")
        self._elements = shared_array(TILE, "float32")
        self._of_threads, self._of_groups = shared_array(THREADS, "float32"), shared_array(_GROUPS, "float32")

    def total(self) -> Expr:
        """The row's sum, added up as `descend` does."""
        found = Cell(0.0, "float32")
        with T.serial(0, tiles_of(self._v)) as i:
            found.set(found.value + self._sums[self.sample, i])
        return found.value

    def descend(self, *, or_equal: bool) -> Cell:
        """The first column whose cumulative sum is above `goal`, or equal to it."""
        tx, column = self.tx, Cell(0, "int32")
        in_group = THREADS // _GROUPS
        with T.If(tx == 0), T.Then():
            self.reached.set(0.0)
            tile = self._child(lambda i: self._sums[self.sample, i], tiles_of(self._v), or_equal=or_equal)
            T.buffer_store(self._tile, tile.value, [0])
        barrier()
        start = Cell(self._tile[0] * TILE, "int32")
        for e in range(PER_THREAD):
            at = e * THREADS + tx
            value = Cell(0.0, "float32")
            place = start.value + at
            with T.If(place < self._v), T.Then():
                value.set(self._probs[self.row, place])
            T.buffer_store(self._elements, value.value, [at])
        barrier()
        self._store_sum(self._of_threads, self._elements, PER_THREAD)
        barrier()
        with T.If(tx < _GROUPS), T.Then():
            self._store_sum(self._of_groups, self._of_threads, in_group)
        barrier()
        with T.If(tx == 0), T.Then():
            group = self._child(lambda i: self._of_groups[i], _GROUPS, or_equal=or_equal).value
            thread = self._child(lambda i: self._of_threads[group * in_group + i], in_group, or_equal=or_equal).value
            first = (group * in_group + thread) * PER_THREAD
            element = self._child(lambda i: self._elements[first + i], PER_THREAD, or_equal=or_equal).value
            self.reached.set(self.reached.value + self._elements[first + element])
            column.set(start.value + first + element)
        return column

    def _child(self, sum_of: Callable[[Expr], Expr], count: int, *, or_equal: bool) -> Cell:
        """Goes on to one of `count` children: what lies to its left moves from `goal` to `reached`."""
        place, found = Cell(0, "int32"), Cell(0, "int32")
        left, up_to, own = (Cell(0.0, "float32") for _ in range(3))
        with T.serial(0, count) as i, T.If(found.value == 0), T.Then():
            own.set(sum_of(i))
            with T.If(own.value > 0.0), T.Then():
                place.set(i)
                left.set(up_to.value)
            up_to.set(up_to.value + own.value)
            reaches = up_to.value >= self.goal.value if or_equal else up_to.value > self.goal.value
            with T.If(reaches), T.Then():
                found.set(1)
        self.goal.set(self.goal.value - left.value)
        self.reached.set(self.reached.value + left.value)
        return place

    def _store_sum(self, target: Buffer, source: Buffer, count: int) -> None:
        total = Cell(0.0, "float32")
        for i in range(count):
            total.set(total.value + source[self.tx * count + i])
        T.buffer_store(target, total.value, [self.tx])
