"""Many rows of x on Hopper's tensor cores: W is decoded into the registers of `wgmma`, x staged in shared memory.

W is the instruction's A, 64 rows of it in a warpgroup's registers: each of its four warps holds 16 as `mma.m16n8k16`
does, so that `mma_weights` says which weights a lane decodes for which of the 16 steps along K. x is its B, all rows of
it that the block has, with the steps along K in that same order.

A kernel ahead arranges x so, once for all blocks: stages of 64 steps along K, of the rows of x that a block takes, in
rows of 128 bytes whose pieces of 16 lie at their number xor row mod 8 (PTX ISA, "Matrix layouts for wgmma", swizzling
of 128 bytes, K-major). A word's 8 elements of all four lanes, paired as the decoding does, make four such pieces.

A stage is then one bulk copy, which ends a phase of the stage's barrier (PTX ISA, "cp.async.bulk", "mbarrier"). It is
started when all warps are through with what lay in its place. The operands of two words alternate: one is decoded
while products with the other run.

Slices take groups in turn, each with stages of its own; their sums meet in shared memory.
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
from awq_compile.kernels.simt import barrier, branch, workspace
from awq_compile.schedules import WarpgroupSchedule

Expr = Any
Buffer = Any

_STAGE: Final = 64  # elements along K
_WARPS: Final = 4  # of a warpgroup
_WORD: Final = 8  # elements along K of a lane
_THREADS: Final = 64  # that arrange x: of the fewest rows a block takes, and one group


def emit_wgmma_gemm(args: LinearArgs, schedule: WarpgroupSchedule) -> None:
    """Emits both kernels for any M at the builder's current place."""
    if not schedule.divides(args.problem.k):
        groups = args.problem.k // GROUP
        raise CompileError(f"{args.problem.name}: {schedule.slices} slices do not share {groups} groups evenly")
    across = COLUMNS * schedule.columns
    blocks = T.bind((args.m32 + (across - 1)) // across)
    arranged = args.arranged
    if arranged is None:
        arranged = workspace("arranged", (tirx.Cast("int64", blocks) * (across * args.problem.k),), "float16")
    _arrange(args, arranged, blocks, across)
    _multiply(args, schedule, arranged, blocks)


def _arrange(args: LinearArgs, arranged: Buffer, blocks: Expr, across: int) -> None:
    """A thread takes one word's elements of four lanes; rows past M repeat the last."""
    k = args.problem.k
    words = k // (4 * _WORD)  # of a row
    with (
        T.launch_thread("blockIdx.x", blocks * (across * words // _THREADS)) as block,
        T.launch_thread("threadIdx.x", _THREADS) as thread,
    ):
        launch_dependents()
        call("awq_grid_wait", args.x.access_ptr("r"), arranged.access_ptr("r"))
        row, word = T.bind((block * _THREADS + thread) // words), T.bind((block * _THREADS + thread) % words)
        source = T.min(row, args.m32 - 1) * k + word // 4 * GROUP + word % 4 * _WORD
        stage = row // across * (k // _STAGE) + word // 2
        to = arranged.access_ptr("rw", offset=(stage * across + row % across) * _STAGE)
        call("awq_arrange_f16", to, args.x.access_ptr("r", offset=source), word % 2, row % 8)


def _multiply(args: LinearArgs, s: WarpgroupSchedule, arranged: Buffer, blocks: Expr) -> None:
    problem = args.problem
    outputs = ROWS // 2 if problem.epilogue.activation == "silu_mul" else ROWS  # of a warp's part of a tile
    of_group = outputs * _WARPS * s.tiles
    across, groups, sums = COLUMNS * s.columns, problem.k // GROUP // s.slices, s.tiles * s.columns * 4
    of_slice = s.threads // s.slices
    followed = groups if s.ahead == 1 else max(0, groups - s.ahead) // s.ahead * s.ahead
    with (
        T.launch_thread("blockIdx.x", blocks) as bx,
        T.launch_thread("blockIdx.y", -(-problem.n // (of_group * s.warpgroups))) as by,
        T.launch_thread("threadIdx.x", 32) as lane,
        T.launch_thread("threadIdx.y", _WARPS * s.warpgroups * s.slices) as in_block,
    ):
        place, t = T.bind(lane // 4), T.bind(lane % 4)
        part, warp = T.bind(in_block // (_WARPS * s.warpgroups)), T.bind(in_block % (_WARPS * s.warpgroups))
        first = T.bind((by * s.warpgroups + warp // _WARPS) * of_group + warp % _WARPS * outputs)
        first_x, thread = T.bind(bx * across), T.bind(warp * 32 + lane)
        firsts = [first + i * (outputs * _WARPS) for i in range(s.tiles)]
        shared = T.alloc_buffer((s.shared_bytes // 2,), "float16", scope="shared.dyn")
        weights = TileWeights(args, firsts, place, t, first=part, step=s.slices, ahead=s.ahead)
        total = local(sums, "float32")
        operands = [local(s.tiles * 8, "uint32") for _ in range(2)]
        stages = _Stages(s, arranged, shared, bx, problem.k, part)
        for i in range(sums):
            T.buffer_store(total, tirx.const(0, "float32"), [i])
        launch_dependents()
        weights.begin(groups, early=True)
        with T.If(in_block * 32 + lane == 0), T.Then():
            stages.init()
        barrier()
        wait_for_grids(args, x=arranged, loops=followed // s.ahead)
        with T.If(thread == 0), T.Then():
            call("awq_fence_loads")
            for number in range(min(s.stages, 2 * groups)):
                stages.load(number)
        together = barrier if s.slices == 1 else partial(call, f"awq_barrier_of<{of_slice}>", part)

        def one_turn(turn: Expr, slot: int, left: int | None) -> None:
            weights.advance(turn, left, slot=slot)
            for half in range(2):
                number = T.bind(turn * 2 + half)
                stages.wait(number)
                for w in range(2):
                    call("awq_wgmma_wait_1")  # products with these operands have ended
                    weights.decode(half * 2 + w, operands[w], scaled=True)
                    call(f"awq_wgmma_ready<{s.tiles * 8}>", pointer(operands[w], 0))
                    for i, step in ((i, step) for i in range(s.tiles) for step in range(2)):
                        call(
                            f"awq_wgmma_m64n{across}k16_f16f32",
                            pointer(total, i * s.columns * 4),
                            pointer(operands[w], i * 8 + step * 4),
                            stages.place(number),
                            w * 2 + step,
                        )
                    call("awq_wgmma_commit")
                together()  # products with the stage before this one have ended in every warp
                following = number + (s.stages - 1)
                with T.If(tirx.all(thread == 0, number > 0, following < 2 * groups)), T.Then():
                    stages.load(following)

        with T.serial(0, followed // s.ahead) as many:
            for slot in range(s.ahead):
                one_turn(many * s.ahead + slot, slot, None)
        for turn in range(followed, groups):  # behind the loop, where no group is read that nobody uses
            one_turn(tirx.const(turn, "int32"), turn % s.ahead, groups - 1 - turn)
        call(f"awq_wgmma_end<{sums}>", pointer(total, 0))
        for other in range(1, s.slices):
            # Sums of a thread lie a block's width apart, so that a warp's are side by side.
            if other == 1:
                barrier()  # no stage is read any more
                with T.If(part > 0), T.Then():
                    call(f"awq_leave_sums<{sums}, {of_slice}>", stages.sums(part - 1), pointer(total, 0), thread)
                barrier()
            call(f"awq_add_sums<{sums}, {of_slice}>", pointer(total, 0), stages.sums(other - 1), thread)
        whole = problem.n % (of_group * s.warpgroups) == 0
        with branch(part == 0, always=s.slices == 1):
            store_sums(args, total, s.columns, first_x, [(n, whole) for n in firsts], place, t)


class _Stages:
    """A ring of stages in shared memory for each slice, and at its end their barriers."""

    def __init__(self, s: WarpgroupSchedule, arranged: Buffer, shared: Buffer, block: Expr, k: int, part: Expr) -> None:
        self._s, self._arranged, self._shared, self._part = s, arranged, shared, part
        self._size = s.of_stage // 2  # in elements
        self._first = block * (k // _STAGE)  # stage of the block's rows of x
        self._count = s.slices * s.stages
        self._barriers = s.shared_bytes // 2 - self._count * 4

    def init(self) -> None:
        """Readies all barriers, by one thread of the block."""
        call(f"awq_stages_init<{self._count}>", pointer(self._shared, self._barriers))

    def load(self, number: Expr) -> None:
        """Starts to copy a stage to its place, by one thread of the slice."""
        group = number // 2 * self._s.slices + self._part
        at = (self._first + group * 2 + number % 2) * self._size
        source = self._arranged.access_ptr("r", offset=at)
        call(f"awq_stage_load<{self._s.of_stage}>", self._barrier(number), self.place(number), source)

    def wait(self, number: Expr) -> None:
        """Until a stage has come."""
        call("awq_stage_wait", self._barrier(number), number // self._s.stages % 2)

    def place(self, number: Expr) -> Expr:
        """Where a stage lies."""
        return pointer(self._shared, self._ring(number) * self._size)

    def sums(self, part: Expr) -> Expr:
        """Where a slice's sums lie."""
        return pointer(self._shared, part * (self._s.of_sums // 2))

    def _ring(self, number: Expr) -> Expr:
        return self._part * self._s.stages + number % self._s.stages

    def _barrier(self, number: Expr) -> Expr:
        return pointer(self._shared, self._barriers + self._ring(number) * 4)
