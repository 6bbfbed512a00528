"""Many rows of x on Hopper's tensor cores: W is decoded into the registers of `wgmma`, x staged in shared memory.

W is the instruction's A, 64 rows of it in a warpgroup's registers: each of its four warps holds 16 as `mma.m16n8k16`
does, so that `mma_weights` says which weights a lane decodes for which of the 16 steps along K. x is its B, all rows of
it that the block has, with the steps along K in that same order: a thread takes a word's 8 elements of all four lanes,
pairs them as the decoding does, and writes them as four pieces of 16 bytes.

A stage is 64 steps along K: rows of 128 bytes, whose pieces lie at their number xor row mod 8 (PTX ISA, "Matrix
layouts for wgmma", swizzling of 128 bytes, K-major). Of three stages one is multiplied, one may still be, and one is
written, so that there is one barrier a stage. What is written there `cp.async` has brought to shared memory as it is,
`copies` stages of it: the one that is arranged, and those on their way. The operands of two words alternate: one is
decoded while products with the other run.

Slices take groups in turn, each with stages and a barrier of its own; their sums meet in shared memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.errors import CompileError
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.mma_weights import (
    COLUMNS,
    GROUP,
    ROWS,
    TileWeights,
    call,
    launch_dependents,
    local,
    pointer,
    store_sums,
    wait_for_grids,
)
from awq_compile.kernels.simt import barrier, branch
from awq_compile.schedules import WarpgroupSchedule

Expr = Any
Buffer = Any

_STAGE: Final = 64  # elements along K
_WARPS: Final = 4  # of a warpgroup
_PIECES: Final = 8  # of 16 bytes, of a row of x in a stage
_PER_PIECE: Final = 8  # elements of x


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
        launch_dependents()
        weights.fetch(part, early=True)
        wait_for_grids(args, loops=groups)
        for number in range(s.copies):
            staging.begin(number, part + min(number // 2, groups - 1) * s.slices, number % 2)  # a group has two
        call(f"awq_cp_async_wait_{s.copies - 1}")
        together = barrier if s.slices == 1 else partial(call, f"awq_barrier_of<{of_slice}>", part)
        together()
        staging.arrange(0)
        with T.serial(0, groups) as turn:
            weights.advance((turn + 1) * s.slices + part)
            for half in range(2):
                number = turn * 2 + half
                call(f"awq_cp_async_wait_{s.copies - 2}")
                together()
                ahead = T.min(turn + (half + s.copies) // 2, groups - 1)  # past the end it is read again and not used
                staging.begin(number + s.copies, ahead * s.slices + part, (half + s.copies) % 2)
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
                staging.arrange(number + 1)
        call("awq_cp_async_wait_0")
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
    """A thread's part of bringing its slice's x to shared memory, and of arranging it there."""

    def __init__(self, args: LinearArgs, s: WarpgroupSchedule, first_x: Expr, thread: Expr, part: Expr) -> None:
        self._args, self._s = args, s
        self._size, of_slice = s.columns * COLUMNS * _STAGE, s.threads // s.slices
        self._of_sums = s.tiles * s.columns * 4 * of_slice * 2  # in elements of float16
        self._staged = T.alloc_buffer((s.slices * (3 + s.copies) * self._size,), "float16", scope="shared.dyn")
        self._first = T.bind(part * 3 * self._size)
        self._first_copy = T.bind((s.slices * 3 + part * s.copies) * self._size)
        self._pieces = []  # (row of x, its piece's offset along K, place in a copied stage)
        for i in range(s.columns * COLUMNS * _PIECES // of_slice):
            index = thread + i * of_slice
            row, piece = T.bind(index // _PIECES), T.bind(index % _PIECES)
            at = piece // 2 * 32 + piece % 2 * _PER_PIECE  # of a lane, of a word
            place = T.bind(row * _STAGE + (piece ^ (row % 4 * 2)) * _PER_PIECE)
            self._pieces.append((T.bind(T.min(first_x + row, args.m32 - 1)), T.bind(at), place))
        self._rows = []  # (row in the block, which of a stage's two words)
        for i in range(s.columns * COLUMNS * 2 // of_slice):
            index = thread + i * of_slice
            self._rows.append((T.bind(index // 2), T.bind(index % 2)))

    def slot(self, number: Expr) -> Expr:
        """Where a stage begins."""
        return pointer(self._staged, self._first + number % 3 * self._size)

    def sums(self, part: Expr) -> Expr:
        """Where a slice's sums lie."""
        return pointer(self._staged, part * self._of_sums)

    def begin(self, number: Expr, group: Expr, half: int) -> None:
        """Starts to copy half a group of x as stage `number`."""
        copy = self._copy(number)
        for x_row, at, place in self._pieces:
            k = group * GROUP + half * 2 * _PER_PIECE + at
            source = self._args.x.access_ptr("r", offset=x_row * self._args.problem.k + k)
            call("awq_cp_async_16", pointer(self._staged, copy + place), source)
        call("awq_cp_async_commit")

    def arrange(self, number: Expr) -> None:
        """Writes a stage that was copied as `wgmma` reads it."""
        slot, copy = T.bind(self._first + number % 3 * self._size), self._copy(number)
        for row, word in self._rows:
            ends = (pointer(self._staged, first + row * _STAGE) for first in (slot, copy))
            call("awq_arrange_f16", *ends, word, row % 8)
        call("awq_fence_async")

    def _copy(self, number: Expr) -> Expr:
        return T.bind(self._first_copy + number % self._s.copies * self._size)
