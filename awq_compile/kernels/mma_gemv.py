"""Rows of x on tensor cores without shared tiles: W is decoded in registers and meets x in `mma.m16n8k16`.

W is the instruction's A, as `mma_weights` says; x its B, whose 8 columns are rows of x: lane l holds column l / 4, and
reads 16 bytes of it for a word of W. Products are exact and sums float32; a group's sum is scaled once.

Warps of a block take groups in turn, and their sums meet in shared memory. The next groups' words are on their
way while one is decoded.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.mma_weights import (
    COLUMNS,
    GROUP,
    ROWS,
    WORDS,
    TileWeights,
    call,
    launch_dependents,
    local,
    pointer,
    wait_for_grids,
)
from awq_compile.kernels.simd import ramp
from awq_compile.kernels.simt import Registers, barrier, branch
from awq_compile.schedules import MatrixGemvSchedule

Expr = Any
Buffer = Any

# Up to so many turns, the last ones stand behind the loop, where no group is read that nobody uses.
_PEELED: Final = 8


def emit_mma_gemv(args: LinearArgs, schedule: MatrixGemvSchedule, max_rows: int | None) -> None:
    """Emits the kernel for M ≤ `max_rows` (None: any M) at the builder's current place."""
    problem, s = args.problem, schedule
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = ROWS // 2 if pairs else ROWS  # of a tile
    groups, across = problem.k // GROUP, COLUMNS * s.columns
    one_block = max_rows is not None and max_rows <= across
    with (
        T.launch_thread("blockIdx.x", -(-problem.n // (outputs * s.tiles))) as bx,
        T.launch_thread("blockIdx.y", 1 if one_block else (args.m32 + (across - 1)) // across) as by,
        T.launch_thread("threadIdx.x", 32) as lane,
        T.launch_thread("threadIdx.y", s.warps) as warp,
    ):
        if s.resident:
            call(f"awq_resident<{s.resident}>")
        launch_dependents()
        place, t = T.bind(lane // 4), T.bind(lane % 4)
        first = T.bind(bx * (outputs * s.tiles))
        firsts, thread = [first + i * outputs for i in range(s.tiles)], T.bind(warp * 32 + lane)
        weights = TileWeights(
            *(args, firsts, place, t),
            first=warp,
            step=s.warps,
            stages=s.stages,
            thread=thread,
            threads=s.threads,
        )
        first_x = 0 if one_block else T.bind(by * across)
        x = local(8, "float16")
        x_rows = [_row_of_x(args, max_rows, first_x + c * COLUMNS + place) for c in range(s.columns)]
        if max_rows == 1:
            T.buffer_store(x, tirx.Broadcast(tirx.const(0, "float16"), 8), [ramp(0, 8)])
        total = local(s.tiles * s.columns * 4, "float32")
        for i in range(s.tiles * s.columns * 4):
            T.buffer_store(total, tirx.const(0, "float32"), [i])
        turns = -(-groups // s.warps)
        followed = max(0, turns - weights.ahead) if turns <= _PEELED else turns
        weights.begin(turns, early=True)
        wait_for_grids(args, loops=followed if max_rows is None else 0)  # few rows have few sums to finish

        def one_turn(turn: Expr) -> None:
            group = T.bind(turn * s.warps + warp)
            with branch(group < groups, always=groups % s.warps == 0):
                _one_group(args, s, weights, total, group, x, x_rows, t)

        with T.serial(0, followed) as turn:
            weights.advance(turn)
            one_turn(turn)
        for last in range(followed, turns):
            weights.advance(last, turns - 1 - last)
            one_turn(last)
        _finish(args, s, total, max_rows, first_x, first, lane, warp)


def _row_of_x(args: LinearArgs, max_rows: int | None, column: Expr) -> tuple[Expr, Expr | None]:
    """The row of x that is a lane's column, and which lanes read it (None: all): one row is the first column."""
    if max_rows == 1:
        return 0, column == 0
    return T.bind(T.min(column, args.m32 - 1)), None


def _one_group(
    args: LinearArgs,
    s: MatrixGemvSchedule,
    weights: TileWeights,
    total: Buffer,
    group: Expr,
    x: Buffer,
    x_rows: list[tuple[Expr, Expr | None]],
    t: Expr,
) -> None:
    """total += scale * (W - z) x over one group. `x_rows`: a row, and who reads it; others keep `x`."""
    acc = local(s.tiles * s.columns * 4, "float32")
    a, b = local(s.tiles * 8, "uint32"), local(4, "uint32")
    for i in range(s.tiles * s.columns * 4):
        T.buffer_store(acc, tirx.const(0, "float32"), [i])
    for w in range(WORDS):
        weights.decode(w, a, scaled=False)
        for c, (x_row, read) in enumerate(x_rows):
            with branch(read, always=read is None):
                T.buffer_store(x, args.x[x_row, ramp(group * GROUP + t * 32 + w * 8, 8)], [ramp(0, 8)])
            call("awq_pairs_f16", pointer(b, 0), pointer(x, 0))
            for i, step in ((i, step) for i in range(s.tiles) for step in range(2)):
                operands = ((acc, (i * s.columns + c) * 4), (a, i * 8 + step * 4), (b, step * 2))
                call("awq_mma_m16n8k16_f16f32", *(pointer(*operand) for operand in operands))
    for i, half in ((i, half) for i in range(s.tiles) for half in range(2)):
        scale = weights.scale(i * 2 + half)
        for c, column in ((c, column) for c in range(s.columns) for column in range(2)):
            at = (i * s.columns + c) * 4 + half * 2 + column
            T.buffer_store(total, total[at] + acc[at] * scale, [at])


def _finish(
    args: LinearArgs,
    s: MatrixGemvSchedule,
    total: Buffer,
    max_rows: int | None,
    first_x: Expr,
    first: Expr,
    lane: Expr,
    warp: Expr,
) -> None:
    """Adds the warps' sums and stores what lies within M and N."""
    problem = args.problem
    pairs = problem.epilogue.activation == "silu_mul"
    outputs, sums = ROWS // 2 if pairs else ROWS, s.tiles * s.columns * 4
    if s.stages > 1:  # sums may lie where words did
        call("awq_cp_async_wait_0")
        barrier()
    shared = T.alloc_buffer((s.warps * sums * 32,), "float32", scope="shared")
    for i in range(sums):
        T.buffer_store(shared, total[i], [(warp * sums + i) * 32 + lane])
    barrier()
    # One result, or a gate and its up, for a lane of one warp, in turn.
    items = [
        (i, c, half, column)
        for i in range(s.tiles)
        for c in range(s.columns)
        for half in range(1 if pairs else 2)
        for column in range(1 if max_rows == 1 else 2)
    ]
    for number, (i, c, half, column) in enumerate(items):
        with branch(warp == number % s.warps, always=s.warps == 1):

            def summed(part: int, at: int = (i * s.columns + c) * 4 + column) -> Expr:
                value = Registers(1)
                value[0] = shared[(at + part * 2) * 32 + lane]
                for other in range(1, s.warps):
                    value[0] = value[0] + shared[(other * sums + at + part * 2) * 32 + lane]
                return value[0]

            gate, value = (summed(0), summed(1)) if pairs else (None, summed(half))
            m = T.bind(first_x + c * COLUMNS + lane % 4 * 2 + column)
            n = T.bind(first + i * outputs + half * 8 + lane // 4)
            inside = m < (1 if max_rows == 1 else args.m32)
            if problem.n % (outputs * s.tiles):
                inside = tirx.all(inside, n < problem.n)
            with T.If(inside), T.Then():
                T.buffer_store(args.y, args.finish(m, n, value, gate), [m, n])
