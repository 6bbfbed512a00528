"""Tiles of x and of decoded W in shared memory, float16 with K contiguous: what matrix instructions read."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.simd import cast, ramp
from awq_compile.kernels.simt import ThreadReader
from awq_compile.schedules import MatrixGemmSchedule

Expr = Any
Buffer = Any


def tile_column(s: MatrixGemmSchedule, warp_n: Expr, j: int, n_tiles: int, pairs: bool) -> Expr:
    """First column, within the block, of the warp's 8-column tile `j`; ups follow gates with `pairs`."""
    if not pairs:
        return warp_n * (n_tiles * 8) + j * 8
    half, within = divmod(j, n_tiles // 2)
    return half * (s.block_n // 2) + warp_n * (n_tiles * 4) + within * 8


def stage_x(args: LinearArgs, s: MatrixGemmSchedule, tile: Buffer, by: Expr, k0: Expr, t: Expr, *, lanes: int) -> None:
    """tile[m, k] = x[m, k0 + k], `lanes` elements of a row at a time; rows past M repeat the last."""
    pieces, in_row = s.block_m * s.block_k // lanes, s.block_k // lanes
    for i in range(pieces // s.threads):
        piece = T.bind(i * s.threads + t)
        m, k = T.bind(piece // in_row), T.bind(piece % in_row * lanes)
        row = T.bind(T.min(by * s.block_m + m, args.m32 - 1))
        T.buffer_store(tile, args.x[row, ramp(k0 + k, lanes)], [ramp(m * s.row + k, lanes)])


def stage_w(args: LinearArgs, s: MatrixGemmSchedule, tile: Buffer, bx: Expr, k0: Expr, t: Expr) -> None:
    """tile[n, k] = W[n, k0 + k], a decoded unit of a row at a time, in float16; columns past N repeat the last."""
    problem, spec = args.problem, args.problem.spec
    pairs = problem.epilogue.activation == "silu_mul"
    reader = ThreadReader(spec, s.unit, s.magic)
    outputs = s.block_n // 2 if pairs else s.block_n
    per_row = s.block_k // s.unit
    for i in range(s.block_n * per_row // s.threads):
        index = T.bind(i * s.threads + t)
        n, unit = (T.bind(part) for part in reader.split(index, s.block_n, per_row))
        column = bx * outputs + (n % outputs if pairs else n)
        if problem.n % outputs:
            column = T.min(column, problem.n - 1)
        row = T.bind(column + n // outputs * problem.n if pairs else column)
        words = reader.load(lambda at, row=row: args.stored(args.codes, row, at), k0 // s.unit + unit)  # type: ignore[misc]
        scale = shift = None
        if isinstance(spec, QuantSpec):
            group = (k0 + unit * s.unit) // spec.group
            scale, shift = args.scale_and_shift(lambda name, r=row, g=group: args.stored(name, r, g), 1)  # type: ignore[misc]
        for element in range(s.unit):
            value = reader.value(words, element)
            if scale is not None:
                value = value * scale - shift
            T.buffer_store(tile, cast("float16", value, 1), [n * s.row + unit * s.unit + element])
