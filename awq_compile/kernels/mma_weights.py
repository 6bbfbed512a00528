"""W on its way to tensor cores: a lane's packed words of 16-row tiles, those of the next group, and the decoded pairs.

The order along K, and which words a lane reads, are those of `mma_gemv`. A decoded weight times its scale is rounded
to float16, as it is where weights are dequantised in memory.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import LinearArgs
from awq_compile.kernels.mma_gemv import GROUP
from awq_compile.kernels.simd import ramp

Expr = Any
Buffer = Any

WORDS: Final = 4  # that a lane reads of a group


class TileWeights:
    """`rows`: of each tile the rows g and g + 8 of W, for the lane with g = lane / 4 and t = lane % 4."""

    def __init__(self, args: LinearArgs, rows: list[Expr], t: Expr) -> None:
        spec = args.problem.spec
        assert isinstance(spec, QuantSpec)
        self._args, self._spec, self._rows, self._t = args, spec, rows, t
        self._groups = args.problem.k // GROUP
        self._words, self._words_ahead = (local(len(rows) * WORDS, "uint32") for _ in range(2))
        self._scales, self._scales_ahead = (local(len(rows), "float16") for _ in range(2))
        self._zeros, self._zeros_ahead = (local(len(rows), "uint32") for _ in range(2))
        self._decoded = local(4, "uint32")

    def fetch(self, group: Expr) -> None:
        """Reads a group ahead."""
        weight = self._args.weight
        for i, row in enumerate(self._rows):
            at = ramp((group * 4 + self._t) * WORDS, WORDS)
            T.buffer_store(self._words_ahead, weight[self._args.codes][row, at], [ramp(i * WORDS, WORDS)])
            T.buffer_store(self._scales_ahead, weight["q_scale"][row, group], [i])
            zero = self._spec.zero if self._spec.symmetric else weight["q_zero"][row, group]
            T.buffer_store(self._zeros_ahead, tirx.Cast("uint32", zero), [i])

    def advance(self, group: Expr) -> None:
        """`group`, which was read ahead, is the current one; the next is read, after the last that one again."""
        for i in range(len(self._rows)):
            at = ramp(i * WORDS, WORDS)
            T.buffer_store(self._words, self._words_ahead[at], [at])
            T.buffer_store(self._scales, self._scales_ahead[i], [i])
            T.buffer_store(self._zeros, self._zeros_ahead[i], [i])
        self.fetch(T.min(group + 1, self._groups - 1))

    def decode(self, word: int, a: Buffer) -> None:
        """Fills `a` with the operands of two instructions a tile, 4 registers each: a word's 8 weights of every row."""
        for row in range(len(self._rows)):
            tile, half = divmod(row, 2)
            call("awq_decode_u4", pointer(self._decoded, 0), self._words[row * WORDS + word], self._zeros[row])
            call("awq_scale_f16", pointer(self._decoded, 0), pointer(self._scales, row))
            for pair in range(4):  # a[0], a[2] of the first instruction, then of the second
                T.buffer_store(a, self._decoded[pair], [tile * 8 + pair // 2 * 4 + pair % 2 * 2 + half])


def local(count: int, dtype: str) -> Buffer:
    """Registers."""
    return T.alloc_buffer((count,), dtype, scope="local")


def pointer(buffer: Buffer, offset: Expr) -> Expr:
    """Address of an element. To TVM shared memory is only read, else it would add a barrier at every call."""
    return buffer.access_ptr("r" if buffer.scope() == "shared" else "rw", offset=offset)


def call(name: str, *arguments: Expr) -> None:
    """Calls a device function."""
    T.evaluate(tirx.call_extern("void", name, *arguments))


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
        m = T.bind(first_x + c * 8 + t * 2 + column)
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
