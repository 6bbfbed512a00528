"""From CUDA or Metal source to the C++ that the SIMT headers make sense of. Line numbers are kept.

CUDA      `__shared__ alignas(64) T a[n];`           → the alignment first, where C++ wants it
          `extern __shared__ __align__(64) T a[];`   → a pointer into the launch's dynamic shared memory
          `__device__ T f(...) { asm(...) }`         → removed where the headers emulate `f`, else refused
Metal     `threadgroup T a[n];`                      → `AWQ_THREADGROUP T a[n];`; elsewhere the word is dropped
both      `*(float4*)(p)`                            → `*awq_at<float4>(p)`, which checks the alignment
          a loop                                     → calls `awq_preempt` at its head
          a kernel's definition                      → preceded by the name of its shared memory section
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from awq_compile.errors import CompileError

_KERNEL: Final = {
    "cuda": re.compile(r'^extern "C" __global__ void(?: __\w+__\([^()]*\))? (\w+)\([^;{}]*\) *\{', re.MULTILINE),
    "metal": re.compile(r"^kernel void (\w+)\s*\(", re.MULTILINE),
}
_DYNAMIC: Final = re.compile(
    r"extern\s+__shared__\s+(?:alignas\(\d+\)|__align__\(\d+\))?\s*((?:unsigned\s+)?\w+)\s+(\w+)\s*\[\s*\]\s*;"
)
_SHARED: Final = re.compile(r"__shared__\s+(alignas\(\d+\)|__align__\(\d+\))")
_THREADGROUP: Final = re.compile(r"^(\s*)(volatile\s+)?threadgroup(\s+\w+\s+\w+\[\d+\];)", re.MULTILINE)
_VECTOR: Final = re.compile(r"\*\((?:(?:const|device|thread|threadgroup|volatile) )*(\w+[234])\*\)\(")
_LOOP: Final = re.compile(r"^(\s*(?:for \([^;\n]*;[^;\n]*;[^;\n]*\)|while \(1\)) \{)$", re.MULTILINE)
_DEVICE: Final = re.compile(r"^[^\n#;{}]*__device__[^;{}]*?\b(\w+)\s*\(([^;{}]*)\)\s*\{", re.MULTILINE)
_ASM: Final = re.compile(r"\b(?:asm|__asm__)\b\s*(?:volatile|__volatile__)?\s*\(")


@dataclass(frozen=True)
class ShimSource:
    """C++ for the CPU compiler, and the kernels in it."""

    language: str
    text: str
    kernels: tuple[str, ...]


def shim_source(language: str, source: str) -> ShimSource:
    """Translates a source; `language` is `cuda` or `metal`. Raises `CompileError` on PTX that nothing emulates."""
    kernels = tuple(_KERNEL[language].findall(source))
    if language == "cuda":
        body = _without_ptx(source)
        body = _DYNAMIC.sub(r"\1* \2 = (\1*)awq_dynamic_shared();", body)
        body = _SHARED.sub(r"\1 __shared__", body)
    else:
        body = _THREADGROUP.sub(lambda m: f"{m[1]}{m[2] or ''}AWQ_THREADGROUP{m[3]}", source)
    body = _LOOP.sub(r"\1 awq_preempt();", body)
    body = _VECTOR.sub(r"*awq_at<\1>(", body)
    parts, at = ['#line 1 "kernels"\n'], 0
    for match in _KERNEL[language].finditer(body):
        parts.append(body[at : match.start()])
        line = body.count("\n", 0, match.start()) + 1
        parts.append(f'\n#undef AWQ_SECTION\n#define AWQ_SECTION "awq_shared_{match[1]}"\n#line {line} "kernels"\n')
        at = match.start()
    parts.append(body[at:])
    parts += [f"\nAWQ_KERNEL({name}, awq_{language}_caller)" for name in kernels]
    return ShimSource(language, "".join(parts) + "\n", kernels)


def joined(sources: Sequence[ShimSource]) -> ShimSource:
    """Several sources as one to compile; each in a namespace, for Metal's repeat their declarations."""
    language = sources[0].language
    # What a namespace overloads would hide the overloads outside.
    known = {"cuda": "using ::max;\nusing ::min;\n", "metal": ""}[language]
    parts = [f"namespace awq_unit_{i} {{\n{known}{s.text}\n}}\n" for i, s in enumerate(sources)]
    kernels = tuple(name for s in sources for name in s.kernels)
    return ShimSource(language, f'#include "awq_{language}.h"\n' + "".join(parts), kernels)


def _without_ptx(source: str) -> str:
    """Blanks the device functions that hold inline PTX; the headers define the same names."""
    parts, at = [], 0
    for match in _DEVICE.finditer(source):
        if match.start() < at:
            continue
        end = _closing_brace(source, match.end() - 1)
        body = source[match.start() : end]
        if _ASM.search(body) is None:
            continue
        if match[1] not in emulated_functions():
            raise CompileError(
                f"the device function {match[1]} holds inline PTX that the CPU shim does not emulate",
                hint="put PTX into one of " + ", ".join(sorted(emulated_functions())),
            )
        parts += [source[at : match.start()], "\n" * body.count("\n")]
        at = end
    rest = "".join(parts) + source[at:]
    if (stray := _ASM.search(rest)) is not None:
        line = rest.count("\n", 0, stray.start()) + 1
        raise CompileError(f"line {line} of the CUDA source holds inline PTX outside a named device function")
    return rest


def _closing_brace(text: str, opening: int) -> int:
    """Index behind the brace that closes the one at `opening`; strings are skipped."""
    depth = 0
    for match in re.compile(r'"(?:\\.|[^"\\])*"|[{}]').finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise CompileError("the CUDA source ends within a function")


@cache
def emulated_functions() -> frozenset[str]:
    """Names of device functions that the shim defines, read from its header."""
    text = (files("awq_compile.verify.executors") / "simt_include" / "awq_cuda_matrix.h").read_text("utf-8")
    names = set(re.findall(r"\bawq_(?:cp_async|mma_m|ldmatrix_x)\w+", text)) - {"awq_cp_async_"}
    sizes = re.findall(r"^AWQ_CP_ASYNC\((\d+)\)", text, re.MULTILINE)
    return frozenset(names | {f"awq_cp_async_{n}{end}" for n in sizes for end in ("", "_if")})
