"""W on its way to tensor cores: a lane's packed words of 16-row tiles, those of the next group, and the decoded pairs.

W is A of `mma.m16n8k16`. Lane l, with g = l / 4 and t = l % 4, holds A's rows g and g + 8. In which order the 16 steps
along K are taken is free as long as A and B agree, so a lane decodes whole words: of a group of 128 weights it reads
the 32 from 32 t on, 16 bytes, and its word w holds the pairs (8 w + a, 8 w + a + 4), a < 4, that two instructions take.
With `silu_mul`, A's upper 8 rows are gates and its lower 8 the ups.

float16 weights need no decoding: of a group of 64 a lane reads the 8 from 8 t on, and the 8 from 32 + 8 t on.

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
from awq_compile.problem import MatmulProblem

Expr = Any
Buffer = Any

GROUP: Final = 128
ROWS: Final = 16  # of W in one instruction
COLUMNS: Final = 8  # of B in one instruction: rows of x, or words of fewer
WORDS: Final = 4  # that a lane reads of a group


class TileWeights:
    """INT4 in groups of 128. `firsts`: the first output of each tile; `g` and `t` are the lane's.

    In turn i the current group is `first` + i `step`; past the last group stands that one. The words of the `ahead`
    that follow wait in registers (`stages` 1), with their scales and zero points, or in the places that each of the
    block's `threads` has in shared memory, `stages` of them; a thread reads only what it wrote itself. Then scales and
    zero points are read one turn ahead, into registers.
    """

    group: Final = GROUP
    words: Final = WORDS

    def __init__(
        self,
        args: LinearArgs,
        firsts: list[Expr],
        g: Expr,
        t: Expr,
        *,
        first: Expr = 0,
        step: int = 1,
        ahead: int = 1,
        stages: int = 1,
        thread: Expr = 0,
        threads: int = 0,
    ) -> None:
        spec = args.problem.spec
        assert isinstance(spec, QuantSpec)
        self._args, self._spec, self._t = args, spec, t
        self._first, self._step, self._last = first, step, args.problem.k // GROUP - 1
        self._rows = [row for first in firsts for row in _rows(args.problem, first, g)]
        self._stages, self._thread, self._threads = stages, thread, threads
        self.ahead: Final = ahead if stages == 1 else stages - 1  # turns
        self._kept: Final = ahead if stages == 1 else 1  # groups' scales
        count = len(self._rows)
        self._words = local(count * WORDS, "uint32")
        self._waiting = (
            local(ahead * count * WORDS, "uint32")
            if stages == 1
            else T.alloc_buffer((stages * count * threads * WORDS,), "uint32", scope="shared")
        )
        self._scales, self._scales_ahead = local(count, "float16"), local(self._kept * count, "float16")
        self._zeros, self._zeros_ahead = local(count, "uint32"), local(self._kept * count, "uint32")
        self._decoded = local(4, "uint32")

    def begin(self, turns: int, *, early: bool = False) -> None:
        """Reads what the first of `turns` need. `early`: not behind `wait_for_grids` where that follows."""
        for turn in range(min(turns, self.ahead)):
            self._fetch_words(turn, turn, early=early)
        for turn in range(min(turns, self._kept)):
            self._fetch_scales(turn, turn, early=early)

    def advance(self, turn: Expr, left: int | None = None, *, slot: int = 0) -> None:
        """The group of `turn` is the current one, and a later one is read.

        `left`: turns behind this one, where it is known; the words of `ahead` are on their way. `slot`: `turn` modulo
        `ahead`, by which registers are named.
        """
        if self._stages > 1:
            call(f"awq_cp_async_wait_{self.ahead - 1 if left is None else min(left, self.ahead - 1)}")
        for i in range(len(self._rows)):
            words = self._waiting[ramp(self._place(turn, slot, i), WORDS)]
            T.buffer_store(self._words, words, [ramp(i * WORDS, WORDS)])
            kept = slot * len(self._rows) + i
            T.buffer_store(self._scales, self._scales_ahead[kept], [i])
            T.buffer_store(self._zeros, self._zeros_ahead[kept], [i])
        if left is None or left >= self.ahead:
            self._fetch_words(turn + self.ahead, slot)
        if left is None or left >= self._kept:
            self._fetch_scales(turn + self._kept, slot)

    def _group(self, turn: Expr) -> Expr:
        return T.bind(T.min(self._first + turn * self._step, self._last))

    def _fetch_words(self, turn: Expr, slot: int, *, early: bool = False) -> None:
        codes, group = self._args.weight[self._args.codes], self._group(turn)
        for i, row in enumerate(self._rows):
            # Loads of C would be put off to where they are used.
            at = codes.access_ptr("r", offset=row * codes.shape[1] + (group * 4 + self._t) * WORDS)
            name = ("awq_load_early_16" if early else "awq_load_16") if self._stages == 1 else "awq_cp_async_16"
            call(name, pointer(self._waiting, self._place(turn, slot, i)), at)
        if self._stages > 1:
            call("awq_cp_async_commit")

    def _fetch_scales(self, turn: Expr, slot: int, *, early: bool = False) -> None:
        group = self._group(turn)
        for i, row in enumerate(self._rows):
            at = self._args.weight["q_scale"].access_ptr("r", offset=row * (self._last + 1) + group)
            kept = slot * len(self._rows) + i
            call("awq_load_early_2" if early else "awq_load_2", pointer(self._scales_ahead, kept), at)
            zero = self._spec.zero if self._spec.symmetric else self._args.weight["q_zero"][row, group]
            T.buffer_store(self._zeros_ahead, tirx.Cast("uint32", zero), [kept])

    def _place(self, number: Expr, slot: int, row: int) -> Expr:
        """Of a row's words."""
        if self._stages == 1:
            return (slot * len(self._rows) + row) * WORDS
        return ((number % self._stages * len(self._rows) + row) * self._threads + self._thread) * WORDS

    def place_of(self, word: Expr) -> Expr:
        """Where in a group the lane's word begins, and what x meets it."""
        return self._t * 32 + word * 8

    def pair(self, b: Buffer, at: int, x: Buffer, x_at: int) -> None:
        """Fills `b` with the operands of two instructions: the 8 values of x that meet a word."""
        call("awq_pairs_f16", pointer(b, at), pointer(x, x_at))

    def scaled(self, value: Expr, row: int) -> Expr:
        """A sum of row g (even) or g + 8 (odd) of tile `row` / 2 over a group, times the group's scale, in float32."""
        return value * cast("float32", self._scales[row], 1)

    def decode(self, word: int, a: Buffer, *, scaled: bool, tile: int | None = None) -> None:
        """Fills `a` with the operands of two instructions a tile, 4 registers each: a word's 8 weights of every row.

        Of one `tile` alone, or of all.

        Codes without their zero points are exact. Times their scale they are rounded to float16, as where weights are
        dequantised in memory.
        """
        rows = range(len(self._rows)) if tile is None else (tile * 2, tile * 2 + 1)
        for place, row in enumerate(rows):
            call("awq_decode_u4", pointer(self._decoded, 0), self._words[row * WORDS + word], self._zeros[row])
            if scaled:
                call("awq_scale_f16", pointer(self._decoded, 0), pointer(self._scales, row))
            for pair in range(4):
                T.buffer_store(a, self._decoded[pair], [_operand(place, pair)])


class TileFloats:
    """float16 weights in the place of INT4: the words of a group of 64, and those of the next."""

    group: Final = 64
    words: Final = 2
    ahead: Final = 1

    def __init__(self, args: LinearArgs, firsts: list[Expr], g: Expr, t: Expr, *, first: Expr, step: int) -> None:
        self._args, self._t, self._first, self._step = args, t, first, step
        self._last = args.problem.k // self.group - 1
        self._rows = [row for first in firsts for row in _rows(args.problem, first, g)]
        self._size = len(self._rows) * self.words * 4
        self._words, self._waiting = local(self._size, "uint32"), local(self._size, "uint32")

    def begin(self, turns: int, *, early: bool = False) -> None:
        """Reads what the first of `turns` needs. `early`: not behind `wait_for_grids` where that follows."""
        self._fetch(0, early=early)

    def advance(self, turn: Expr, left: int | None = None) -> None:
        """The group of `turn` is the current one, and the next is read unless none is `left`."""
        for i in range(0, self._size, 4):
            T.buffer_store(self._words, self._waiting[ramp(i, 4)], [ramp(i, 4)])
        if left != 0:
            self._fetch(turn + 1)

    def _fetch(self, turn: Expr, *, early: bool = False) -> None:
        weight = self._args.weight[self._args.codes]
        group = T.bind(T.min(self._first + turn * self._step, self._last))
        for i, row in enumerate(self._rows):
            for word in range(self.words):
                offset = row * weight.shape[1] + group * self.group + self.place_of(word)
                name = "awq_load_early_16" if early else "awq_load_16"
                place = pointer(self._waiting, (i * self.words + word) * 4)
                call(name, place, weight.access_ptr("r", offset=offset))

    def place_of(self, word: Expr) -> Expr:
        """Where in a group the lane's word begins, and what x meets it."""
        return word * 32 + self._t * 8

    def pair(self, b: Buffer, at: int, x: Buffer, x_at: int) -> None:
        """Fills `b` with the operands of two instructions: the 8 values of x that meet a word."""
        call("awq_words_f16", pointer(b, at), pointer(x, x_at))

    def scaled(self, value: Expr, row: int) -> Expr:
        """As of `TileWeights`; these have no scale."""
        return value

    def decode(self, word: int, a: Buffer, *, scaled: bool, tile: int | None = None) -> None:
        """Fills `a` as `TileWeights` does."""
        rows = range(len(self._rows)) if tile is None else (tile * 2, tile * 2 + 1)
        for place, row in enumerate(rows):
            for pair in range(4):
                value = self._words[(row * self.words + word) * 4 + pair]
                T.buffer_store(a, value, [_operand(place, pair)])


def _operand(place: int, pair: int) -> int:
    """Where in A's registers, those of the first instruction and then of the second, a word's pair of a row stands."""
    return place // 2 * 8 + pair // 2 * 4 + pair % 2 * 2 + place % 2


def _rows(problem: MatmulProblem, first: Expr, g: Expr) -> tuple[Expr, Expr]:
    """The rows of W that are a tile's rows g and g + 8; those past N repeat the last."""
    low = T.bind(T.min(first + g, problem.n - 1))
    if problem.epilogue.activation == "silu_mul":
        return low, T.bind(low + problem.n)
    return low, T.bind(T.min(first + g + 8, problem.n - 1))


def local(count: int, dtype: str) -> Buffer:
    """Registers."""
    return T.alloc_buffer((count,), dtype, scope="local")


def zeros(count: int) -> Buffer:
    """Registers that hold 0 in float32."""
    buffer = local(count, "float32")
    for i in range(count):
        T.buffer_store(buffer, tirx.const(0, "float32"), [i])
    return buffer


def pointer(buffer: Buffer, offset: Expr) -> Expr:
    """Address of an element. To TVM shared memory is only read, else it would add a barrier at every call."""
    return buffer.access_ptr("r" if buffer.scope().startswith("shared") else "rw", offset=offset)


def call(name: str, *arguments: Expr) -> None:
    """Calls a device function."""
    T.evaluate(tirx.call_extern("void", name, *arguments))


def launch_dependents() -> None:
    """Lets the next kernel of a stream start on what this one leaves free. See `wait_for_grids`."""
    call("awq_grid_launch_dependents")


def wait_for_grids(args: LinearArgs, *, x: Buffer | None = None, loops: int = 0) -> None:
    """Waits for the kernels before this one to end; a kernel that calls it may be launched while they run.

    `x`: what it reads in the place of x.

    Before it nothing is read but W, a parameter, and nothing is written; every thread must come here. CUDA C++
    Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, "griddepcontrol".

    Buffers given to the wait keep compilers from reading them earlier, but also from reading them ahead of an earlier
    write of y. So the residual is not given where that would cost: its reads stand behind a loop of so many `loops`,
    which nothing unrolls, and do not move over it.
    """
    buffers = [args.x if x is None else x, args.y]
    if args.residual is not None and loops <= 4:
        buffers.append(args.residual)
    call("awq_grid_wait", *(buffer.access_ptr("r") for buffer in buffers))


def store_sums(
    args: LinearArgs,
    total: Buffer,
    columns: int,
    first_x: Expr,
    tiles: list[tuple[Expr, bool]],
    place: Expr,
    t: Expr,
) -> None:
    """Stores sums that lie within M and N: of each tile `columns` times 4, in the layout of the instructions.

    `tiles`: (first output, whether all of the tile's outputs are below N).
    """
    pairs = args.problem.epilogue.activation == "silu_mul"
    for c, column in ((c, column) for c in range(columns) for column in range(2)):
        m = T.bind(first_x + c * COLUMNS + t * 2 + column)
        with T.If(m < args.m32), T.Then():
            for (i, (first, whole)), part in (
                (tile, part) for tile in enumerate(tiles) for part in range(1 if pairs else 2)
            ):
                at = (i * columns + c) * 4 + column
                gate, value = (total[at], total[at + 2]) if pairs else (None, total[at + part * 2])
                n = first + part * 8 + place
                if whole:
                    T.buffer_store(args.y, args.finish(m, n, value, gate), [m, n])
                else:
                    with T.If(n < args.problem.n), T.Then():
                        T.buffer_store(args.y, args.finish(m, n, value, gate), [m, n])
