"""The edits of `mutants` on a shader's SPIR-V words. A constant is one use's own: others keep theirs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

_HEADER: Final = 5
_BOUND: Final = 3  # header word: all ids are below it
_VARIABLE, _WORKGROUP = 59, 4
_CONSTANT, _FUNCTION, _ACCESS, _ADD, _BARRIER, _INT = 43, 54, 65, 128, 224, 21
_SWAPPED: Final = {  # operations (type, result, a, b) that do not commute, by opcode
    130: "ISub",
    131: "FSub",
    134: "UDiv",
    135: "SDiv",
    136: "FDiv",
    137: "UMod",
    138: "SRem",
    139: "SMod",
    176: "ULessThan",
    177: "SLessThan",
    178: "ULessEqual",
    179: "SLessEqual",
    184: "FLessThan",
    194: "ShiftRightLogical",
    195: "ShiftRightArithmetic",
    196: "ShiftLeftLogical",
}
_ARITHMETIC: Final = (
    _ADD,
    130,
    132,
    134,
    135,
    137,
    138,
    139,
    172,
    173,
    174,
    175,
    176,
    177,
    178,
    179,
    194,
    195,
    196,
    199,
)


@dataclass(frozen=True)
class SpirvEdit:
    """`code` is the whole shader, in the form of the library's blob."""

    code: bytes
    what: str


def spirv_edits(code: bytes, operator: str) -> Iterator[SpirvEdit]:
    """All edits of a shader (u32 flag, u64 number of words, words) by one operator."""
    words = list(struct.unpack_from(f"<{(len(code) - 12) // 4}I", code, 12))
    shader = _Shader(words)
    for new, what in getattr(shader, operator)():
        yield SpirvEdit(code[:4] + struct.pack(f"<Q{len(new)}I", len(new), *new), what)


class _Shader:
    """Instructions as (offset, opcode, operands); types and values of the integer constants."""

    def __init__(self, words: list[int]) -> None:
        self.words = words
        self.instructions: list[tuple[int, int, list[int]]] = []
        at = _HEADER
        while at < len(words):
            size, opcode = words[at] >> 16, words[at] & 0xFFFF
            self.instructions.append((at, opcode, words[at + 1 : at + size]))
            at += size
        integers = {o[0] for _, op, o in self.instructions if op == _INT and o[1] == 32}
        self.constants = {o[1]: (o[0], o[2]) for _, op, o in self.instructions if op == _CONSTANT and o[0] in integers}
        self.functions_at = next(at for at, op, _ in self.instructions if op == _FUNCTION)
        self.types = {
            o[1]: o[0] for _, op, o in self.instructions if op in (_CONSTANT, *_ARITHMETIC, 61, 80, 113, 114, 124, 169)
        }
        self.integers = integers

    @property
    def body(self) -> list[tuple[int, int, list[int]]]:
        return [i for i in self.instructions if i[0] > self.functions_at]

    def constant(self) -> Iterator[tuple[list[int], str]]:
        for at, opcode, operands in self.body:
            for number in (2, 3):
                if opcode in _ARITHMETIC and operands[number] in self.constants:
                    kind, value = self.constants[operands[number]]
                    for step in (1, -1):
                        new = self._with_constant(kind, (value + step) & 0xFFFFFFFF)
                        shift = len(new) - len(self.words)
                        new[at + shift + 1 + number] = new[_BOUND] - 1
                        yield new, f"{value} → {value + step} in operation {opcode} at word {at}"

    def barrier(self) -> Iterator[tuple[list[int], str]]:
        body = self.body
        shared = {o[1] for _, op, o in self.instructions if op == _VARIABLE and o[2] == _WORKGROUP}
        places = [i for i, (_, opcode, _) in enumerate(body) if opcode == _BARRIER]
        touched = [
            {o[2] for _, op, o in body[a + 1 : b] if op == _ACCESS and o[2] in shared}
            for a, b in pairwise([-1, *places, len(body)])
        ]
        # Where nothing shared is touched both before and behind a barrier, the next one orders what it would.
        idle = {at for at, one, two in zip(places, touched, touched[1:], strict=False) if shared and not one & two}
        for number, (at, opcode, operands) in enumerate(body):
            if opcode == _BARRIER and number not in idle:
                yield self.words[:at] + self.words[at + 1 + len(operands) :], f"dropped the barrier at word {at}"

    def swap(self) -> Iterator[tuple[list[int], str]]:
        for at, opcode, operands in self.body:
            if opcode in _SWAPPED and operands[2] != operands[3]:
                new = list(self.words)
                new[at + 3], new[at + 4] = new[at + 4], new[at + 3]
                yield new, f"operands of {_SWAPPED[opcode]} at word {at} swapped"

    def index(self) -> Iterator[tuple[list[int], str]]:
        for at, opcode, operands in self.body:
            kind = self.types.get(operands[-1]) if opcode == _ACCESS else None
            if kind in self.integers:
                assert kind is not None
                new = self._with_constant(kind, 1)
                shift, one = len(new) - len(self.words), new[_BOUND] - 1
                shifted = new[_BOUND]
                new[_BOUND] += 1
                last = at + shift + len(operands)
                add = [5 << 16 | _ADD, kind, shifted, new[last], one]
                new[last] = shifted
                yield new[: at + shift] + add + new[at + shift :], f"index of the access at word {at} shifted by 1"

    def _with_constant(self, kind: int, value: int) -> list[int]:
        """The words with one constant more, whose id is the last."""
        new = list(self.words)
        fresh = new[_BOUND]
        new[_BOUND] += 1
        constant = [4 << 16 | _CONSTANT, kind, fresh, value]
        return [*new[: self.functions_at], *constant, *new[self.functions_at :]]
