"""Sorts the rows of a matrix on a GPU, descending and stable, with the columns that the values come from.

Everything is merged by ranks: in a pair of sorted runs an element goes to its place in its own run plus the number of
elements of the other run before it, found by bisection. Equal values keep their order, so the result is unique.
Within a tile runs grow from 1 in shared memory; then tiles are merged, up to about the square root of their number at
once, so that two more kernels sort any vocabulary. No kernel needs another order of its threads than barriers give.

Floats are compared by their bits, as integers of the same order; a NaN comes first or last and disturbs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    tiles_of,
)
from awq_compile.kernels.simt import Registers, barrier, workspace

Expr = Any
Buffer = Any

_LOWEST = -(1 << 31)


def sort_rows(name: str, vocab_size: int) -> Any:
    """The PrimFunc `name(values (b, V) float32, sorted (b, V) float32, columns (b, V) int32)`."""
    b, v = tirx.Var("b", "int32"), vocab_size
    shapes = {"values": "float32", "sorted_values": "float32", "columns": "int32"}
    with function(name, {n: ((b, v), dtype) for n, dtype in shapes.items()}) as (builder, (values, *result)):
        passes = _merges(tiles_of(v))
        places = [result]
        if passes:
            places.append([workspace(f"{n}_between", (b, v), dtype) for n, dtype in list(shapes.items())[1:]])
        side = len(passes) % 2
        _sort_tiles(values, places[side], b, v)
        length = TILE
        for fan in passes:
            _merge(places[side], places[1 - side], b, v, length, fan)
            length, side = length * fan, 1 - side
    return builder.get()


def _merges(tiles: int) -> list[int]:
    """How many runs each pass merges into one."""
    if tiles <= 4:
        return [tiles] if tiles > 1 else []
    fan = math.isqrt(tiles - 1) + 1
    return [fan, -(-tiles // fan)]


def _ordered(value: Expr) -> Expr:
    """An int32 for a float32: a < b of numbers and of these are the same, except that -0 is below 0."""
    bits = Cell(tirx.reinterpret("int32", value), "int32")
    return _flipped(bits.value)


def _flipped(bits: Expr) -> Expr:
    """The lower 31 bits inverted where the highest is set; its own inverse."""
    return bits ^ ((bits >> 31) & tirx.const(0x7FFFFFFF, "int32"))


def _rank(key: Callable[[Expr], Expr], start: Expr, length: Expr, bits: Expr, mine: Expr, or_equal: Expr) -> Expr:
    """How many keys of a descending run are greater than `mine`, or as great where `or_equal`.

    `length` has at most `bits` bits. `key` is read only within the run.
    """
    found = Cell(0, "int32")
    with T.serial(0, bits) as i:
        step = T.bind(tirx.const(1, "int32") << (bits - 1 - i))
        with T.If(found.value + step <= length), T.Then():
            other = Cell(key(start + found.value + step - 1), "int32")
            with T.If(tirx.any(other.value > mine, tirx.all(or_equal, other.value == mine))), T.Then():
                found.set(found.value + step)
    return found.value


def _sort_tiles(values: Buffer, result: list[Buffer], b: Expr, v: int) -> None:
    """A block sorts a tile of a row. What lies beyond the row is below everything in it."""
    with (
        T.launch_thread("blockIdx.x", tiles_of(v)) as bx,
        T.launch_thread("blockIdx.y", b) as by,
        T.launch_thread("threadIdx.x", THREADS) as tx,
    ):
        keys, columns = shared_array(TILE, "int32"), shared_array(TILE, "int32")
        key, column, target = (Registers(PER_THREAD, "int32") for _ in range(3))
        for e in range(PER_THREAD):
            at = e * THREADS + tx
            place = bx * TILE + at
            mine = Cell(_LOWEST, "int32")
            with T.If(place < v), T.Then():
                mine.set(_ordered(values[by, place]))
            T.buffer_store(keys, mine.value, [at])
            T.buffer_store(columns, place, [at])
        with T.serial(0, TILE.bit_length() - 1) as level:
            barrier()
            for e in range(PER_THREAD):
                at = e * THREADS + tx
                run = T.bind(at >> level)
                key[e], column[e] = keys[at], columns[at]
                sibling = T.bind((run ^ 1) << level)
                length = T.bind(tirx.const(1, "int32") << level)
                before = _rank(lambda i: keys[i], sibling, length, level + 1, key[e], (run & 1) == 1)
                target[e] = ((run >> 1) << (level + 1)) + (at & (length - 1)) + before
            barrier()
            for e in range(PER_THREAD):
                T.buffer_store(keys, key[e], [target[e]])
                T.buffer_store(columns, column[e], [target[e]])
        barrier()
        for e in range(PER_THREAD):
            at = e * THREADS + tx
            place = bx * TILE + at
            with T.If(place < v), T.Then():
                T.buffer_store(result[0], tirx.reinterpret("float32", _flipped(keys[at])), [by, place])
                T.buffer_store(result[1], columns[at], [by, place])


def _merge(source: list[Buffer], result: list[Buffer], b: Expr, v: int, length: int, fan: int) -> None:
    """Merges every `fan` sorted runs of `length`; a thread finds the place of an element."""
    group = length * fan
    with (
        T.launch_thread("blockIdx.x", -(-v // THREADS)) as bx,
        T.launch_thread("blockIdx.y", b) as by,
        T.launch_thread("threadIdx.x", THREADS) as tx,
    ):
        at = T.bind(bx * THREADS + tx)
        with T.If(at < v), T.Then():
            first = T.bind(at // group * group)
            own = T.bind(at // length * length)
            mine = Cell(_ordered(source[0][by, at]), "int32")
            place = Cell(first + at - own, "int32")
            with T.serial(0, fan) as i:
                start = T.bind(first + i * length)
                with T.If(tirx.all(start != own, start < v)), T.Then():
                    size = T.bind(T.min(length, v - start))
                    before = _rank(
                        lambda j: _ordered(source[0][by, j]), start, size, length.bit_length(), mine.value, start < own
                    )
                    place.set(place.value + before)
            T.buffer_store(result[0], source[0][by, at], [by, place.value])
            T.buffer_store(result[1], source[1][by, at], [by, place.value])
