"""Rows of x on tensor cores without shared tiles: W is decoded in registers and meets x in `mma.m16n8k16`.

W is the instruction's A, 16 of its rows; x its B, whose 8 columns are rows of x. Lane l, with g = l / 4 and
t = l % 4, holds A's rows g and g + 8 and B's column g. In which order the 16 steps along K are taken is free as
long as A and B agree, so a lane decodes whole words: of a group of 128 weights it reads the 32 from 32 t on, 16
bytes, and its word w holds the pairs (8 w + a, 8 w + a + 4), a < 4, that two instructions take. Products are exact
and sums float32; a group's sum is scaled once.

Warps of a block take groups in turn, and their sums meet in shared memory. The next group's words are on their
way while one is decoded. With `silu_mul`, A's upper 8 rows are gates and its lower 8 the ups.

Fragment layout: PTX ISA, "Matrix fragments for mma.m16n8k16". The decoding is that of Kim et al. 2022, "Who Says
Elephants Can't Run" (section 4): 0x6400 | q is 1024 + q in float16.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.simd import cast, ramp
from awq_compile.kernels.simt import Registers, barrier, branch
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import MatrixGemvSchedule

Expr = Any
Buffer = Any

GROUP: Final = 128
ROWS: Final = 16  # of W in one instruction
COLUMNS: Final = 8  # rows of x in one instruction
_WORDS: Final = 4  # that a lane reads of a group


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
        place, t = T.bind(lane // 4), T.bind(lane % 4)
        first = T.bind(bx * (outputs * s.tiles))
        rows = [row for i in range(s.tiles) for row in weight_rows(problem, first + i * outputs, place, pairs)]
        first_x = 0 if one_block else T.bind(by * across)
        x_rows = [
            0 if max_rows == 1 else T.bind(T.min(first_x + c * COLUMNS + place, args.m32 - 1)) for c in range(s.columns)
        ]
        total = T.alloc_buffer((s.tiles * s.columns * 4,), "float32", scope="local")
        ahead = T.alloc_buffer((len(rows) * _WORDS,), "uint32", scope="local")
        words = T.alloc_buffer((len(rows) * _WORDS,), "uint32", scope="local")
        for i in range(s.tiles * s.columns * 4):
            T.buffer_store(total, tirx.const(0, "float32"), [i])

        def fetch(group: Expr) -> None:
            for i, row in enumerate(rows):
                at = ramp((T.min(group, groups - 1) * 4 + t) * _WORDS, _WORDS)
                T.buffer_store(ahead, args.weight[args.codes][row, at], [ramp(i * _WORDS, _WORDS)])

        fetch(warp)
        with T.serial(0, -(-groups // s.warps)) as turn:
            group = T.bind(turn * s.warps + warp)
            for i in range(len(rows)):
                at = ramp(i * _WORDS, _WORDS)
                T.buffer_store(words, ahead[at], [at])
            fetch(group + s.warps)
            with branch(group < groups, always=groups % s.warps == 0):
                _one_group(args, s, words, total, group, rows, x_rows, t)
        _finish(args, s, total, max_rows, first_x, first, lane, warp)


def weight_rows(problem: MatmulProblem, first: Expr, place: Expr, pairs: bool) -> tuple[Expr, Expr]:
    """The rows of W that are a lane's rows g and g + 8; those past N repeat the last."""
    low = T.bind(T.min(first + place, problem.n - 1))
    if pairs:
        return low, T.bind(low + problem.n)
    return low, T.bind(T.min(first + place + 8, problem.n - 1))


def _one_group(
    args: LinearArgs,
    s: MatrixGemvSchedule,
    words: Buffer,
    total: Buffer,
    group: Expr,
    rows: list[Expr],
    x_rows: list[Expr],
    t: Expr,
) -> None:
    """total += scale * (W - z) x over one group."""
    spec = args.problem.spec
    assert isinstance(spec, QuantSpec)
    acc = T.alloc_buffer((s.tiles * s.columns * 4,), "float32", scope="local")
    decoded = T.alloc_buffer((4,), "uint32", scope="local")
    a = T.alloc_buffer((s.tiles * 8,), "uint32", scope="local")
    b = T.alloc_buffer((4,), "uint32", scope="local")
    x = T.alloc_buffer((8,), "float16", scope="local")
    zeros = T.alloc_buffer((len(rows),), "uint32", scope="local")
    for i in range(s.tiles * s.columns * 4):
        T.buffer_store(acc, tirx.const(0, "float32"), [i])
    for i, row in enumerate(rows):
        zero = spec.zero if spec.symmetric else args.weight["q_zero"][row, group]
        T.buffer_store(zeros, tirx.Cast("uint32", zero), [i])
    for w in range(_WORDS):
        for i, half in ((i, half) for i in range(s.tiles) for half in range(2)):  # rows g and g + 8
            row = i * 2 + half
            _call("awq_decode_u4", _pointer(decoded, 0), words[row * _WORDS + w], zeros[row])
            for pair in range(4):  # a[0], a[2] of the first instruction, then of the second
                T.buffer_store(a, decoded[pair], [i * 8 + pair // 2 * 4 + pair % 2 * 2 + half])
        for c, x_row in enumerate(x_rows):
            T.buffer_store(x, args.x[x_row, ramp(group * GROUP + t * 32 + w * 8, 8)], [ramp(0, 8)])
            _call("awq_pairs_f16", _pointer(b, 0), _pointer(x, 0))
            for i, step in ((i, step) for i in range(s.tiles) for step in range(2)):
                operands = ((acc, (i * s.columns + c) * 4), (a, i * 8 + step * 4), (b, step * 2))
                _call("awq_mma_m16n8k16_f16f32", *(_pointer(*operand) for operand in operands))
    for i, half in ((i, half) for i in range(s.tiles) for half in range(2)):
        scale = T.bind(cast("float32", args.weight["q_scale"][rows[i * 2 + half], group], 1))
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


def _pointer(buffer: Buffer, offset: int) -> Expr:
    return buffer.access_ptr("rw", offset=offset)


def _call(name: str, *arguments: Expr) -> None:
    T.evaluate(tirx.call_extern("void", name, *arguments))
