"""The same kernel with the threads of a block numbered another way: without a race, nothing changes.

CPU drivers run the threads of a block one after the other, or in vectors, from barrier to barrier. A thread then
always sees what lower ones have written, barrier or not, but not in every order. For kernels without subgroup
operations, where no number is better than another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

Words = tuple[int, ...]
Size = tuple[int, int, int]

_LOCAL_ID: Final = re.compile(r"\bget_local_id\((\d)\)")
_HEADER: Final = 5
_BOUND: Final = 3
_TYPE_VECTOR, _CONSTANT, _COMPOSITE, _FUNCTION, _LOAD, _DECORATE, _BARRIER = 23, 43, 44, 54, 61, 71, 224
_SUB, _SHIFT_RIGHT, _SHIFT_LEFT, _OR, _AND = 130, 194, 196, 197, 199
_ALL: Final = 0xFFFFFFFF
_LOCAL_INVOCATION_ID: Final = 27
_BUILT_IN: Final = 11
_SUBGROUP: Final = range(333, 367)  # OpGroupNonUniform…


def has_barrier_opencl(source: str) -> bool:
    """Whether threads of a block wait for each other."""
    return "barrier(CLK_LOCAL_MEM_FENCE);" in source or "__local " in source


def reversed_opencl(source: str) -> str:
    """OpenCL C with get_local_id(i) counted from the end."""
    return _LOCAL_ID.sub(r"(get_local_size(\1) - 1 - get_local_id(\1))", source)


def reversed_spirv(words: Words, size: Size) -> Words | None:
    """SPIR-V with LocalInvocationId counted from the end; None where it shares nothing or uses subgroups."""
    return _renumbered(words, "reverse", tuple(extent - 1 for extent in size))


def rotated_spirv(words: Words, size: Size) -> Words | None:
    """SPIR-V with the bits of LocalInvocationId.x rotated by three: neighbours fall into different vectors of 8.

    None where it shares nothing, uses subgroups, or has another number of threads along x than 16, 32, …
    """
    bits = size[0].bit_length() - 1
    if size[0] != 1 << bits or bits < 4:
        return None
    return _renumbered(words, "rotate", (bits - 3, 3, size[0] - 1))


def _renumbered(words: Words, how: str, numbers: tuple[int, ...]) -> Words | None:
    instructions = []
    at = _HEADER
    while at < len(words):
        length = words[at] >> 16
        instructions.append((words[at] & 0xFFFF, list(words[at + 1 : at + length])))
        at += length
    if any(op in _SUBGROUP for op, _ in instructions) or not any(op == _BARRIER for op, _ in instructions):
        return None
    built_in = [o[0] for op, o in instructions if op == _DECORATE and o[1:] == [_BUILT_IN, _LOCAL_INVOCATION_ID]]
    loads = [o for op, o in instructions if op == _LOAD and o[2] in built_in]
    if not loads:
        return None
    code = _Code(words[_BOUND], loads[0][0])
    code.scalar = next(o[1] for op, o in instructions if op == _TYPE_VECTOR and o[0] == code.vector)
    if how == "reverse":
        constants = [code.constant(numbers)]
    else:
        left, right, mask = numbers
        constants = [code.constant(v) for v in ((left, 0, 0), (right, 0, 0), (mask, _ALL, _ALL))]
    declared = code.words
    code.words = []
    out: list[int] = []
    for op, operands in instructions:
        if op == _FUNCTION and declared:
            out += declared
            declared = []
        if op == _LOAD and operands[2] in built_in:
            thread = code.new()
            code.words = [4 << 16 | _LOAD, code.vector, thread, operands[2]]
            if how == "reverse":
                code.operation(_SUB, operands[1], constants[0], thread)
            else:
                high = code.operation(_SHIFT_LEFT, code.new(), thread, constants[0])
                low = code.operation(_SHIFT_RIGHT, code.new(), thread, constants[1])
                both = code.operation(_OR, code.new(), high, low)
                code.operation(_AND, operands[1], both, constants[2])
            out += code.words
        else:
            out += [(len(operands) + 1) << 16 | op, *operands]
    header = list(words[:_HEADER])
    header[_BOUND] = code.bound
    return (*header, *out)


@dataclass
class _Code:
    """Instructions being written on vectors of three unsigned integers."""

    bound: int
    vector: int
    scalar: int = 0
    words: list[int] = field(default_factory=list)

    def new(self) -> int:
        self.bound += 1
        return self.bound - 1

    def constant(self, values: tuple[int, ...]) -> int:
        parts = [self.new() for _ in values]
        for part, value in zip(parts, values, strict=True):
            self.words += [4 << 16 | _CONSTANT, self.scalar, part, value]
        result = self.new()
        self.words += [6 << 16 | _COMPOSITE, self.vector, result, *parts]
        return result

    def operation(self, opcode: int, result: int, a: int, b: int) -> int:
        self.words += [5 << 16 | opcode, self.vector, result, a, b]
        return result
