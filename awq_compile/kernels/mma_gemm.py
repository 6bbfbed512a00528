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

from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.simt import barrier
from awq_compile.kernels.tiles import stage_w, stage_x, tile_column
from awq_compile.schedules import MatrixGemmSchedule

Expr = Any
Buffer = Any


def emit_mma_gemm(args: LinearArgs, schedule: MatrixGemmSchedule) -> None:
    """Emits the kernel for any M at the builder's current place."""
    problem, s = args.problem, schedule
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = s.block_n // 2 if pairs else s.block_n
    m_tiles, n_tiles, mma_k = s.block_m // s.warps_m // 16, s.block_n // s.warps_n // 8, s.shape[2]
    a_words, b_words = mma_k // 4, mma_k // 8
    with (
        T.launch_thread("blockIdx.x", -(-problem.n // outputs)) as bx,
        T.launch_thread("blockIdx.y", (args.m32 + (s.block_m - 1)) // s.block_m) as by,
        T.launch_thread("threadIdx.x", s.threads) as t,
    ):
        tile_x = T.alloc_buffer((s.block_m * s.row,), "float16", scope="shared")
        tile_w = T.alloc_buffer((s.block_n * s.row,), "float16", scope="shared")
        acc = T.alloc_buffer((m_tiles * n_tiles * 4,), "float32", scope="local")
        a = T.alloc_buffer((m_tiles * a_words,), "uint32", scope="local")
        b = T.alloc_buffer((n_tiles * b_words,), "uint32", scope="local")
        for i in range(m_tiles * n_tiles * 4):
            T.buffer_store(acc, tirx.const(0, "float32"), [i])
        lane, warp = T.bind(t % 32), T.bind(t // 32)
        warp_m, warp_n = T.bind(warp // s.warps_n), T.bind(warp % s.warps_n)
        columns = [tile_column(s, warp_n, j, n_tiles, pairs) for j in range(n_tiles)]
        with T.serial(0, problem.k // s.block_k) as step:
            k0 = T.bind(step * s.block_k)
            stage_x(args, s, tile_x, by, k0, t, lanes=8)
            stage_w(args, s, tile_w, bx, k0, t)
            barrier()
            with T.serial(0, s.block_k // mma_k) as inner:
                k = T.bind(inner * mma_k)
                for i in range(m_tiles):
                    row = warp_m * (m_tiles * 16) + i * 16
                    _load_a(s, tile_x, a, i * a_words, row, k, lane)
                for j in range(n_tiles):
                    _load_b(s, tile_w, b, j * b_words, columns[j], k, lane)
                for i in range(m_tiles):
                    for j in range(n_tiles):
                        operands = ((acc, (i * n_tiles + j) * 4), (a, i * a_words), (b, j * b_words))
                        _call(f"awq_mma_m16n8k{mma_k}_f16f32", *(_pointer(*operand) for operand in operands))
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


def _pointer(buffer: Buffer, offset: Expr) -> Expr:
    """Address of an element. Unlike `address_of` it does not tell TVM that only this element is used.

    Shared tiles are only read by what they are passed to: else TVM would add a barrier at every call.
    """
    return buffer.access_ptr("r" if buffer.scope() == "shared" else "rw", offset=offset)


def _call(name: str, *arguments: Expr) -> None:
    T.evaluate(tirx.call_extern("void", name, *arguments))


def _load_a(s: MatrixGemmSchedule, tile: Buffer, a: Buffer, at: int, row: Expr, k: Expr, lane: Expr) -> None:
    """16 x k of A: matrices (rows 0-7, 8-15) x (k 0-7, 8-15), the rows of which lanes 0-7, 8-15, … name."""
    if s.shape[2] == 16:
        source = (row + lane % 16) * s.row + k + lane // 16 * 8
        _call("awq_ldmatrix_x4", _pointer(a, at), _pointer(tile, source))
    else:
        source = (row + lane % 16) * s.row + k
        _call("awq_ldmatrix_x2", _pointer(a, at), _pointer(tile, source))


def _load_b(s: MatrixGemmSchedule, tile: Buffer, b: Buffer, at: int, column: Expr, k: Expr, lane: Expr) -> None:
    """k x 8 of B, whose columns are rows of the tile."""
    name, source = "awq_ldmatrix_x1", (column + lane % 8) * s.row + k
    if s.shape[2] == 16:
        name, source = "awq_ldmatrix_x2", source + lane % 16 // 8 * 8
    _call(name, _pointer(b, at), _pointer(tile, source))
