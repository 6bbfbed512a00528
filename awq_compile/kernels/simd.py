"""Vector expressions of TensorIR, and how a vector machine decodes packed weights.

Everything here builds straight-line vector code inside an open `tvm.script` IR builder: explicit lanes
instead of vectorised loops, so that the instructions are those written down. TensorIR broadcasts a scalar
that meets a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import BLOCK, Float16Spec, QuantSpec, WeightSpec

Expr = Any
Buffer = Any


def ramp(base: Expr, lanes: int, stride: int = 1) -> Expr:
    """Indices base, base + stride, …"""
    return base if lanes == 1 else T.ramp(base, stride, lanes)


def cast(dtype: str, value: Expr, lanes: int) -> Expr:
    """Lane-wise conversion."""
    return tirx.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def zeros(lanes: int) -> Expr:
    """A float32 vector of zeros."""
    return tirx.const(0, "float32") if lanes == 1 else tirx.Broadcast(tirx.const(0, "float32"), lanes)


def total(value: Expr, lanes: int) -> Expr:
    """Sum of the lanes, by halves."""
    while lanes > 1:
        half = lanes // 2
        low, high = list(range(half)), list(range(half, lanes))
        value = T.bind(tirx.Shuffle([value], low) + tirx.Shuffle([value], high))
        lanes = half
    return value


def prefetch(buffer: Buffer, row: Expr, column: Expr) -> Expr:
    """Fetches a cache line for reading; an address outside the buffer is ignored by the machine."""
    address = tirx.address_of(buffer[row, column])
    read, locality, data = (tirx.const(value, "int32") for value in (0, 3, 1))
    return tirx.call_llvm_intrin("void", "llvm.prefetch", address, read, locality, data)


def repeat_each(value: Expr, lanes: int, times: int) -> Expr:
    """Lanes a b c → a a … b b … c c …, each `times` times."""
    if times == 1:
        return value
    if lanes == 1:
        return tirx.Broadcast(value, times)
    return tirx.Shuffle([value] * times, [lane for lane in range(lanes) for _ in range(times)])


@dataclass(frozen=True)
class RowReader:
    """Reads one row of W in steps of `step` elements along K, as products with x arranged to match.

    A step has `parts` vectors of `lanes` weights; vector p of a step meets the elements `x_index(p)` of
    the step. Codes of 4 and 8 bits are not shifted down but masked in place: a code q at bit b of its word
    becomes the float q * 2^b exactly, and `x_scale(p)` = 2^-b is multiplied into the arranged x once, for
    all rows. Codes of 3 bits are shifted lane by lane out of a broadcast word.
    """

    spec: WeightSpec
    k: int
    lanes: int

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return self.spec.bits if isinstance(self.spec, QuantSpec) else 16

    @property
    def per_word(self) -> int:
        """Codes of a word that are masked in place; 1 where lanes run along elements."""
        return 32 // self.bits if self.bits in (4, 8) else 1

    @property
    def step(self) -> int:
        """Elements of K per step: whole vectors and whole groups, whichever is longer."""
        chunk = self.lanes * self.per_word
        return max(chunk, self.spec.group) if isinstance(self.spec, QuantSpec) else chunk

    @property
    def parts(self) -> int:
        """Vectors per step."""
        return self.step // self.lanes

    @property
    def groups(self) -> int:
        """Scale groups per step; 0 for float16 weights, which have none."""
        return self.step // self.spec.group if isinstance(self.spec, QuantSpec) else 0

    def x_index(self, part: int) -> tuple[int, int]:
        """(first, stride) of the elements of x, within a step, that vector `part` meets."""
        chunk, j = divmod(part, self.per_word)
        return chunk * self.lanes * self.per_word + j, self.per_word

    def x_scale(self, part: int) -> float:
        """Power of two that undoes the position of the codes of vector `part` within their words."""
        j = part % self.per_word
        return 1.0 if j == self.per_word - 1 else 2.0 ** (-j * self.bits)

    def words(self, step: Expr) -> Expr:
        """Index, within a row, of the first word (float16 value) of a step."""
        return step * (self.step // BLOCK * self.bits if isinstance(self.spec, QuantSpec) else self.step)

    def load(self, weight: Buffer, row: Expr, step: Expr) -> list[Expr]:
        """The step's words (float16 values) of a row: vectors of them, or single ones to be broadcast."""
        if isinstance(self.spec, Float16Spec):
            return [T.bind(weight[row, ramp(step * self.step, self.lanes)])]
        words = self.step // BLOCK * self.bits
        lanes = self.lanes if self.per_word > 1 else 1
        return [T.bind(weight[row, ramp(step * words + i, lanes)]) for i in range(0, words, lanes)]

    def values(self, words: list[Expr], part: int) -> Expr:
        """Vector `part` of the step as float32: codes divided by `x_scale`, or float16 weights."""
        if isinstance(self.spec, Float16Spec):
            return cast("float32", words[part], self.lanes)
        if self.per_word == 1:
            return cast("float32", cast("int32", self._shifted(words, part * self.lanes), self.lanes), self.lanes)
        chunk, j = divmod(part, self.per_word)
        # The topmost code would be negative as int32, and unsigned conversion needs AVX-512.
        if j == self.per_word - 1:
            code = words[chunk] >> (self.bits * j)
        else:
            code = words[chunk] & tirx.const(((1 << self.bits) - 1) << (self.bits * j), "uint32")
        return cast("float32", cast("int32", code, self.lanes), self.lanes)

    def _shifted(self, words: list[Expr], element: int) -> Expr:
        """Codes of `lanes` elements from `element` on, plane by plane; no plane's vector crosses a word."""
        block, first = divmod(element, BLOCK)
        base, shift, value = block * self.bits, 0, None
        for width in self.spec.layout.planes:  # type: ignore[union-attr]
            per_word = BLOCK // width
            word = words[base + first // per_word]
            places = T.ramp(tirx.const(first % per_word * width, "uint32"), tirx.const(width, "uint32"), self.lanes)
            part = (tirx.Broadcast(word, self.lanes) >> places) & ((1 << width) - 1)
            value = part if value is None else value | (part << shift)
            base, shift = base + width, shift + width
        return value


def row_reader(spec: WeightSpec, k: int, lanes: int) -> RowReader:
    """The reader with the widest vectors, `lanes` at most, whose steps divide `k`."""
    while lanes > 1 and k % RowReader(spec, k, lanes).step:
        lanes //= 2
    return RowReader(spec, k, lanes)


def decode(spec: WeightSpec, word: Callable[[int], Expr], element: int, scale: Expr, shift: Expr, lanes: int) -> Expr:
    """Weight `element` of a block of 32 in `lanes` rows at once: q s - z s, with `shift` = z s.

    `word(i)` is word i of the block (for float16, weight i) in each row.
    """
    if isinstance(spec, Float16Spec):
        return cast("float32", word(element), lanes)
    code = cast("int32", spec.layout.code(word, element), lanes)
    return cast("float32", code, lanes) * scale - shift
