"""Many rows of x on tensor cores: W is decoded in registers, as in `mma_weights`, and x is staged in shared memory.

Each warp decodes rows of W of its own and multiplies them by all rows of x that the block has. A stage holds 64 of
the 128 elements of a group: for each row of x the 16-byte pieces 4 t + w, of lanes t < 4 and two of the words w < 4
(`mma_weights` says which weights those are). `cp.async` brings the next stages while one is used. A row's 8 pieces are
stored at (4 w + t) xor 4 (row mod 2), so that 8 lanes that read or write together meet all 32 banks.
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
    TileWeights,
    call,
    launch_dependents,
    local,
    pointer,
    store_sums,
    wait_for_grids,
)
from awq_compile.kernels.simd import ramp
from awq_compile.kernels.simt import barrier
from awq_compile.schedules import StagedMatrixSchedule

Expr = Any
Buffer = Any

_PIECES: Final = 8  # of 16 bytes, of a row of x in a stage
_PER_PIECE: Final = 8  # elements of x


def emit_mma_staged(args: LinearArgs, schedule: StagedMatrixSchedule) -> None:
    """Emits the kernel for any M at the builder's current place."""
    problem, s = args.problem, schedule
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = ROWS // 2 if pairs else ROWS  # of a tile
    of_warp, groups, across = outputs * s.tiles, problem.k // GROUP, COLUMNS * s.columns
    with (
        T.launch_thread("blockIdx.x", (args.m32 + (across - 1)) // across) as bx,
        T.launch_thread("blockIdx.y", -(-problem.n // (of_warp * s.warps))) as by,
        T.launch_thread("threadIdx.x", 32) as lane,
        T.launch_thread("threadIdx.y", s.warps) as warp,
    ):
        launch_dependents()
        place, t = T.bind(lane // 4), T.bind(lane % 4)
        first, first_x = T.bind((by * s.warps + warp) * of_warp), T.bind(bx * across)
        firsts = [first + i * outputs for i in range(s.tiles)]
        weights = TileWeights(args, firsts, place, t)
        total = local(s.tiles * s.columns * 4, "float32")
        stages = _Stages(args, s, first_x, T.bind(warp * 32 + lane))
        products = _Products(s, stages.staged, total, place, t)
        for i in range(s.tiles * s.columns * 4):
            T.buffer_store(total, tirx.const(0, "float32"), [i])
        weights.begin(groups)
        wait_for_grids(args, loops=groups)
        for stage in range(s.stages - 1):
            stages.begin(stage * stages.size, min(stage // 2, groups - 1), stage % 2)
        with T.serial(0, groups) as group:
            weights.advance(group)
            for half in range(2):
                number = group * 2 + half
                ahead = number + (s.stages - 1)
                call(f"awq_cp_async_wait_{s.stages - 2}")
                barrier()  # the stage has arrived for all, and the one before it is used no more
                stages.begin(
                    stages.slot(ahead),
                    T.min(ahead // 2, groups - 1),  # past the end it is read again and not used
                    (half + s.stages - 1) % 2,
                )
                slot = stages.slot(number)
                for w in range(2):
                    weights.decode(half * 2 + w, products.a, scaled=True)
                    products.add(slot, w)
        call("awq_cp_async_wait_0")
        whole = problem.n % (of_warp * s.warps) == 0
        store_sums(args, total, s.columns, first_x, [(n, whole) for n in firsts], place, t)


class _Stages:
    """The ring of stages, and a thread's part of filling them."""

    def __init__(self, args: LinearArgs, s: StagedMatrixSchedule, first_x: Expr, thread: Expr) -> None:
        self._args, self._s = args, s
        self.size = s.columns * COLUMNS * _PIECES * _PER_PIECE
        self.staged = T.alloc_buffer((s.stages * self.size,), "float16", scope="shared")
        self._pieces = []  # (row of x, its piece's offset along K, place in the stage)
        for i in range(s.columns * COLUMNS * _PIECES // s.threads):
            index = thread + i * s.threads
            row, piece = index // _PIECES, index % _PIECES
            x_row = T.bind(T.min(first_x + row, args.m32 - 1))
            # Neighbouring threads take a row's two words of one lane, 32 bytes, then those of the next lane.
            at = T.bind((piece // 2) * 32 + (piece % 2) * _PER_PIECE)
            place = (piece % 2 * 4 + piece // 2) ^ (row % 2 * 4)
            self._pieces.append((x_row, at, T.bind((row * _PIECES + place) * _PER_PIECE)))

    def slot(self, number: Expr) -> Expr:
        """Where a stage begins."""
        return T.bind(number % self._s.stages * self.size)

    def begin(self, slot: Expr, group: Expr, half: int) -> None:
        """Starts to copy half a group of x."""
        for x_row, at, place in self._pieces:
            k = group * GROUP + half * 2 * _PER_PIECE + at
            source = self._args.x.access_ptr("r", offset=x_row * self._args.problem.k + k)
            call("awq_cp_async_16", pointer(self.staged, slot + place), source)
        call("awq_cp_async_commit")


class _Products:
    """A lane's operands of the instructions; `a` takes a word's decoded weights."""

    def __init__(self, s: StagedMatrixSchedule, staged: Buffer, total: Buffer, place: Expr, t: Expr) -> None:
        self._s, self._staged, self._total, self._place, self._t = s, staged, total, place, t
        self.a = local(s.tiles * 8, "uint32")
        self._b = local(4, "uint32")
        self._x = local(_PER_PIECE, "float16")

    def add(self, slot: Expr, w: int) -> None:
        """total += W x over 32 of K."""
        s = self._s
        for c in range(s.columns):
            # The row of x is 8 c + g: its lowest bit is g's.
            piece = (c * COLUMNS + self._place) * _PIECES + ((w * 4 + self._t) ^ (self._place % 2 * 4))
            T.buffer_store(self._x, self._staged[ramp(slot + piece * _PER_PIECE, _PER_PIECE)], [ramp(0, _PER_PIECE)])
            call("awq_pairs_f16", pointer(self._b, 0), pointer(self._x, 0))
            for i, step in ((i, step) for i in range(s.tiles) for step in range(2)):
                operands = ((self._total, (i * s.columns + c) * 4), (self.a, i * 8 + step * 4), (self._b, step * 2))
                call("awq_mma_m16n8k16_f16f32", *(pointer(*operand) for operand in operands))
