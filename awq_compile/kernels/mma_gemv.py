"""Rows of x on tensor cores without shared tiles: W is decoded in registers and meets x in `mma.m16n8k16`.

W is the instruction's A, as `mma_weights` says; x its B, of whose 8 columns lane l holds column l / 4. With more than 4
rows of x a column is a row. With up to 4 its words stand side by side: column c is word c % side of row c / side, where
side = 8 / rows, so that one read of 16 bytes serves `side` words of W. Of the sums of a word a lane then keeps those of
the column that held this word of x. Products are exact and sums float32; a group's sum is scaled once.

Warps of a block take groups in turn, and their sums meet in shared memory. The next groups' words are on their
way while one is decoded.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import Float16Spec
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.mma_weights import (
    COLUMNS,
    ROWS,
    TileFloats,
    TileWeights,
    call,
    launch_dependents,
    local,
    pointer,
    wait_for_grids,
    zeros,
)
from awq_compile.kernels.simd import ramp
from awq_compile.kernels.simt import Registers, barrier, branch, sum_over_threads
from awq_compile.schedules import MatrixGemvSchedule

Expr = Any
Buffer = Any

# Up to so many turns, the last ones stand behind the loop, where no group is read that nobody uses. Where a turn of the
# loop takes several, they stand there only if they are all. By an H200.
_PEELED: Final = 8


def emit_mma_gemv(args: LinearArgs, schedule: MatrixGemvSchedule, max_rows: int | None) -> None:
    """Emits the kernel for M ≤ `max_rows` (None: any M) at the builder's current place."""
    problem, s = args.problem, schedule
    rows = max_rows if max_rows in (1, 2, 4) else COLUMNS
    pairs = problem.epilogue.activation == "silu_mul"
    outputs = ROWS // 2 if pairs else ROWS  # of a tile
    across = rows * s.columns
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
        weights = _weights(args, s, firsts, place, t, warp, thread)
        first_x = 0 if one_block else T.bind(by * across)
        groups = problem.k // weights.group
        turns = -(-groups // s.warps)
        sums: _Rows | _Words
        if rows == COLUMNS:
            x_rows = [T.bind(T.min(first_x + c * COLUMNS + place, args.m32 - 1)) for c in range(s.columns)]
            sums = _Rows(args, s, weights, x_rows)
        else:
            sums = _Words(args, s, weights, rows, warp, place, t)
        peeled = _PEELED if sums.turns == 1 else sums.turns
        followed = max(0, turns - weights.ahead) if turns <= peeled else turns
        followed -= followed % sums.turns
        weights.begin(turns, early=True)
        wait_for_grids(args, loops=followed if max_rows is None else 0)  # few rows have few sums to finish
        sums.begin()

        def one_turn(turn: Expr, number: int, left: int | None) -> None:
            weights.advance(turn, left)
            group = T.bind(turn * s.warps + warp)
            sums.advance(turn, number, last=left is not None and left < sums.turns)
            with branch(group < groups, always=groups % s.warps == 0):
                sums.add(group, number)

        with T.serial(0, followed // sums.turns, unroll=False if sums.turns > 1 else None) as many:
            for number in range(sums.turns):
                one_turn(many * sums.turns + number, number, None)
        for turn in range(followed, turns):
            one_turn(turn, turn % sums.turns, turns - 1 - turn)
        _finish(args, s, sums.values(), rows, max_rows, first_x, first, lane, warp)


def _weights(
    args: LinearArgs, s: MatrixGemvSchedule, firsts: list[Expr], g: Expr, t: Expr, warp: Expr, thread: Expr
) -> TileWeights | TileFloats:
    if isinstance(args.problem.spec, Float16Spec):
        return TileFloats(args, firsts, g, t, first=warp, step=s.warps)
    staged = {"stages": s.stages, "thread": thread, "threads": s.threads}
    return TileWeights(args, firsts, g, t, first=warp, step=s.warps, **staged)


class _Rows:
    """Sums of eight rows of x a column, and their operands: a lane reads a word's x where it meets it.

    For tile i, column c and half h (rows g and g + 8 of the tile) two values, of rows 2 t and 2 t + 1 of the column.
    """

    turns: Final = 1

    def __init__(
        self, args: LinearArgs, s: MatrixGemvSchedule, weights: TileWeights | TileFloats, x_rows: list[Expr]
    ) -> None:
        self._args, self._s, self._weights, self._x_rows = args, s, weights, x_rows
        self._total = zeros(s.tiles * s.columns * 4)
        self._x = local(8, "float16")

    def begin(self) -> None:
        pass

    def advance(self, turn: Expr, number: int, *, last: bool) -> None:
        pass

    def add(self, group: Expr, number: int) -> None:
        """total += scale * (W - z) x over one group."""
        s, x = self._s, self._x
        acc = zeros(s.tiles * s.columns * 4)
        a, b = local(s.tiles * 8, "uint32"), local(4, "uint32")
        for w in range(self._weights.words):
            self._weights.decode(w, a, scaled=False)
            for c, x_row in enumerate(self._x_rows):
                k = group * self._weights.group + self._weights.place_of(w)
                T.buffer_store(x, self._args.x[x_row, ramp(k, 8)], [ramp(0, 8)])
                self._weights.pair(b, 0, x, 0)
                for i in range(s.tiles):
                    _multiply(acc, (i * s.columns + c) * 4, a, i * 8, b, 0)
        for i, half in ((i, half) for i in range(s.tiles) for half in range(2)):
            for c, column in ((c, column) for c in range(s.columns) for column in range(2)):
                at = (i * s.columns + c) * 4 + half * 2 + column
                T.buffer_store(self._total, self._total[at] + self._weights.scaled(acc[at], i * 2 + half), [at])

    def values(self) -> list[Expr]:
        return [self._total[i] for i in range(self._s.tiles * self._s.columns * 4)]


class _Words:
    """Sums of fewer rows, whose words stand side by side in the columns, and their operands.

    `turns`: over so many groups of a warp the words of one read reach. The words of the next read are on their way.
    """

    def __init__(
        self,
        args: LinearArgs,
        s: MatrixGemvSchedule,
        weights: TileWeights | TileFloats,
        rows: int,
        warp: Expr,
        g: Expr,
        t: Expr,
    ) -> None:
        self._args, self._s, self._weights, self._warp, self._t = args, s, weights, warp, t
        self._side = COLUMNS // rows
        self.turns: Final = max(1, self._side // weights.words)
        self._apart: Final = min(self._side, weights.words) // 2  # lanes that hold words of one row and group
        self._row, self._slot = T.bind(T.min(g // self._side, args.m32 - 1)) if rows > 1 else 0, T.bind(g % self._side)
        self._reads = self.turns * weights.words // self._side
        self._ahead, self._b = local(self._reads * 8, "float16"), local(self._reads * 4, "uint32")
        self._total = zeros(s.tiles * 2 * self.turns)

    def begin(self) -> None:
        self._read(0)

    def advance(self, turn: Expr, number: int, *, last: bool) -> None:
        """x of this turn is the current one, and a later one is read unless this is the last."""
        if number:
            return
        for read in range(self._reads):
            self._weights.pair(self._b, read * 4, self._ahead, read * 8)
        if not last:
            self._read(turn + self.turns)

    def _read(self, turn: Expr) -> None:
        weights = self._weights
        last = self._args.problem.k // weights.group - 1
        for read in range(self._reads):
            word = T.bind(read * self._side + self._slot) if self.turns == 1 else self._slot
            group = T.bind(T.min((turn + word // weights.words) * self._s.warps + self._warp, last))
            x = self._args.x[self._row, ramp(group * weights.group + weights.place_of(word % weights.words), 8)]
            T.buffer_store(self._ahead, x, [ramp(read * 8, 8)])

    def add(self, group: Expr, number: int) -> None:
        """total += scale * (W - z) x over one group, of `number` in a read."""
        tiles, apart, words = self._s.tiles, self._apart, self._weights.words
        a, partial = local(8, "uint32"), zeros(tiles * 2 * apart)
        for i, w in ((i, w) for i in range(tiles) for w in range(words)):
            self._weights.decode(w, a, scaled=False, tile=i)
            slot, acc = (number * words + w) % self._side, zeros(4)
            _multiply(acc, 0, a, 0, self._b, (number * words + w) // self._side * 4)
            for half in range(2):
                at = (i * 2 + half) * apart + slot // 2 % apart
                T.buffer_store(partial, partial[at] + acc[half * 2 + slot % 2], [at])
        for row in range(tiles * 2):
            kept = partial[row] if apart == 1 else T.Select(self._t % 2 == 0, partial[row * 2], partial[row * 2 + 1])
            at = row * self.turns + number
            T.buffer_store(self._total, self._total[at] + self._weights.scaled(kept, row), [at])

    def values(self) -> list[Expr]:
        """One of a tile's row: of row 4 t / side of x, added up over the lanes that share it where t is the first."""
        total = []
        for row in range(self._s.tiles * 2):
            kept = self._total[row * self.turns]
            for number in range(1, self.turns):  # of this one's words the lane's column holds x
                mine = self._t % (self._side // 2) // self._apart == number
                kept = T.Select(mine, self._total[row * self.turns + number], kept)
            total.append(kept)
        return sum_over_threads(total, self._t, self._side // 2, 32)


def _multiply(acc: Buffer, at: int, a: Buffer, a_at: int, b: Buffer, b_at: int) -> None:
    """The 16 weights of a word of two rows times those of x."""
    for step in range(2):
        operands = ((acc, at), (a, a_at + step * 4), (b, b_at + step * 2))
        call("awq_mma_m16n8k16_f16f32", *(pointer(*operand) for operand in operands))


def _finish(
    args: LinearArgs,
    s: MatrixGemvSchedule,
    values: list[Expr],
    rows: int,
    max_rows: int | None,
    first_x: Expr,
    first: Expr,
    lane: Expr,
    warp: Expr,
) -> None:
    """Adds the warps' sums and stores what lies within M and N."""
    problem = args.problem
    pairs = problem.epilogue.activation == "silu_mul"
    outputs, wide = ROWS // 2 if pairs else ROWS, rows == COLUMNS
    columns, each = (s.columns, 2) if wide else (1, 1)  # a lane's values of a tile's row: columns times each
    if s.stages > 1:  # sums may lie where words did
        call("awq_cp_async_wait_0")
        barrier()
    shared = T.alloc_buffer((s.warps * len(values) * 32,), "float32", scope="shared")
    for i, value in enumerate(values):
        T.buffer_store(shared, value, [(warp * len(values) + i) * 32 + lane])
    barrier()
    # One result, or a gate and its up, for a lane of one warp, in turn.
    items = [
        (i, c, half, column)
        for i in range(s.tiles)
        for c in range(columns)
        for half in range(1 if pairs else 2)
        for column in range(each)
    ]
    for number, (i, c, half, column) in enumerate(items):
        with branch(warp == number % s.warps, always=s.warps == 1):

            def summed(part: int, at: int = (i * columns + c) * 2 * each + column) -> Expr:
                value = Registers(1)
                value[0] = shared[(at + part * each) * 32 + lane]
                for other in range(1, s.warps):
                    value[0] = value[0] + shared[(other * len(values) + at + part * each) * 32 + lane]
                return value[0]

            gate, value = (summed(0), summed(1)) if pairs else (None, summed(half))
            t, n = lane % 4, T.bind(first + i * outputs + half * 8 + lane // 4)
            m = T.bind(first_x + c * COLUMNS + t * 2 + column if wide else t * rows // 4)
            inside = tirx.all(m < (args.m32 if rows > 1 else 1), wide or t * rows % 4 == 0)
            if problem.n % (outputs * s.tiles):
                inside = tirx.all(inside, n < problem.n)
            with T.If(inside), T.Then():
                T.buffer_store(args.y, args.finish(m, n, value, gate), [m, n])
