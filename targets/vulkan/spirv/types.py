"""Types and constants: each declared once per module, when first used.

Integers of both signs share one SPIR-V type, declared with signedness 0: the sign is a property of the
operation, so that casts between int32 and uint32 cost nothing.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from awq_compile.errors import CompileError
from awq_compile.targets.vulkan.spirv.assembler import Assembler, instruction
from awq_compile.targets.vulkan.spirv.enums import Capability, Decoration, Op, StorageClass

Kind = Literal["int", "uint", "float", "bool"]
_KINDS: tuple[Kind, ...] = ("uint", "int", "float", "bool")
_ARITHMETIC = {
    ("int", 8): Capability.INT8,
    ("int", 16): Capability.INT16,
    ("int", 64): Capability.INT64,
    ("float", 16): Capability.FLOAT16,
    ("float", 64): Capability.FLOAT64,
}
MAX_COMPONENTS = 4


@dataclass(frozen=True)
class DType:
    """A TensorIR type: a scalar, or `lanes` of them."""

    kind: Kind
    bits: int
    lanes: int = 1

    @cached_property
    def element(self) -> DType:
        """The scalar type."""
        return DType(self.kind, self.bits) if self.lanes > 1 else self

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """How `lanes` are split over SPIR-V vectors, which have at most 4 components."""
        full, rest = divmod(self.lanes, MAX_COMPONENTS)
        return (MAX_COMPONENTS,) * full + ((rest,) if rest else ())

    @cached_property
    def is_integer(self) -> bool:
        """int or uint."""
        return self.kind in ("int", "uint")

    @cached_property
    def bytes(self) -> int:
        """Size of the scalar in memory; a bool takes one byte."""
        return 1 if self.kind == "bool" else self.bits // 8

    def with_lanes(self, lanes: int) -> DType:
        """The same scalar, `lanes` times."""
        return DType(self.kind, self.bits, lanes)

    def __str__(self) -> str:
        name = "bool" if self.kind == "bool" else f"{self.kind}{self.bits}"
        return name if self.lanes == 1 else f"{name}x{self.lanes}"


@cache
def parse_dtype(name: str) -> DType:
    """The type that TVM writes as `name`: "float16x4"."""
    scalar, _, lanes = name.partition("x")
    kind: Kind | None = next((k for k in _KINDS if scalar.startswith(k)), None)
    bits = scalar.removeprefix(kind) if kind else ""
    if kind is None or (kind != "bool" and bits not in ("8", "16", "32", "64")) or not (lanes or "1").isdigit():
        raise CompileError(f"Vulkan: no SPIR-V type for {name}")
    return DType(kind, 1 if kind == "bool" else int(bits), int(lanes or 1))


BOOL = DType("bool", 1)
INT32 = DType("int", 32)
UINT32 = DType("uint", 32)
FLOAT32 = DType("float", 32)


class TypeTable:
    """The ids of types and constants of one module."""

    def __init__(self, assembler: Assembler) -> None:
        self._asm = assembler
        self._ids: dict[tuple[object, ...], int] = {}

    def _declare(self, key: tuple[object, ...], op: Op, *operands: int) -> int:
        """A declaration `op result operands`, once per key."""
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = self._asm.new_id()
            self._asm.globals += instruction(op, found, *operands)
        return found

    def use(self, dtype: DType) -> None:
        """Requires what computing with `dtype` needs, beyond loading, storing and converting it."""
        capability = _ARITHMETIC.get(("int" if dtype.is_integer else dtype.kind, dtype.bits))
        if capability is not None:
            self._asm.require(capability)

    def scalar(self, dtype: DType) -> int:
        """Of the element of `dtype`."""
        if dtype.bits == 64:
            self.use(dtype)
        if dtype.kind == "bool":
            return self._declare(("bool",), Op.TYPE_BOOL)
        if dtype.kind == "float":
            return self._declare(("float", dtype.bits), Op.TYPE_FLOAT, dtype.bits)
        return self._declare(("int", dtype.bits), Op.TYPE_INT, dtype.bits, 0)

    def vector(self, dtype: DType, width: int) -> int:
        """`width` elements of `dtype`, a scalar for one."""
        found = self._ids.get((dtype.kind, dtype.bits, width))
        if found is None:
            found = self.scalar(dtype)
            if width > 1:
                found = self._declare(("vector", found, width), Op.TYPE_VECTOR, found, width)
            self._ids[dtype.kind, dtype.bits, width] = found
        return found

    def void(self) -> int:
        return self._declare(("void",), Op.TYPE_VOID)

    def function(self) -> int:
        """`void()`"""
        return self._declare(("function",), Op.TYPE_FUNCTION, self.void())

    def pointer(self, storage: StorageClass, target: int) -> int:
        return self._declare(("pointer", storage, target), Op.TYPE_POINTER, storage, target)

    def array(self, element: int, length: int) -> int:
        """Of constant length, without a layout: for workgroup and function memory."""
        size = self.integer(UINT32, length)
        return self._declare(("array", element, length), Op.TYPE_ARRAY, element, size)

    def buffer(self, dtype: DType, width: int) -> int:
        """The block `{ vector data[]; }` of a storage buffer."""
        key = ("buffer", dtype.kind if dtype.kind == "float" else "int", dtype.bits, width)
        if key not in self._ids:
            if dtype.bits == 16:
                self._asm.require(Capability.STORAGE_BUFFER_16BIT_ACCESS)
            elif dtype.bits == 8:
                self._asm.require(Capability.STORAGE_BUFFER_8BIT_ACCESS, "SPV_KHR_8bit_storage")
            array = self._declare(("runtime", *key), Op.TYPE_RUNTIME_ARRAY, self.vector(dtype, width))
            self._asm.decorate(array, Decoration.ARRAY_STRIDE, dtype.bytes * width)
            block = self._declare(key, Op.TYPE_STRUCT, array)
            self._asm.decorate(block, Decoration.BLOCK)
            self._member_offset(block, 0, 0)
        return self._ids[key]

    def slots(self, members: list[DType]) -> int:
        """The block of scalar arguments: one 8-byte slot each."""
        types = [self.vector(m, 1) for m in members]
        block = self._declare(("slots",), Op.TYPE_STRUCT, *types)
        self._asm.decorate(block, Decoration.BLOCK)
        for i in range(len(members)):
            self._member_offset(block, i, 8 * i)
        return block

    def _member_offset(self, block: int, member: int, offset: int) -> None:
        self._asm.annotations += instruction(Op.MEMBER_DECORATE, block, member, Decoration.OFFSET, offset)

    def global_variable(self, storage: StorageClass, target: int) -> int:
        """A new variable outside the function."""
        pointer, found = self.pointer(storage, target), self._asm.new_id()
        self._asm.globals += instruction(Op.VARIABLE, pointer, found, storage)
        return found

    def boolean(self, value: bool) -> int:
        return self._constant(BOOL, (value,), Op.CONSTANT_TRUE if value else Op.CONSTANT_FALSE)

    def integer(self, dtype: DType, value: int) -> int:
        """A constant of the scalar of `dtype`, reduced to its bits."""
        value &= (1 << dtype.bits) - 1
        words = [value & 0xFFFFFFFF] + ([value >> 32] if dtype.bits == 64 else [])
        return self._constant(DType("int", dtype.bits), tuple(words), Op.CONSTANT, *words)

    def floating(self, dtype: DType, value: float) -> int:
        """Rounded to nearest even; beyond the range, infinite."""
        words = _float_words(dtype.bits, value)
        return self._constant(dtype.element, tuple(words), Op.CONSTANT, *words)

    def _constant(self, dtype: DType, key: tuple[int, ...], op: Op, *words: int) -> int:
        found = self._ids.get((dtype, key))
        if found is None:
            self.use(dtype)
            kind = self.vector(dtype, 1)
            found = self._ids[dtype, key] = self._asm.new_id()
            self._asm.globals += instruction(op, kind, found, *words)
        return found

    def splat(self, dtype: DType, scalar: int, width: int) -> int:
        """The constant vector of `width` times a constant scalar."""
        if width == 1:
            return scalar
        found = self._ids.get(("splat", scalar, width))
        if found is None:
            kind = self.vector(dtype, width)
            found = self._ids["splat", scalar, width] = self._asm.new_id()
            self._asm.globals += instruction(Op.CONSTANT_COMPOSITE, kind, found, *[scalar] * width)
        return found


def _float_words(bits: int, value: float) -> list[int]:
    if bits == 64:
        low, high = struct.unpack("<2I", struct.pack("<d", value))
        return [low, high]
    code, size = ("<f", "<I") if bits == 32 else ("<e", "<H")
    try:
        packed = struct.pack(code, value)
    except OverflowError:
        packed = struct.pack(code, math.copysign(math.inf, value))
    return [struct.unpack(size, packed)[0]]
