"""Vulkan 1.1 and later, SPIR-V by our generator: `vulkan` for any GPU, or one vendor's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final

from awq_compile.errors import UsageError
from awq_compile.schedules import ColumnGemvSchedule, SimtGemmSchedule, SimtGemvSchedule
from awq_compile.targets.gpu import GpuTarget, GpuTemplates, HardwareLimits, decode_attention, tvm_limits
from awq_compile.targets.link import library_suffix, llvm_triple

_REPORTS: Final = "Vulkan hardware database, maxComputeWorkGroupInvocations and maxComputeSharedMemorySize"


def _limits(max_threads: int, shared_kib: int, registers: int, source: str) -> HardwareLimits:
    # No subgroup size is promised by Vulkan 1.1: reductions go through shared memory.
    return HardwareLimits(max_threads, shared_kib << 10, 0, registers, 8, source)


_DESKTOP: Final = GpuTemplates(
    SimtGemvSchedule(32, 4, 2, 32),
    SimtGemvSchedule(32, 4, 2, 16, batch=4),
    SimtGemmSchedule(32, 64, 32, 4, 4, 8),
    ColumnGemvSchedule(32, 8, 1, unit=8),
)
# By `scripts/bench_vulkan_linears build --sweep` on an H200, docs/performance.md. x is prepared once for 8 rows, or
# instructions would bound INT4; float16 weights need none, but loads that lie side by side.
_NVIDIA: Final = replace(
    _DESKTOP,
    gemv=SimtGemvSchedule(64, 2, 8, 32),
    small=SimtGemvSchedule(64, 2, 8, 16, batch=4),
    float16=SimtGemvSchedule(32, 4, 2, 8),
)
_PHONE: Final = GpuTemplates(
    SimtGemvSchedule(32, 4, 2, 8),
    SimtGemvSchedule(32, 4, 2, 8, batch=4),
    SimtGemmSchedule(32, 32, 32, 4, 4, 8),
    ColumnGemvSchedule(64, 4, 1, unit=8),
)
_GPUS: Final = {
    "": (_limits(256, 32, 128, f"{_REPORTS}: the least among current drivers of desktop and phone GPUs"), _DESKTOP),
    "nvidia": (_limits(1024, 48, 255, f"{_REPORTS}, NVIDIA"), _NVIDIA),
    "amd": (_limits(1024, 64, 255, f"{_REPORTS}, RADV and AMDVLK"), _DESKTOP),
    "intel": (_limits(1024, 32, 128, f"{_REPORTS}, ANV and Windows"), _DESKTOP),
    "adreno": (_limits(512, 32, 64, f"{_REPORTS}, Adreno 6xx and later"), _PHONE),
    "mali": (_limits(256, 32, 64, f"{_REPORTS}, Mali-G7x and later"), _PHONE),
}
_PHONES: Final = ("adreno", "mali")
# Features that the shaders need, from `VkPhysicalDeviceVulkan12Features` and its 16- and 8-bit storage kin.
_FEATURES: Final = ("float16", "int8", "int16", "int64", "8bit_buffer", "16bit_buffer")


@dataclass(frozen=True)
class VulkanTarget(GpuTarget):
    """Built within our code generator, unless TVM brings one."""

    def building(self) -> AbstractContextManager[object]:
        """See `codegen.vulkan_codegen`."""
        from awq_compile.targets.vulkan.codegen import vulkan_codegen

        return vulkan_codegen()


def vulkan_target(argument: str, host: str) -> VulkanTarget:
    """`vulkan`, `vulkan:nvidia`, `vulkan:amd`, …; `@HOST` behind it is the LLVM triple of the host."""
    if argument not in _GPUS:
        known = ", ".join(f"vulkan:{name}" for name in _GPUS if name)
        raise UsageError(f"unknown target vulkan:{argument}", hint=f"known: vulkan, {known}")
    limits, templates = _GPUS[argument]
    phone = argument in _PHONES
    triple = host or ("aarch64-linux-android" if phone else "x86_64-linux-gnu")
    return VulkanTarget(
        name="vulkan" + (f":{argument}" if argument else "") + (f"@{host}" if host else ""),
        tvm_target={
            "kind": "vulkan",
            **tvm_limits(limits),
            **{f"supports_{feature}": True for feature in _FEATURES},
            "host": {"kind": "llvm", "mtriple": llvm_triple(triple)},
        },
        host=triple,
        dtype="float16",
        library_suffix=library_suffix(triple),
        system_lib=False,
        default_scheme="w4g32" if phone else "w4g128",
        orders=("KN", "NK") if argument == "adreno" else ("NK", "KN"),
        machine=f"vulkan-{argument or 'any'}",
        runs_here=False,
        limits=limits,
        templates=templates,
        decode_attention=decode_attention(limits),
        mma_attention=False,
    )
