"""Symbols that a library may leave to the process that loads it."""

from __future__ import annotations

from typing import Final

# Entry points in generated code: src/target/llvm/codegen_cpu.cc of TVM. They are defined in TVM-FFI's function.cc,
# error.cc and extra/, and in TVM's device_api.cc and thread_pool.cc, all of which are in mlc4j's runtime and in iOS's.
RUNTIME: Final = frozenset(
    (
        "TVMBackendAllocWorkspace",
        "TVMBackendFreeWorkspace",
        "TVMBackendParallelLaunch",
        "TVMFFIEnvModLookupFromImports",
        "TVMFFIEnvModRegisterSystemLibSymbol",
        "TVMFFIErrorSetRaisedFromCStrParts",
        "TVMFFIFunctionCall",
    )
)

# Defined in init_once.cc of TVM-FFI, which android/mlc4j/src/cpp/tvm_runtime.h of mlc-llm does not include.
HANDLE_INIT_ONCE: Final = "TVMFFIHandleInitOnce"

_MATHS: Final = (
    "acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf exp exp2 expm1 exp10 fabs floor fma fmax fmin "
    "fmod hypot ldexp log log10 log1p log2 nearbyint nextafter pow rint round sin sincos sinh sqrt tan tanh trunc"
)
# C's library and what the compilers' support libraries hold (half precision, 128-bit and stack-check helpers).
C_LIBRARY: Final = frozenset(
    (
        *(name + suffix for name in _MATHS.split() for suffix in ("", "f")),
        *("abort", "bzero", "calloc", "free", "malloc", "memcmp", "memcpy", "memmove", "memset", "__memcpy_chk"),
        *("__sincosf_stret", "__sincos_stret", "__exp10f", "__exp10", "memset_pattern16", "__bzero"),  # Apple's
        *("__extendhfsf2", "__truncsfhf2", "__gnu_h2f_ieee", "__gnu_f2h_ieee", "__extendhfdf2", "__truncdfhf2"),
        *("__divti3", "__modti3", "__udivti3", "__umodti3", "__multi3"),
        *("__chkstk", "___chkstk_ms", "_fltused", "dyld_stub_binder", "__stack_chk_fail", "__cxa_finalize"),
    )
)


def unknown_symbols(undefined: frozenset[str]) -> list[str]:
    """Those that neither TVM's runtime nor C gives, in order; `HANDLE_INIT_ONCE` is not among them."""
    return sorted(undefined - RUNTIME - C_LIBRARY - {HANDLE_INIT_ONCE})
