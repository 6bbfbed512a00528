"""Index expressions: what divides them, and their value as 32-bit numbers.

A storage buffer has fewer than 2^32 elements, so an index is needed modulo 2^32 only, and sums and
products of 64-bit terms are computed on their low words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

from awq_compile.targets.vulkan.spirv.arithmetic import Arithmetic, Value
from awq_compile.targets.vulkan.spirv.enums import Op
from awq_compile.targets.vulkan.spirv.types import UINT32, parse_dtype


@dataclass(frozen=True)
class Run:
    """Scalars `start * scale + offset`, and the `count - 1` behind it; `start` is an expression or a value."""

    start: Any
    scale: int
    offset: int
    count: int


class IndexEmitter:
    """`visit` gives the value of any expression; `multiples` what is known of variables."""

    def __init__(self, arithmetic: Arithmetic, visit: Callable[[Any], Value]) -> None:
        self.arithmetic = arithmetic
        self.visit = visit
        self.multiples: dict[int, int] = {}  # by the variable's hash, its address
        self._kind = arithmetic.types.vector(UINT32, 1)

    def runs(self, index: Any, lanes: int) -> Iterator[Run]:
        """The runs of scalars that an access at `index` to elements of `lanes` touches."""
        name = type(index).__name__
        count = parse_dtype(index.ty.dtype).lanes
        if count == 1:
            yield Run(index, lanes, 0, lanes)
        elif name == "Ramp" and type(index.stride).__name__ == "IntImm":
            stride = int(index.stride.value)
            if stride == 1:
                yield Run(index.base, lanes, 0, count * lanes)
            else:
                yield from (Run(index.base, lanes, i * stride * lanes, lanes) for i in range(count))
        else:
            low = self.arithmetic.cast(UINT32, self.visit(index))
            yield from (Run(scalar, lanes, 0, lanes) for scalar in self.arithmetic.scalars(low))

    def multiple(self, e: Any) -> int:
        """A number that divides `e`; 0 where `e` is 0."""
        if isinstance(e, int):
            return 1
        match type(e).__name__:
            case "IntImm":
                return abs(int(e.value))
            case "Var":
                return self.multiples.get(hash(e), 1)
            case "Mul":
                return self.multiple(e.a) * self.multiple(e.b)
            case "Add" | "Sub":
                return gcd(self.multiple(e.a), self.multiple(e.b))
            case "LShift" if type(e.b).__name__ == "IntImm":
                return self.multiple(e.a) << int(e.b.value)
            case "BitwiseAnd" if type(e.b).__name__ == "IntImm":
                mask = int(e.b.value)
                return mask & -mask if mask > 0 else 1
            case "Select":
                return gcd(self.multiple(e.true_value), self.multiple(e.false_value))
            case "Cast" if parse_dtype(e.ty.dtype).is_integer and parse_dtype(e.value.ty.dtype).is_integer:
                # a narrower type keeps powers of two only
                known = self.multiple(e.value)
                return known if parse_dtype(e.ty.dtype).bits >= parse_dtype(e.value.ty.dtype).bits else known & -known
        return 1

    def emit(self, e: Any, divisor: int = 1) -> int:
        """The low 32 bits of `e / divisor`; `divisor` is a power of two that divides `e`."""
        if isinstance(e, int):
            return e
        pure, name = self.arithmetic.builder.pure, type(e).__name__
        if name == "IntImm":
            return self.arithmetic.types.integer(UINT32, int(e.value) // divisor)
        if name in ("Add", "Sub") and (
            divisor == 1 or self.multiple(e.a) % divisor == self.multiple(e.b) % divisor == 0
        ):
            op = Op.I_ADD if name == "Add" else Op.I_SUB
            return pure(op, self._kind, self.emit(e.a, divisor), self.emit(e.b, divisor))
        if name == "Mul":
            left = gcd(self.multiple(e.a), divisor)
            if self.multiple(e.b) % (divisor // left) == 0:
                a, b = self.emit(e.a, left), self.emit(e.b, divisor // left)
                return a if b == self.arithmetic.types.integer(UINT32, 1) else pure(Op.I_MUL, self._kind, a, b)
        if name == "Cast" and divisor == 1 and self._widens(e):
            return self.emit(e.value)
        value = self.visit(e)
        if divisor > 1:
            shift = self.arithmetic.constant(value.dtype, divisor.bit_length() - 1)
            value = self.arithmetic.binary("shr", value, shift)
        return self.arithmetic.cast(UINT32, value).ids[0]

    def _widens(self, e: Any) -> bool:
        """Whether a cast keeps the low 32 bits of what it casts."""
        to, have = parse_dtype(e.ty.dtype), parse_dtype(e.value.ty.dtype)
        return to.is_integer and have.is_integer and min(to.bits, have.bits) >= 32

    def scaled(self, value: int, factor: int) -> int:
        """`value * factor`"""
        if factor == 1:
            return value
        return self.arithmetic.builder.pure(Op.I_MUL, self._kind, value, self.arithmetic.types.integer(UINT32, factor))

    def plus(self, value: int, constant: int) -> int:
        """`value + constant`"""
        if constant == 0:
            return value
        return self.arithmetic.builder.pure(
            Op.I_ADD, self._kind, value, self.arithmetic.types.integer(UINT32, constant)
        )
