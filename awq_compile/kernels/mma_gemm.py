"""Many rows of x on tensor cores: mma.sync on tiles of x and decoded W, float16 in, float32 sums.

Tiles lie in shared memory with K contiguous, x as (block_m, block_k) and W as (block_n, block_k), 8 elements
of padding a row, so that ldmatrix reads both operands without bank conflicts: the row-major A and the
column-major B of `mma.m16n8k16`. Lane l of a warp holds in its sums c0 … c3 of a 16x8 tile the elements
(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1), with g = l / 4, t = l % 4 (PTX ISA, "Matrix fragments for
mma.m16n8k16"). Inline PTX is in device functions whose names begin with `awq_`; the target provides them.

With `silu_mul` a warp's column tiles come in pairs, a gate tile of the block's left half and its up tile.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.simd import cast, ramp
from awq_compile.kernels.simt import ThreadReader, barrier
from awq_compile.schedules import MmaGemmSchedule

Expr = Any
Buffer = Any
_PAD = 8  # float16 elements: rows start 16 bytes apart modulo 128


def emit_mma_gemm(args: LinearArgs, schedule: MmaGemmSchedule) -> None:
    """Emits the kernel for any M at the builder's current place."""
    problem, s = args.problem, schedule
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = s.block_n // 2 if pairs else s.block_n
    stride = s.block_k + _PAD
    m_tiles, n_tiles = s.block_m // s.warps_m // 16, s.block_n // s.warps_n // 8
    a_words, b_words = s.mma_k // 4, s.mma_k // 8
    with (
        T.launch_thread("blockIdx.x", -(-problem.n // outputs)) as bx,
        T.launch_thread("blockIdx.y", (args.m32 + (s.block_m - 1)) // s.block_m) as by,
        T.launch_thread("threadIdx.x", s.threads) as t,
    ):
        tile_x = T.alloc_buffer((s.block_m * stride,), "float16", scope="shared")
        tile_w = T.alloc_buffer((s.block_n * stride,), "float16", scope="shared")
        acc = T.alloc_buffer((m_tiles * n_tiles * 4,), "float32", scope="local")
        a = T.alloc_buffer((m_tiles * a_words,), "uint32", scope="local")
        b = T.alloc_buffer((n_tiles * b_words,), "uint32", scope="local")
        for i in range(m_tiles * n_tiles * 4):
            T.buffer_store(acc, tirx.const(0, "float32"), [i])
        lane, warp = T.bind(t % 32), T.bind(t // 32)
        warp_m, warp_n = T.bind(warp // s.warps_n), T.bind(warp % s.warps_n)
        columns = [_tile_column(s, warp_n, j, n_tiles, pairs) for j in range(n_tiles)]
        with T.serial(0, problem.k // s.block_k) as step:
            k0 = T.bind(step * s.block_k)
            _stage_x(args, s, tile_x, stride, by, k0, t)
            _stage_w(args, s, tile_w, stride, bx, k0, t, pairs)
            barrier()
            with T.serial(0, s.block_k // s.mma_k) as inner:
                k = T.bind(inner * s.mma_k)
                for i in range(m_tiles):
                    row = warp_m * (m_tiles * 16) + i * 16
                    _load_a(s, tile_x, stride, a, i * a_words, row, k, lane)
                for j in range(n_tiles):
                    _load_b(s, tile_w, stride, b, j * b_words, columns[j], k, lane)
                for i in range(m_tiles):
                    for j in range(n_tiles):
                        operands = ((acc, (i * n_tiles + j) * 4), (a, i * a_words), (b, j * b_words))
                        _call(f"awq_mma_m16n8k{s.mma_k}_f16f32", *(_pointer(*operand) for operand in operands))
            barrier()
        group, place = T.bind(lane // 4), T.bind(lane % 4)
        for i in range(m_tiles):
            for half in range(2):
                row = T.bind(by * s.block_m + warp_m * (m_tiles * 16) + i * 16 + half * 8 + group)
                for j in range(n_tiles // 2 if pairs else n_tiles):
                    for e in range(2):
                        column = bx * outputs + columns[j] + place * 2 + e
                        value, gate = acc[(i * n_tiles + j) * 4 + half * 2 + e], None
                        if pairs:
                            gate, value = value, acc[(i * n_tiles + j + n_tiles // 2) * 4 + half * 2 + e]
                        inside = row < args.m32
                        if problem.n % outputs:
                            inside = tirx.all(inside, column < problem.n)
                        with T.If(inside), T.Then():
                            T.buffer_store(args.y, args.finish(row, column, value, gate), [row, column])


def _tile_column(s: MmaGemmSchedule, warp_n: Expr, j: int, n_tiles: int, pairs: bool) -> Expr:
    """First column, within the block, of the warp's 8-column tile `j`; ups follow gates with `pairs`."""
    if not pairs:
        return warp_n * (n_tiles * 8) + j * 8
    half, within = divmod(j, n_tiles // 2)
    return half * (s.block_n // 2) + warp_n * (n_tiles * 4) + within * 8


def _pointer(buffer: Buffer, offset: Expr) -> Expr:
    """Address of an element. Unlike `address_of` it does not tell TVM that only this element is used.

    Shared tiles are only read by what they are passed to: else TVM would add a barrier at every call.
    """
    return buffer.access_ptr("r" if buffer.scope() == "shared" else "rw", offset=offset)


def _call(name: str, *arguments: Expr) -> None:
    T.evaluate(tirx.call_extern("void", name, *arguments))


def _load_a(s: MmaGemmSchedule, tile: Buffer, stride: int, a: Buffer, at: int, row: Expr, k: Expr, lane: Expr) -> None:
    """16 x mma_k of A: matrices (rows 0-7, 8-15) x (k 0-7, 8-15), the rows of which lanes 0-7, 8-15, … name."""
    if s.mma_k == 16:
        source = (row + lane % 16) * stride + k + lane // 16 * 8
        _call("awq_ldmatrix_x4", _pointer(a, at), _pointer(tile, source))
    else:
        source = (row + lane % 16) * stride + k
        _call("awq_ldmatrix_x2", _pointer(a, at), _pointer(tile, source))


def _load_b(
    s: MmaGemmSchedule, tile: Buffer, stride: int, b: Buffer, at: int, column: Expr, k: Expr, lane: Expr
) -> None:
    """mma_k x 8 of B, whose columns are rows of the tile."""
    name, source = "awq_ldmatrix_x1", (column + lane % 8) * stride + k
    if s.mma_k == 16:
        name, source = "awq_ldmatrix_x2", source + lane % 16 // 8 * 8
    _call(name, _pointer(b, at), _pointer(tile, source))


def _stage_x(args: LinearArgs, s: MmaGemmSchedule, tile: Buffer, stride: int, by: Expr, k0: Expr, t: Expr) -> None:
    """8 elements of a row at a time, 16 bytes; rows past M repeat the last."""
    pieces = s.block_m * s.block_k // 8
    for i in range(pieces // s.threads):
        piece = T.bind(i * s.threads + t)
        m, k = T.bind(piece // (s.block_k // 8)), T.bind(piece % (s.block_k // 8) * 8)
        row = T.bind(T.min(by * s.block_m + m, args.m32 - 1))
        T.buffer_store(tile, args.x[row, ramp(k0 + k, 8)], [ramp(m * stride + k, 8)])


def _stage_w(
    args: LinearArgs, s: MmaGemmSchedule, tile: Buffer, stride: int, bx: Expr, k0: Expr, t: Expr, pairs: bool
) -> None:
    """One decoded unit of a row at a time, rounded to float16; columns past N repeat the last."""
    problem, spec = args.problem, args.problem.spec
    reader = ThreadReader(spec, s.unit, s.magic)
    outputs = s.block_n // 2 if pairs else s.block_n
    per_row = s.block_k // s.unit
    for i in range(s.block_n * per_row // s.threads):
        index = T.bind(i * s.threads + t)
        n, unit = T.bind(index // per_row), T.bind(index % per_row)
        column = bx * outputs + (n % outputs if pairs else n)
        if problem.n % outputs:
            column = T.min(column, problem.n - 1)
        row = T.bind(column + n // outputs * problem.n if pairs else column)
        words = reader.load(lambda at, row=row: args.weight[args.codes][row, at], k0 // s.unit + unit)  # type: ignore[misc]
        scale = shift = None
        if isinstance(spec, QuantSpec):
            group = (k0 + unit * s.unit) // spec.group
            scale, shift = args.scale_and_shift(lambda name, r=row, g=group: args.weight[name][r, g], 1)  # type: ignore[misc]
        for element in range(s.unit):
            value = reader.value(words, element)
            if scale is not None:
                value = value * scale - shift
            T.buffer_store(tile, cast("float16", value, 1), [n * stride + unit * s.unit + element])
