"""The same kernel with the threads of a block numbered backwards: without a race, nothing changes.

CPU drivers run the threads of a block one after the other, or in vectors, from barrier to barrier. A thread then
always sees what lower ones have written, barrier or not, but not in both orders. For kernels without subgroup
operations, where no number is better than another.
"""

from __future__ import annotations

import re
from typing import Final

_LOCAL_ID: Final = re.compile(r"\bget_local_id\((\d)\)")
_HEADER: Final = 5
_BOUND: Final = 3
_TYPE_INT, _TYPE_VECTOR, _CONSTANT, _COMPOSITE, _FUNCTION, _VARIABLE, _LOAD, _DECORATE, _SUB = (
    *(21, 23, 43, 44, 54, 59, 61, 71),
    130,
)
_LOCAL_INVOCATION_ID: Final = 27
_BUILT_IN: Final = 11
_SUBGROUP: Final = range(333, 367)  # OpGroupNonUniform…


def has_barrier_opencl(source: str) -> bool:
    """Whether threads of a block wait for each other."""
    return "barrier(CLK_LOCAL_MEM_FENCE);" in source or "__local " in source


def reversed_opencl(source: str) -> str:
    """OpenCL C with get_local_id(i) counted from the end."""
    return _LOCAL_ID.sub(r"(get_local_size(\1) - 1 - get_local_id(\1))", source)


def reversed_spirv(words: tuple[int, ...], size: tuple[int, int, int]) -> tuple[int, ...] | None:
    """SPIR-V with LocalInvocationId counted from the end; None where it has nothing shared or uses subgroups."""
    instructions = []
    at = _HEADER
    while at < len(words):
        length = words[at] >> 16
        instructions.append((words[at] & 0xFFFF, list(words[at + 1 : at + length])))
        at += length
    if any(op in _SUBGROUP for op, _ in instructions) or not any(op == 224 for op, _ in instructions):
        return None
    built_in = [o[0] for op, o in instructions if op == _DECORATE and o[1:] == [_BUILT_IN, _LOCAL_INVOCATION_ID]]
    loads = [o for op, o in instructions if op == _LOAD and o[2] in built_in]
    if not loads:
        return None
    vector = loads[0][0]
    scalar = next(o[1] for op, o in instructions if op == _TYPE_VECTOR and o[0] == vector)
    fresh = words[_BOUND]
    parts, last = [fresh, fresh + 1, fresh + 2], fresh + 3
    fresh += 4
    out: list[int] = []
    declared = False
    for op, operands in instructions:
        if op == _FUNCTION and not declared:
            declared = True
            for part, extent in zip(parts, size, strict=True):
                out += [4 << 16 | _CONSTANT, scalar, part, extent - 1]
            out += [6 << 16 | _COMPOSITE, vector, last, *parts]
        if op == _LOAD and operands[2] in built_in:
            out += [4 << 16 | _LOAD, vector, fresh, operands[2]]
            out += [5 << 16 | _SUB, vector, operands[1], last, fresh]
            fresh += 1
        else:
            out += [(len(operands) + 1) << 16 | op, *operands]
    header = list(words[:_HEADER])
    header[_BOUND] = fresh
    return (*header, *out)
