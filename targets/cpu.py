"""CPUs: any LLVM triple. Vector units are rows of a table; libraries are linked by zig.

`cpu` is this machine. `cpu:TRIPLE` is another, and `cpu:TRIPLE@CPU` a certain processor in LLVM's naming
(`cpu:x86_64-linux-gnu@znver4`).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from awq_compile.problem import MatmulProblem
from awq_compile.schedules import GemmSchedule, GemvSchedule, LinearSchedule
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.link import check_triple, library_suffix, llvm_triple


@dataclass(frozen=True)
class VectorUnit:
    """`lanes`: 32-bit lanes of a register; `registers`: how many there are.

    `flag` is what Linux calls the feature that brings it, and `features` what LLVM needs switched on.
    """

    name: str
    lanes: int
    registers: int
    flag: str
    features: tuple[str, ...]
    abi: str = ""

    def rule(self, problem: MatmulProblem) -> LinearSchedule:
        """The untuned schedule: register tiles as large as the register file allows."""
        del problem
        few = self.registers <= 16
        # A row of packed weights is too short a stream for hardware prefetchers, which stop at a page.
        gemv = GemvSchedule(self.lanes, rows=2 if few else 4, prefetch=1)
        small = GemvSchedule(self.lanes, rows=2, batch=2 if few else 4, prefetch=1)
        # The register tile fills half of the registers or more, and leaves some for the panel and broadcasts:
        # Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), section 6.
        m_tile = 6 if few else 8
        return LinearSchedule(gemv, small, GemmSchedule(self.lanes, m_tile, 2, k_block=256, m_block=m_tile * 16))


# Register files: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 1, 10.2 (SSE), 14.1 (AVX),
# 15.1 (AVX-512); Arm Architecture Reference Manual, B1.2 (V0 to V31, 128 bits).
AVX512: Final = VectorUnit(
    "avx512", 16, 32, "avx512bw", ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c")
)
AVX2: Final = VectorUnit("avx2", 8, 16, "avx2", ("avx2", "fma", "f16c"))
SSE2: Final = VectorUnit("sse2", 4, 16, "sse2", ())
NEON: Final = VectorUnit("neon", 4, 32, "asimd", ("neon",))
RV64GC: Final = VectorUnit("rv64gc", 4, 32, "", ("m", "a", "f", "d", "c"), abi="lp64d")  # no vectors: LLVM splits them
GENERIC: Final = VectorUnit("generic", 4, 16, "", ())

_DEFAULT_CPU: Final = {"x86_64": "x86-64-v3", "aarch64": "generic", "arm64": "apple-m1", "riscv64": "generic-rv64"}
_UNIT: Final = {"x86_64": AVX2, "aarch64": NEON, "arm64": NEON, "riscv64": RV64GC}


@dataclass(frozen=True)
class CpuTarget(TargetSpec):
    """A CPU with one vector unit. The library computes in float32."""

    unit: VectorUnit = GENERIC

    def rule(self, problem: MatmulProblem) -> LinearSchedule:
        """See `VectorUnit.rule`."""
        return self.unit.rule(problem)


def cpu_target(argument: str) -> CpuTarget:
    """`cpu` (empty argument), `cpu:TRIPLE` or `cpu:TRIPLE@CPU`."""
    if not argument:
        return _host()
    triple, _, cpu = argument.partition("@")
    check_triple(f"cpu:{argument}", triple)
    arch = triple.split("-")[0]
    unit = AVX512 if cpu in _AVX512_CPUS else _UNIT.get(arch, GENERIC)
    return _make(f"cpu:{argument}", triple, cpu or _DEFAULT_CPU.get(arch, "generic"), unit, runs_here=False)


# LLVM's names of processors and levels with the AVX-512 subsets above.
_AVX512_CPUS: Final = (
    "x86-64-v4",
    "skylake-avx512",
    "cascadelake",
    "icelake-server",
    "sapphirerapids",
    "znver4",
    "znver5",
)


def _host() -> CpuTarget:
    """This machine: LLVM names the processor; what the kernel reports decides its vector unit."""
    from tvm.target import codegen

    triple, cpu = str(codegen.llvm_get_system_triple()), str(codegen.llvm_get_system_cpu())
    units = (NEON,) if platform.machine() in ("aarch64", "arm64") else (AVX512, AVX2, SSE2)
    flags = _linux_cpu_flags()
    unit = next((u for u in units if not flags or u.flag in flags), GENERIC)
    return _make("cpu", triple, cpu, unit, runs_here=True)


def _linux_cpu_flags() -> set[str]:
    """Features that the kernel lets programs use; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(match[1].split()) if match else set()


def _make(name: str, triple: str, cpu: str, unit: VectorUnit, *, runs_here: bool) -> CpuTarget:
    mattr = [f"+{feature}" for feature in unit.features]
    if unit is AVX2 and runs_here:  # a hypervisor may hide what the processor's name implies
        mattr += ["-avx512f"]
    llvm: dict[str, object] = {"kind": "llvm", "mtriple": llvm_triple(triple), "mcpu": cpu, "mattr": mattr}
    return CpuTarget(
        name=name,
        tvm_target=llvm | ({"mabi": unit.abi} if unit.abi else {}),
        host=triple,
        dtype="float32",
        library_suffix=library_suffix(triple),
        system_lib=False,
        default_scheme="w4g128",
        orders=("NK",),
        machine=f"{unit.name}-l{unit.lanes}r{unit.registers}",
        runs_here=runs_here,
        unit=unit,
    )
