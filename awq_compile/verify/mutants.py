"""Small faults put into emitted code on purpose: verification is only worth what it catches.

Operators: a constant plus or minus one, a barrier dropped, the operands of an operator swapped that does not
commute, an index shifted by one. They work on the C of OpenCL, CUDA and Metal, and on SPIR-V.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, TypeVar

import numpy as np

from awq_compile.errors import CompileError
from awq_compile.verify.device_code import DeviceModule
from awq_compile.verify.executors.opencl import split_kernels
from awq_compile.verify.spirv_mutants import spirv_edits

Item = TypeVar("Item")
OPERATORS: Final = ("constant", "barrier", "swap", "index")
_DEFINITION: Final = {
    "opencl": r"__kernel void (?:__attribute__\(\([^;{{}}]*?\)\) )?{0}\([^;{{}}]*\)\s*\{{",
    "cuda": r'extern "C" __global__ void [^;{{}}]*?\b{0}\([^;{{}}]*\)\s*\{{',
    "metal": r"kernel void {0}\s*\([^;{{}}]*\)\s*\{{",
}
_BARRIER: Final = re.compile(
    r"(?:barrier\(CLK_LOCAL_MEM_FENCE\)|__syncthreads\(\)|threadgroup_barrier\([^;]*?\)\s*);|__syncwarp\([^;]*\);"
    r"|\bawq_(?:barrier_of<\d+>|stage_wait|wgmma_wait_1|cp_async_wait_\d)\([^;]*\);"
)
_CONSTANT: Final = re.compile(r"(?<=[ (])(\d+)(?=[);])(?![^\[\]]*\]\s*;)")
_OPERATOR: Final = re.compile(r" (-|/|%|<|>=|<=|>>|<<) ")
_INDEX: Final = re.compile(r"\w+_(?:ptr|shared|smem|local)\w*\[|\b(?:v|buf\w*)_\d+\[")
_SHARED: Final = re.compile(r"^\s*(?:__local|threadgroup|__shared__|extern __shared__)\b[^=;]*?(\w+)\[\d*\];")
_DECLARATION: Final = re.compile(r"^\s*(?:__local |threadgroup |thread |__shared__ |alignas\(\d+\) )*\w+ \w+\[\d+\];")


@dataclass(frozen=True)
class Edit:
    """Replaces [start, stop) of the code by `new`; `what` is for people."""

    operator: str
    start: int
    stop: int
    new: str
    what: str


@dataclass(frozen=True)
class Mutant:
    """A module with one fault in `kernel`; only the kernels beside it in its PrimFunc are kept."""

    kernel: str
    operator: str
    what: str
    module: DeviceModule
    source: str = ""


def mutants(
    module: DeviceModule, source: str, kernel: str, beside: Sequence[str], operator: str, rng: np.random.Generator
) -> Iterator[Mutant]:
    """All mutants of a kernel by one operator, in random order. `source` is the CUDA C++ of a CUDA module."""
    functions = {name: module.functions[name] for name in beside}
    if module.kind == "vulkan":
        words = module.kernels[kernel]
        for change in _shuffled(list(spirv_edits(words, operator)), rng):
            kernels = {name: module.kernels[name] for name in beside} | {kernel: change.code}
            yield Mutant(kernel, operator, change.what, replace(module, functions=functions, kernels=kernels))
        return
    text, rebuild = _text(module, source, kernel, beside)
    start, stop = definition(module.kind, text, kernel)
    for edit in _shuffled([e for e in text_edits(text[start:stop]) if e.operator == operator], rng):
        mutated = text[: start + edit.start] + edit.new + text[start + edit.stop :]
        code, new_source = rebuild(mutated)
        yield Mutant(kernel, operator, edit.what, replace(code, functions=functions), new_source)


def _text(
    module: DeviceModule, source: str, kernel: str, beside: Sequence[str]
) -> tuple[str, Callable[[str], tuple[DeviceModule, str]]]:
    """The text that defines a kernel, and how a module is made of a changed one."""
    if module.kind == "opencl":
        units = split_kernels(bytes(module.code).decode())

        def opencl(text: str) -> tuple[DeviceModule, str]:
            kept = {name: units[name] for name in beside} | {kernel: text}
            return replace(module, code="".join(f"// Function: {n}\n{t}" for n, t in kept.items()).encode()), ""

        return units[kernel], opencl
    if module.kind == "metal":

        def metal(text: str) -> tuple[DeviceModule, str]:
            return replace(module, kernels={n: module.kernels[n] for n in beside} | {kernel: text.encode()}), ""

        return bytes(module.kernels[kernel]).decode(), metal
    kept = source
    for name in module.functions:
        if name not in beside:
            start, stop = definition("cuda", kept, name)
            at = kept.rindex('extern "C"', 0, start)
            kept = kept[:at] + kept[stop:]
    return kept, lambda text: (module, text)


def definition(kind: str, text: str, kernel: str) -> tuple[int, int]:
    """[start, stop) of a kernel's body in the source, braces included."""
    match = re.search(_DEFINITION[kind].format(re.escape(kernel)), text)
    if match is None:
        raise CompileError(f"the {kind} source does not define {kernel}")
    depth, at = 0, match.end() - 1
    for brace in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return at, brace.end()
    raise CompileError(f"the source ends within {kernel}")


def text_edits(body: str) -> Iterator[Edit]:
    """Every edit of a kernel's body."""
    at = 0
    lines = body.splitlines(keepends=True)
    idle = _idle_barriers(lines)
    for number, line in enumerate(lines):
        if number not in idle and not _DECLARATION.match(line) and not line.lstrip().startswith(("#", "//")):
            yield from (_moved(edit, at) for edit in _line_edits(line))
        at += len(line)


def _idle_barriers(lines: Sequence[str]) -> set[int]:
    """Lines of barriers that order nothing of their own: what is shared before and behind them is not the same.

    TVM puts barriers beside those that its attention kernels have; without one of them, the next still orders.
    (Round a loop, one of these may order something after all: they are not drawn, which claims nothing.)
    """
    shared = [m[1] for line in lines if (m := _SHARED.match(line))]
    names = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in shared))
    barriers = [i for i, line in enumerate(lines) if _BARRIER.search(line)]
    if not shared:
        return set()
    code = [line if not _SHARED.match(line) else "" for line in lines]
    ends = [-1, *barriers, len(lines)]
    touched = [set(names.findall("".join(code[a + 1 : b]))) for a, b in pairwise(ends)]
    return {at for at, before, behind in zip(barriers, touched, touched[1:], strict=False) if not before & behind}


def _line_edits(line: str) -> Iterator[Edit]:
    shown = line.strip()[:100]
    for match in _BARRIER.finditer(line):
        yield Edit("barrier", match.start(), match.end(), ";", f"dropped {match[0]}")
    for match in _CONSTANT.finditer(line):
        for step in (1, -1):
            new = str(max(0, int(match[1]) + step)) if match[1] != "0" else "1"
            yield Edit("constant", match.start(1), match.end(1), new, f"{match[1]} → {new} in {shown}")
    for match in _OPERATOR.finditer(line):
        opening, closing = _around(line, match.start(), match.end())
        if opening is not None and closing is not None:
            left, right = line[opening : match.start()], line[match.end() : closing]
            if left != right:
                yield Edit(
                    "swap", opening, closing, f"{right} {match[1]} {left}", f"{left} {match[1]} {right} swapped"[:120]
                )
    for match in _INDEX.finditer(line):
        stop = _closing(line, match.end(), "[", "]")
        if stop is not None:
            index = line[match.end() : stop]
            yield Edit("index", match.end(), stop, f"({index}) + 1", f"{match[0]}{index}] shifted by 1"[:120])


def _moved(edit: Edit, by: int) -> Edit:
    return replace(edit, start=edit.start + by, stop=edit.stop + by)


def _around(line: str, left: int, right: int) -> tuple[int | None, int | None]:
    """The ends of the operands of the operator between `left` and `right`: TVM puts every operation in parentheses."""
    depth, opening = 0, None
    for at in range(left - 1, -1, -1):
        depth += {")": 1, "]": 1, "(": -1, "[": -1}.get(line[at], 0)
        if depth < 0:
            opening = at + 1
            break
        if depth == 0 and line[at] in ",;?":
            return None, None
    return opening, _closing(line, right, "(", ")")


def _closing(line: str, start: int, opening: str, closing: str) -> int | None:
    depth = 0
    for at in range(start, len(line)):
        depth += {opening: 1, closing: -1}.get(line[at], 0)
        if depth < 0:
            return at
        if depth == 0 and line[at] in ",;?" and closing == ")":
            return None
    return None


def _shuffled(items: list[Item], rng: np.random.Generator) -> list[Item]:
    return [items[i] for i in rng.permutation(len(items))]
