"""OpenCL C by TVM's generator: `opencl` for any GPU, and the GPUs of Android phones.

`android` is Adreno; `android:mali` and `android:generic` are the others. They give an archive of objects with
the symbol prefix that MLC's app links, `android:so` (and `android:mali-so`, …) a shared library.
"""

from __future__ import annotations

from typing import Final

from awq_compile.errors import UsageError
from awq_compile.schedules import ColumnGemvSchedule, SimtGemmSchedule, SimtGemvSchedule
from awq_compile.targets.gpu import GpuTarget, GpuTemplates, HardwareLimits, decode_attention, tvm_limits
from awq_compile.targets.link import library_suffix, llvm_triple

_GENERIC: Final = HardwareLimits(
    max_threads=256,
    shared_bytes=32 << 10,
    subgroup=0,
    registers=128,  # Intel Xe Programmer's Reference: 128 registers of 32 bytes a thread of 8 lanes
    arguments=64,
    source="OpenCL 3.0 specification, CL_DEVICE_LOCAL_MEM_SIZE: at least 32 KB; current GPUs take work groups of 256",
)
_ADRENO: Final = HardwareLimits(
    max_threads=512,
    shared_bytes=32 << 10,
    subgroup=0,
    registers=64,
    arguments=64,
    source="Qualcomm Snapdragon Mobile Platform OpenCL General Programming and Optimization, 80-NB295-11",
)
_MALI: Final = HardwareLimits(
    max_threads=256,
    shared_bytes=32 << 10,
    subgroup=0,
    registers=64,  # Arm GPU Best Practices, 101897: 64 of 32 bits a thread on Valhall
    arguments=64,
    source="Arm Mali GPU OpenCL Developer Guide, 101574: local memory lies in global memory",
)

# Units of 8 codes: larger straight-line bodies exhaust the registers of Adreno's compiler.
_PHONE_GEMM: Final = SimtGemmSchedule(block_m=32, block_n=32, block_k=32, thread_m=4, thread_n=4, unit=8)
_TEMPLATES: Final = {
    # By scripts/bench_dlight on Intel's CPU runtime: units of 8, four rows and conversion by bits together give 1.3
    # to 2 times the rate of units of 32 and two rows, more on a small matrix; on a GPU 32 threads read 128 bytes.
    "generic": GpuTemplates(
        SimtGemvSchedule(32, 4, 4, 8, magic=True),
        SimtGemvSchedule(32, 4, 4, 8, batch=4, magic=True),
        SimtGemmSchedule(32, 64, 32, 4, 4, 8),
        ColumnGemvSchedule(32, 8, 1, unit=8, magic=True),
    ),
    "adreno": GpuTemplates(
        SimtGemvSchedule(64, 2, 2, 8),
        SimtGemvSchedule(64, 2, 2, 8, batch=4),
        _PHONE_GEMM,
        ColumnGemvSchedule(64, 4, 1, unit=8),
    ),
    "mali": GpuTemplates(
        SimtGemvSchedule(16, 8, 2, 8),
        SimtGemvSchedule(16, 8, 2, 8, batch=4),
        _PHONE_GEMM,
        ColumnGemvSchedule(16, 8, 2, unit=8),
    ),
}
_ANDROID_GPUS: Final = {"adreno": _ADRENO, "mali": _MALI, "generic": _GENERIC}


def opencl_target(argument: str, host: str) -> GpuTarget:
    """`opencl`, or `opencl@HOST` with the LLVM triple of the host."""
    if argument:
        raise UsageError(f"opencl takes no argument, got {argument!r}", hint="opencl, or android:mali for a phone")
    host = host or "x86_64-linux-gnu"
    return _make(
        "opencl" if host == "x86_64-linux-gnu" else f"opencl@{host}", host, _GENERIC, "generic", "w4g128", archive=False
    )


def android_target(argument: str, host: str) -> GpuTarget:
    """`android`, `android:mali`, `android:generic`, `android:so`, `android:mali-so`, …"""
    gpu, _, kind = argument.partition("-")
    if gpu == "so":
        gpu, kind = "adreno", "so"
    gpu = gpu or "adreno"
    if gpu not in _ANDROID_GPUS or kind not in ("", "so") or host:
        known = ", ".join(f"android:{name}" for name in _ANDROID_GPUS)
        raise UsageError(f"unknown target android:{argument}{host and '@'}{host}", hint=f"known: {known}, android:so")
    name = "android:" + gpu + (f"-{kind}" if kind else "")
    return _make(name, "aarch64-linux-android", _ANDROID_GPUS[gpu], gpu, "w4g32", archive=kind != "so")


def _make(name: str, host: str, limits: HardwareLimits, gpu: str, scheme: str, *, archive: bool) -> GpuTarget:
    return GpuTarget(
        name=name,
        tvm_target={"kind": "opencl", **tvm_limits(limits), "host": {"kind": "llvm", "mtriple": llvm_triple(host)}},
        host=host,
        dtype="float16",
        library_suffix=".tar" if archive else library_suffix(host),
        system_lib=archive,
        default_scheme=scheme,
        # MLC's maintainers recommend q4f16_0, which is KN, on Android: there neighbouring threads are served
        # together where they read neighbouring addresses, and Adreno's waves have 64 or 128 threads.
        orders=("KN", "NK") if gpu == "adreno" else ("NK", "KN"),
        machine=f"opencl-{gpu}",
        runs_here=False,
        limits=limits,
        templates=_TEMPLATES[gpu],
        decode_attention=decode_attention(limits),
        mma_attention=False,
    )
