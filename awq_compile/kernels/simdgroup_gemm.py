"""Many rows of x on Apple GPUs: simdgroup matrices of 8 x 8, float16 in, float32 sums.

Tiles as in `tiles`. B is read transposed from the tile of W. Which lane holds which element of a simdgroup
matrix is not documented, so the sums go through shared memory to the epilogue (Metal Shading Language
Specification, "SIMD-group matrix functions").
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.simt import barrier
from awq_compile.kernels.tiles import stage_w, stage_x
from awq_compile.schedules import MatrixGemmSchedule

Expr = Any
Buffer = Any
_SIDE = 8  # of a simdgroup matrix


def emit_simdgroup_gemm(args: LinearArgs, schedule: MatrixGemmSchedule) -> None:
    """Emits the kernel for any M at the builder's current place."""
    problem, s = args.problem, schedule
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = s.block_n // 2 if pairs else s.block_n
    m_tiles, n_tiles = s.block_m // s.warps_m // _SIDE, s.block_n // s.warps_n // _SIDE
    with (
        T.launch_thread("blockIdx.x", -(-problem.n // outputs)) as bx,
        T.launch_thread("blockIdx.y", (args.m32 + (s.block_m - 1)) // s.block_m) as by,
        T.launch_thread("threadIdx.x", s.threads) as t,
    ):
        tile_x = T.alloc_buffer((s.block_m * s.row,), "float16", scope="shared")
        tile_w = T.alloc_buffer((s.block_n * s.row,), "float16", scope="shared")
        sums = T.alloc_buffer((s.block_m * s.block_n,), "float32", scope="shared")
        acc = T.alloc_buffer((m_tiles * n_tiles * _SIDE * _SIDE,), "float32", scope="metal.simdgroup")
        a = T.alloc_buffer((m_tiles * _SIDE * _SIDE,), "float16", scope="metal.simdgroup")
        b = T.alloc_buffer((n_tiles * _SIDE * _SIDE,), "float16", scope="metal.simdgroup")
        for i in range(m_tiles * n_tiles):
            _op("make_filled_simdgroup_matrix", acc.data, i, tirx.const(0, "float32"), _SIDE, _SIDE)
        warp_m, warp_n = T.bind(t // 32 // s.warps_n), T.bind(t // 32 % s.warps_n)
        first_row, first_column = warp_m * (m_tiles * _SIDE), warp_n * (n_tiles * _SIDE)
        with T.serial(0, problem.k // s.block_k) as step:
            k0 = T.bind(step * s.block_k)
            stage_x(args, s, tile_x, by, k0, t, lanes=4)
            stage_w(args, s, tile_w, bx, k0, t)
            barrier()
            with T.serial(0, s.block_k // _SIDE) as inner:
                for i in range(m_tiles):
                    source = (first_row + i * _SIDE) * s.row + inner * _SIDE
                    _op("simdgroup_load", a.data, i, tirx.address_of(tile_x[source]), s.row, _SIDE, _SIDE, False)
                for j in range(n_tiles):
                    source = (first_column + j * _SIDE) * s.row + inner * _SIDE
                    _op("simdgroup_load", b.data, j, tirx.address_of(tile_w[source]), s.row, _SIDE, _SIDE, True)
                for i in range(m_tiles):
                    for j in range(n_tiles):
                        at = i * n_tiles + j
                        _op("simdgroup_multiply_accumulate", acc.data, at, a.data, i, b.data, j, acc.data, at)
            barrier()
        for i in range(m_tiles):
            for j in range(n_tiles):
                target = (first_row + i * _SIDE) * s.block_n + first_column + j * _SIDE
                to = tirx.address_of(sums[target])
                _op("simdgroup_store", acc.data, i * n_tiles + j, to, s.block_n, _SIDE, _SIDE, False)
        barrier()
        with T.serial(0, s.block_m * outputs // s.threads) as piece:
            at = T.bind(piece * s.threads + t)
            row, column = T.bind(by * s.block_m + at // outputs), T.bind(bx * outputs + at % outputs)
            place = at // outputs * s.block_n + at % outputs
            gate = sums[place] if pairs else None
            value = sums[place + outputs] if pairs else sums[place]
            inside = row < args.m32
            if problem.n % outputs:
                inside = tirx.all(inside, column < problem.n)
            with T.If(inside), T.Then():
                T.buffer_store(args.y, args.finish(row, column, value, gate), [row, column])


def _op(name: str, *arguments: Expr) -> None:
    T.evaluate(tirx.call_intrin("void", f"tirx.{name}", *arguments))
