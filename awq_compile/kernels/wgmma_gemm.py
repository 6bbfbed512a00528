"""Many rows of x on Hopper's tensor cores: W is decoded into the registers of `wgmma`, x staged in shared memory.

W is the instruction's A, 64 rows of it in a warpgroup's registers: each of its four warps holds 16 as `mma.m16n8k16`
does, so that `mma_weights` says which weights a lane decodes for which of the 16 steps along K. x is its B, all rows of
it that the block has, with the steps along K in that same order: a thread takes a word's 8 elements of all four lanes,
pairs them as the decoding does, and writes them as four pieces of 16 bytes.

A stage is 64 steps along K: rows of 128 bytes, whose pieces lie at their number xor row mod 8 (PTX ISA, "Matrix
layouts for wgmma", swizzling of 128 bytes, K-major). Of three stages one is multiplied, one may still be, and one is
written, so that there is one barrier a stage. The operands of two words alternate: one is decoded while products with
the other run.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.mma_weights import COLUMNS, GROUP, ROWS, TileWeights, call, local, pointer, store_sums
from awq_compile.kernels.simd import ramp
from awq_compile.kernels.simt import barrier
from awq_compile.schedules import WarpgroupSchedule

Expr = Any
Buffer = Any

_STAGE: Final = 64  # elements along K
_WARPS: Final = 4  # of a warpgroup
_LANES: Final = 4  # that share the steps along K
_PER_PIECE: Final = 8  # elements of 16 bytes


def emit_wgmma_gemm(args: LinearArgs, schedule: WarpgroupSchedule) -> None:
    """Emits the kernel for any M at the builder's current place."""
    problem, s = args.problem, schedule
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = ROWS // 2 if pairs else ROWS  # of a warp's part of a tile
    of_group = outputs * _WARPS * s.tiles
    across, stages = COLUMNS * s.columns, problem.k // _STAGE
    with (
        T.launch_thread("blockIdx.x", (args.m32 + (across - 1)) // across) as bx,
        T.launch_thread("blockIdx.y", -(-problem.n // (of_group * s.warpgroups))) as by,
        T.launch_thread("threadIdx.x", 32) as lane,
        T.launch_thread("threadIdx.y", _WARPS * s.warpgroups) as warp,
    ):
        place, t = T.bind(lane // 4), T.bind(lane % 4)
        first = T.bind((by * s.warpgroups + warp // _WARPS) * of_group + warp % _WARPS * outputs)
        first_x = T.bind(bx * across)
        firsts = [first + i * (outputs * _WARPS) for i in range(s.tiles)]
        weights = TileWeights(args, firsts, place, t)
        total = local(s.tiles * s.columns * 4, "float32")
        operands = [local(s.tiles * 8, "uint32") for _ in range(2)]
        staging = _Staging(args, s, first_x, T.bind(warp * 32 + lane))
        for i in range(s.tiles * s.columns * 4):
            T.buffer_store(total, tirx.const(0, "float32"), [i])
        weights.fetch(0)
        staging.fetch(0, 0)
        staging.write(0)
        staging.fetch(0, 1)  # a group has two stages
        with T.serial(0, stages // 2) as group:
            weights.advance(group + 1)
            for half in range(2):
                number = group * 2 + half
                call("awq_fence_async")
                barrier()
                slot = T.bind(number % 3 * staging.size)
                for w in range(2):
                    call("awq_wgmma_wait_1")  # products with these operands have ended
                    weights.decode(half * 2 + w, operands[w], scaled=True)
                    call(f"awq_wgmma_ready<{s.tiles * 8}>", pointer(operands[w], 0))
                    for i, step in ((i, step) for i in range(s.tiles) for step in range(2)):
                        call(
                            f"awq_wgmma_m64n{across}k16_f16f32",
                            pointer(total, i * s.columns * 4),
                            pointer(operands[w], i * 8 + step * 4),
                            pointer(staging.staged, slot),
                            w * 2 + step,
                        )
                    call("awq_wgmma_commit")
                staging.write(T.bind((number + 1) % 3 * staging.size))
                staging.fetch(T.min((number + 2) // 2, stages // 2 - 1), half)
        call(f"awq_wgmma_end<{s.tiles * s.columns * 4}>", pointer(total, 0))
        whole = problem.n % (of_group * s.warpgroups) == 0
        store_sums(args, total, s.columns, first_x, [(n, whole) for n in firsts], place, t)


class _Staging:
    """A thread's part of bringing x to shared memory, by way of its registers."""

    def __init__(self, args: LinearArgs, s: WarpgroupSchedule, first_x: Expr, thread: Expr) -> None:
        self._args = args
        self.size = s.columns * COLUMNS * _STAGE
        self.staged = T.alloc_buffer((3 * self.size,), "float16", scope="shared")
        self._parts = []  # (row of x, the same in the block, which of two words)
        for i in range(s.columns * COLUMNS * 2 // s.threads):
            index = thread + i * s.threads
            row, word = T.bind(index // 2), T.bind(index % 2)
            self._parts.append((T.bind(T.min(first_x + row, args.m32 - 1)), row, word))
        self._x = local(len(self._parts) * _LANES * _PER_PIECE, "float16")

    def fetch(self, group: Expr, half: int) -> None:
        """Reads a stage into registers."""
        for i, (x_row, _, word) in enumerate(self._parts):
            for lane in range(_LANES):
                k = group * GROUP + lane * 32 + half * 16 + word * _PER_PIECE
                at = ramp((i * _LANES + lane) * _PER_PIECE, _PER_PIECE)
                T.buffer_store(self._x, self._args.x[x_row, ramp(k, _PER_PIECE)], [at])

    def write(self, slot: Expr) -> None:
        """Writes what was read into a stage."""
        for i, (_, row, word) in enumerate(self._parts):
            source = pointer(self._x, i * _LANES * _PER_PIECE)
            call("awq_stage_f16", pointer(self.staged, slot + row * _STAGE), source, word * 4, row % 8)
