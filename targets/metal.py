"""Apple GPUs, Metal source by TVM's generator: `metal` is macOS, `metal:ios` an archive of objects for an app."""

from __future__ import annotations

from typing import Final

from awq_compile.errors import UsageError
from awq_compile.schedules import ColumnGemvSchedule, MatrixGemmSchedule, SimtGemvSchedule
from awq_compile.targets.gpu import GpuTarget, GpuTemplates, HardwareLimits, decode_attention, tvm_limits

_LIMITS: Final = HardwareLimits(
    max_threads=1024,
    shared_bytes=32 << 10,
    subgroup=32,
    registers=128,  # Apple publishes none: what its GPUs keep at half of their threads, by public measurements
    arguments=31,
    source="Apple, Metal Feature Set Tables, 'GPU implementation limits by family', Apple7 and later",
)
_TEMPLATES: Final = GpuTemplates(
    SimtGemvSchedule(32, 4, 4, 32),
    SimtGemvSchedule(32, 4, 4, 16, batch=4),
    MatrixGemmSchedule(32, 64, 32, 2, 2, unit=8, instruction="simdgroup8x8"),
    ColumnGemvSchedule(32, 8, 1, unit=8),
)


def metal_target(argument: str, host: str) -> GpuTarget:
    """`metal` or `metal:ios`."""
    if argument not in ("", "ios") or host:
        raise UsageError(f"unknown target metal:{argument}", hint="metal for macOS, metal:ios for iPhone and iPad")
    ios = argument == "ios"
    triple = "arm64-apple-ios" if ios else "arm64-apple-macos"
    return GpuTarget(
        name="metal:ios" if ios else "metal",
        tvm_target={
            "kind": "metal",
            **tvm_limits(_LIMITS),
            "max_function_args": _LIMITS.arguments,
            "host": {"kind": "llvm", "mtriple": triple},
        },
        host=triple,
        dtype="float16",
        library_suffix=".tar" if ios else ".dylib",
        system_lib=ios,
        default_scheme="w4g32" if ios else "w4g128",
        orders=("NK", "KN"),
        machine="metal-apple7",
        runs_here=False,
        limits=_LIMITS,
        templates=_TEMPLATES,
        decode_attention=decode_attention(_LIMITS, vector_bytes=8),  # vectors have four elements
        mma_attention=False,
    )
