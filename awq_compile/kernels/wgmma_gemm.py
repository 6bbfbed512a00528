"""Many rows of x on Hopper's tensor cores: W is decoded into the registers of `wgmma`, x staged in shared memory.

W is the instruction's A, 64 rows of it in a warpgroup's registers: each of its four warps holds 16 as `mma.m16n8k16`
does, so that `mma_weights` says which weights a lane decodes for which of the 16 steps along K. x is its B, all rows of
it that the block has, with the steps along K in that same order: a thread takes a word's 8 elements of all four lanes,
pairs them as the decoding does, and writes them as four pieces of 16 bytes.

A stage is 64 steps along K: rows of 128 bytes, whose pieces lie at their number xor row mod 8 (PTX ISA, "Matrix
layouts for wgmma", swizzling of 128 bytes, K-major). Of three stages one is multiplied, one may still be, and one is
written, so that there is one barrier a stage. The operands of two words alternate: one is decoded while products with
the other run.

Slices take groups in turn, each with stages and a barrier of its own; their sums meet in shared memory.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.errors import CompileError
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.mma_weights import COLUMNS, GROUP, ROWS, TileWeights, call, local, pointer, store_sums
from awq_compile.kernels.simd import ramp
from awq_compile.kernels.simt import barrier, branch
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
    if not s.divides(problem.k):
        raise CompileError(f"{problem.name}: {s.slices} slices do not share {problem.k // GROUP} groups evenly")
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = ROWS // 2 if pairs else ROWS  # of a warp's part of a tile
    of_group = outputs * _WARPS * s.tiles
    across, groups, sums = COLUMNS * s.columns, problem.k // GROUP // s.slices, s.tiles * s.columns * 4
    of_slice = s.threads // s.slices
    with (
        T.launch_thread("blockIdx.x", (args.m32 + (across - 1)) // across) as bx,
        T.launch_thread("blockIdx.y", -(-problem.n // (of_group * s.warpgroups))) as by,
        T.launch_thread("threadIdx.x", 32) as lane,
        T.launch_thread("threadIdx.y", _WARPS * s.warpgroups * s.slices) as in_block,
    ):
        place, t = T.bind(lane // 4), T.bind(lane % 4)
        part, warp = T.bind(in_block // (_WARPS * s.warpgroups)), T.bind(in_block % (_WARPS * s.warpgroups))
        first = T.bind((by * s.warpgroups + warp // _WARPS) * of_group + warp % _WARPS * outputs)
        first_x, thread = T.bind(bx * across), T.bind(warp * 32 + lane)
        firsts = [first + i * (outputs * _WARPS) for i in range(s.tiles)]
        weights = TileWeights(args, firsts, place, t)
        total = local(sums, "float32")
        operands = [local(s.tiles * 8, "uint32") for _ in range(2)]
        staging = _Staging(args, s, first_x, thread, part)
        for i in range(sums):
            T.buffer_store(total, tirx.const(0, "float32"), [i])
        weights.fetch(part)
        staging.fetch(part, 0)
        staging.write(0)
        staging.fetch(part, 1)  # a group has two stages
        with T.serial(0, groups) as turn:
            weights.advance((turn + 1) * s.slices + part)
            for half in range(2):
                number = turn * 2 + half
                if s.slices == 1:
                    barrier()
                else:
                    call(f"awq_barrier_of<{of_slice}>", part)
                for w in range(2):
                    call("awq_wgmma_wait_1")  # products with these operands have ended
                    weights.decode(half * 2 + w, operands[w], scaled=True)
                    call(f"awq_wgmma_ready<{s.tiles * 8}>", pointer(operands[w], 0))
                    for i, step in ((i, step) for i in range(s.tiles) for step in range(2)):
                        call(
                            f"awq_wgmma_m64n{across}k16_f16f32",
                            pointer(total, i * s.columns * 4),
                            pointer(operands[w], i * 8 + step * 4),
                            staging.slot(number),
                            w * 2 + step,
                        )
                    call("awq_wgmma_commit")
                staging.write(number + 1)
                staging.fetch(T.min((number + 2) // 2, groups - 1) * s.slices + part, half)
        call(f"awq_wgmma_end<{sums}>", pointer(total, 0))
        for other in range(1, s.slices):
            # Sums of a thread lie a block's width apart, so that a warp's are side by side.
            if other == 1:
                barrier()  # no stage is read any more
                with T.If(part > 0), T.Then():
                    call(f"awq_leave_sums<{sums}, {of_slice}>", staging.sums(part - 1), pointer(total, 0), thread)
                barrier()
            call(f"awq_add_sums<{sums}, {of_slice}>", pointer(total, 0), staging.sums(other - 1), thread)
        whole = problem.n % (of_group * s.warpgroups) == 0
        with branch(part == 0, always=s.slices == 1):
            store_sums(args, total, s.columns, first_x, [(n, whole) for n in firsts], place, t)


class _Staging:
    """A thread's part of bringing its slice's x to shared memory, by way of its registers."""

    def __init__(self, args: LinearArgs, s: WarpgroupSchedule, first_x: Expr, thread: Expr, part: Expr) -> None:
        self._args = args
        self._size = s.columns * COLUMNS * _STAGE
        self._of_sums = s.tiles * s.columns * 4 * (s.threads // s.slices) * 2  # in elements of float16
        self._first = T.bind(part * 3 * self._size)
        self._staged = T.alloc_buffer((s.slices * 3 * self._size,), "float16", scope="shared.dyn")
        self._parts = []  # (row of x, the same in the block, which of two words)
        for i in range(s.columns * COLUMNS * 2 * s.slices // s.threads):
            index = thread + i * (s.threads // s.slices)
            row, word = T.bind(index // 2), T.bind(index % 2)
            self._parts.append((T.bind(T.min(first_x + row, args.m32 - 1)), row, word))
        self._x = local(len(self._parts) * _LANES * _PER_PIECE, "float16")

    def slot(self, number: Expr) -> Expr:
        """Where a stage begins."""
        return pointer(self._staged, self._first + number % 3 * self._size)

    def sums(self, part: Expr) -> Expr:
        """Where a slice's sums lie."""
        return pointer(self._staged, part * self._of_sums)

    def fetch(self, group: Expr, half: int) -> None:
        """Reads a stage into registers."""
        for i, (x_row, _, word) in enumerate(self._parts):
            for lane in range(_LANES):
                k = group * GROUP + lane * 32 + half * 16 + word * _PER_PIECE
                at = ramp((i * _LANES + lane) * _PER_PIECE, _PER_PIECE)
                T.buffer_store(self._x, self._args.x[x_row, ramp(k, _PER_PIECE)], [at])

    def write(self, number: Expr) -> None:
        """Writes what was read into a stage."""
        slot = T.bind(self._first + number % 3 * self._size)
        for i, (_, row, word) in enumerate(self._parts):
            source = pointer(self._x, i * _LANES * _PER_PIECE)
            call("awq_stage_f16", pointer(self._staged, slot + row * _STAGE), source, word * 4, row % 8)
        # Before more is read: the fence also waits for loads.
        call("awq_fence_async")
