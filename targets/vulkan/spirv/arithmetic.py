"""Operations on TensorIR values, whatever their lanes: a `Value` is a row of SPIR-V scalars and vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from awq_compile.errors import CompileError
from awq_compile.targets.vulkan.spirv.builder import Builder
from awq_compile.targets.vulkan.spirv.enums import Glsl, Op
from awq_compile.targets.vulkan.spirv.types import BOOL, FLOAT32, UINT32, DType


@dataclass(frozen=True, slots=True)
class Value:
    """`ids` are vectors of the widths `dtype.widths`, or scalars for a width of 1."""

    dtype: DType
    ids: tuple[int, ...]


# (int, uint, float, bool)
_BINARY: Final[dict[str, tuple[Op | None, Op | None, Op | None, Op | None]]] = {
    "add": (Op.I_ADD, Op.I_ADD, Op.F_ADD, None),
    "sub": (Op.I_SUB, Op.I_SUB, Op.F_SUB, None),
    "mul": (Op.I_MUL, Op.I_MUL, Op.F_MUL, Op.LOGICAL_AND),
    "div": (Op.S_DIV, Op.U_DIV, Op.F_DIV, None),
    "and": (Op.BITWISE_AND, Op.BITWISE_AND, None, Op.LOGICAL_AND),
    "or": (Op.BITWISE_OR, Op.BITWISE_OR, None, Op.LOGICAL_OR),
    "xor": (Op.BITWISE_XOR, Op.BITWISE_XOR, None, Op.LOGICAL_NOT_EQUAL),
    "shl": (Op.SHIFT_LEFT_LOGICAL, Op.SHIFT_LEFT_LOGICAL, None, None),
    "shr": (Op.SHIFT_RIGHT_ARITHMETIC, Op.SHIFT_RIGHT_LOGICAL, None, None),
    "lt": (Op.S_LESS_THAN, Op.U_LESS_THAN, Op.F_ORD_LESS_THAN, None),
    "le": (Op.S_LESS_THAN_EQUAL, Op.U_LESS_THAN_EQUAL, Op.F_ORD_LESS_THAN_EQUAL, None),
    "gt": (Op.S_GREATER_THAN, Op.U_GREATER_THAN, Op.F_ORD_GREATER_THAN, None),
    "ge": (Op.S_GREATER_THAN_EQUAL, Op.U_GREATER_THAN_EQUAL, Op.F_ORD_GREATER_THAN_EQUAL, None),
    "eq": (Op.I_EQUAL, Op.I_EQUAL, Op.F_ORD_EQUAL, Op.LOGICAL_EQUAL),
    "ne": (Op.I_NOT_EQUAL, Op.I_NOT_EQUAL, Op.F_UNORD_NOT_EQUAL, Op.LOGICAL_NOT_EQUAL),
}
_COMPARISONS: Final = ("lt", "le", "gt", "ge", "eq", "ne")
_COLUMN: Final = {"int": 0, "uint": 1, "float": 2, "bool": 3}


class Arithmetic:
    """Emits operations through a builder."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.types = builder.types

    # --- making and taking apart

    def constant(self, dtype: DType, value: float) -> Value:
        """The same constant in every lane."""
        if dtype.kind == "bool":
            scalar = self.types.boolean(bool(value))
        elif dtype.kind == "float":
            scalar = self.types.floating(dtype, value)
        else:
            scalar = self.types.integer(dtype, int(value))
        return Value(dtype, tuple(self.types.splat(dtype, scalar, width) for width in dtype.widths))

    def scalars(self, value: Value) -> list[int]:
        """The id of each lane."""
        self._use(value.dtype, vectors_only=True)
        kind, found = self.types.vector(value.dtype, 1), []
        for part, width in zip(value.ids, value.dtype.widths, strict=True):
            if width == 1:
                found.append(part)
            else:
                found += [self.builder.pure(Op.COMPOSITE_EXTRACT, kind, part, i) for i in range(width)]
        return found

    def gather(self, dtype: DType, scalars: Sequence[int]) -> Value:
        """A value of `dtype` from the id of each lane."""
        self._use(dtype, vectors_only=True)
        ids, start = [], 0
        for width in dtype.widths:
            part = scalars[start : start + width]
            kind = self.types.vector(dtype, width)
            ids.append(part[0] if width == 1 else self.builder.pure(Op.COMPOSITE_CONSTRUCT, kind, *part))
            start += width
        return Value(dtype, tuple(ids))

    def broadcast(self, value: Value, lanes: int) -> Value:
        """`lanes` copies; of a vector, one behind the other."""
        return self.gather(value.dtype.with_lanes(value.dtype.lanes * lanes), self.scalars(value) * lanes)

    # --- operations

    def binary(self, name: str, a: Value, b: Value) -> Value:
        """An operation of the table above, lane by lane; comparisons give bools."""
        op = _BINARY[name][_COLUMN[a.dtype.kind]]
        if op is None and name in _COMPARISONS:  # bools ordered as 0 and 1
            number = UINT32.with_lanes(a.dtype.lanes)
            return self.binary(name, self.cast(number, a), self.cast(number, b))
        if op is None:
            raise CompileError(f"Vulkan: {name} is not defined for {a.dtype}")
        result = BOOL.with_lanes(a.dtype.lanes) if name in _COMPARISONS else a.dtype
        return self._each(op, result, a, b)

    def mod(self, a: Value, b: Value) -> Value:
        """Remainder of the division that rounds to zero."""
        if a.dtype.kind == "uint":
            return self._each(Op.U_MOD, a.dtype, a, b)
        if a.dtype.kind == "float":
            return self._each(Op.F_REM, a.dtype, a, b)
        # Vulkan leaves OpSRem of a negative number open.
        return self.binary("sub", a, self.binary("mul", self.binary("div", a, b), b))

    def floor_div(self, a: Value, b: Value) -> Value:
        """Quotient rounded down."""
        if a.dtype.kind == "float":
            return self.glsl(Glsl.FLOOR, self.binary("div", a, b))
        quotient = self.binary("div", a, b)
        if a.dtype.kind == "uint":
            return quotient
        one = self.constant(a.dtype, 1)
        return self.select(self._rounded_up(a, b), self.binary("sub", quotient, one), quotient)

    def floor_mod(self, a: Value, b: Value) -> Value:
        """Remainder with the sign of the divisor."""
        if a.dtype.kind == "float":
            return self.binary("sub", a, self.binary("mul", self.floor_div(a, b), b))
        rest = self.mod(a, b)
        if a.dtype.kind == "uint":
            return rest
        return self.select(self._rounded_up(a, b), self.binary("add", rest, b), rest)

    def _rounded_up(self, a: Value, b: Value) -> Value:
        """Whether a / b rounded to zero lies above the exact quotient."""
        zero, rest = self.constant(a.dtype, 0), self.mod(a, b)
        differ = self.binary("xor", self.binary("lt", rest, zero), self.binary("lt", b, zero))
        return self.binary("and", differ, self.binary("ne", rest, zero))

    def bitwise_not(self, a: Value) -> Value:
        return self._each(Op.LOGICAL_NOT if a.dtype.kind == "bool" else Op.NOT, a.dtype, a)

    def minimum(self, a: Value, b: Value) -> Value:
        return self.select(self.binary("lt", a, b), a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        return self.select(self.binary("gt", a, b), a, b)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """Lane by lane; one condition may choose all lanes."""
        if a.ids == b.ids:
            return a
        if condition.dtype.lanes != a.dtype.lanes:
            condition = self.broadcast(condition, a.dtype.lanes)
        return self._each(Op.SELECT, a.dtype, condition, a, b)

    def glsl(self, instruction: Glsl, *operands: Value) -> Value:
        """A function of GLSL.std.450 with the type of its first operand."""
        dtype = operands[0].dtype
        self._use(dtype)
        return self._parts(dtype, lambda kind, *ids: self.builder.glsl(instruction, kind, *ids), *operands)

    # --- conversions

    def cast(self, to: DType, value: Value) -> Value:
        """To another type of as many lanes; float to integer rounds to zero, to bool asks whether it is not 0."""
        have, to = value.dtype, to.with_lanes(value.dtype.lanes) if to.lanes == 1 else to
        if to == have:
            return value
        if to.lanes != have.lanes:
            raise CompileError(f"Vulkan: cannot cast {have} to {to}")
        if to.kind == "bool":
            return self.binary("ne", value, self.constant(have, 0))
        if have.kind == "bool":
            return self.select(value, self.constant(to, 1), self.constant(to, 0))
        if have.kind == "float":
            if to.kind == "float":
                return self._convert(Op.F_CONVERT, to, value)
            # 8- and 16-bit results wrap where a direct conversion would be undefined
            wide = DType(to.kind, 32, to.lanes) if to.bits < 32 else to
            signed = to.kind == "int" or to.bits < 32
            result = self._each(Op.CONVERT_F_TO_S if signed else Op.CONVERT_F_TO_U, wide, value)
            return self.cast(to, result)
        if to.kind == "float":
            self._use(have)
            return self._each(Op.CONVERT_S_TO_F if have.kind == "int" else Op.CONVERT_U_TO_F, to, value)
        if to.bits == have.bits:
            return Value(to, value.ids)
        widen_signed = to.bits > have.bits and have.kind == "int"
        return self._convert(Op.S_CONVERT if widen_signed else Op.U_CONVERT, to, value)

    def bitcast(self, to: DType, value: Value) -> Value:
        """The same bits as another type; sizes of all lanes must agree."""
        have = value.dtype
        if to.lanes * to.bits != have.lanes * have.bits or "bool" in (to.kind, have.kind):
            raise CompileError(f"Vulkan: cannot reinterpret {have} as {to}")
        if to.bits == have.bits and to.kind != "float" and have.kind != "float":
            return Value(to, value.ids)
        self._use(have)
        if to.bits == have.bits:
            return self._each(Op.BITCAST, to, value)
        wide, narrow = (to, have) if to.bits > have.bits else (have, to)
        ratio = wide.bits // narrow.bits
        if ratio == 8:  # no vector has 8 components
            middle = DType("uint", 32, 2 * wide.lanes)
            return self.bitcast(to, self.bitcast(middle, value))
        self._use(to)
        group = narrow.element.with_lanes(ratio)
        scalars, found = self.scalars(value), []
        if wide is to:
            for start in range(0, have.lanes, ratio):
                part = self.gather(group, scalars[start : start + ratio]).ids[0]
                found.append(self.builder.pure(Op.BITCAST, self.types.vector(to, 1), part))
        else:
            for scalar in scalars:
                part = self.builder.pure(Op.BITCAST, self.types.vector(narrow, ratio), scalar)
                found += self.scalars(Value(group, (part,)))
        return self.gather(to, found)

    # --- how

    def _use(self, dtype: DType, *, vectors_only: bool = False) -> None:
        if not vectors_only or dtype.lanes > 1:
            self.types.use(dtype)

    def _each(self, op: Op, result: DType, *operands: Value) -> Value:
        """`op` on each part, which computes with the operands' and the result's type."""
        for dtype in (result, *[o.dtype for o in operands]):
            self.types.use(dtype)
        return self._parts(result, lambda kind, *ids: self.builder.pure(op, kind, *ids), *operands)

    def _convert(self, op: Op, result: DType, value: Value) -> Value:
        """Like `_each`, for conversions that 8- and 16-bit storage alone allows."""
        return self._parts(result, lambda kind, *ids: self.builder.pure(op, kind, *ids), value)

    def _parts(self, result: DType, emit: Callable[..., int], *operands: Value) -> Value:
        vector = self.types.vector
        parts = zip(result.widths, *[o.ids for o in operands], strict=True)
        return Value(result, tuple(emit(vector(result, width), *ids) for width, *ids in parts))


def in_float32(arithmetic: Arithmetic, function: Callable[..., Value], *operands: Value) -> Value:
    """`function` computed in float32, for types that it does not take."""
    dtype = operands[0].dtype
    if dtype.bits == 32:
        return function(*operands)
    wide = FLOAT32.with_lanes(dtype.lanes)
    return arithmetic.cast(dtype, function(*[arithmetic.cast(wide, o) for o in operands]))
