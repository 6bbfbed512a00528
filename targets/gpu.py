"""What the GPU targets share: limits with their sources, and the untuned schedules that follow from them."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass, replace

from awq_compile.errors import CompileError
from awq_compile.formats import QuantSpec
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import (
    ColumnGemvSchedule,
    DecodeAttentionSchedule,
    FewRows,
    GemmSchedule,
    GemvSchedule,
    LinearSchedule,
    MatrixGemmSchedule,
    SimtGemmSchedule,
    SimtGemvSchedule,
)
from awq_compile.targets.base import TargetSpec


@dataclass(frozen=True)
class HardwareLimits:
    """Of one block of threads. No field has a default: every device's page gives its own, with the source.

    `subgroup` counts the threads that the emitted code may assume to shuffle with each other, 0 where the
    API or the device promises nothing. `registers`: values of 32 bits that a thread may keep, by the device's manual,
    or the least of current devices where a preset stands for many.
    """

    max_threads: int
    shared_bytes: int
    subgroup: int
    registers: int
    arguments: int
    source: str

    def __post_init__(self) -> None:
        assert self.max_threads >= 64 and self.shared_bytes >= 1 << 14 and self.subgroup in (0, 16, 32, 64), self
        assert 32 <= self.registers <= 256, self


@dataclass(frozen=True)
class GpuTemplates:
    """The untuned schedules of a device.

    `gemv` and `small` are for one and for few rows and weights in NK, `column` for few rows and weights in KN, and
    `float16`, where it is given, for one row and weights in float16.
    """

    gemv: SimtGemvSchedule
    small: SimtGemvSchedule
    gemm: SimtGemmSchedule | MatrixGemmSchedule
    column: ColumnGemvSchedule
    float16: SimtGemvSchedule | None = None


@dataclass(frozen=True)
class GpuTarget(TargetSpec):
    """A GPU: activations, KV cache and arithmetic inputs in float16, sums in float32.

    `mma_attention`: new tokens attend by `kernels.mma_attention`, which takes `mma.m16n8k16` and asynchronous copies.
    """

    limits: HardwareLimits
    templates: GpuTemplates
    decode_attention: DecodeAttentionSchedule
    mma_attention: bool

    def __post_init__(self) -> None:
        limits, attention = self.limits, self.decode_attention
        assert attention.threads <= limits.max_threads and attention.shared_bytes <= limits.shared_bytes, self
        assert attention.subgroup in (0, limits.subgroup), self

    @property
    def block_threads(self) -> int:
        """256, which every device takes and occupies."""
        return min(256, self.limits.max_threads)

    def rule(self, problem: MatmulProblem) -> LinearSchedule:
        """The device's templates, with units that the format has."""
        t, spec = self.templates, problem.spec
        three = isinstance(spec, QuantSpec) and spec.bits == 3  # whose codes come in blocks of 32
        gemv: FewRows
        small: FewRows
        if isinstance(spec, QuantSpec) and spec.order == "KN":
            gemv = replace(t.column, unit=32 if three else t.column.unit).fit(problem.n)
            small = replace(gemv, batch=t.small.batch)
        elif isinstance(spec, QuantSpec) or t.float16 is None:
            gemv, small = self._fitted_gemv(t.gemv, problem), self._fitted_gemv(t.small, problem)
        else:
            gemv = self._fitted_gemv(t.float16, problem)
            small = replace(gemv, batch=t.small.batch)
        gemm = _fitted(t.gemm, problem.k, 32 if three else t.gemm.unit)
        chosen = LinearSchedule(gemv, small, gemm)
        self.check(problem, chosen)
        return chosen

    def _fitted_gemv(self, gemv: SimtGemvSchedule, problem: MatmulProblem) -> SimtGemvSchedule:
        """With a unit of the format, and threads along K of which more than half have a part of a row."""
        unit = gemv.unit
        if not isinstance(problem.spec, QuantSpec):
            unit = min(unit, 16)
        elif problem.spec.bits == 3:
            unit = 32
        k_threads, row_groups = gemv.k_threads, gemv.row_groups
        while k_threads * unit >= 2 * problem.k:
            k_threads, row_groups = k_threads // 2, row_groups * 2
        return replace(gemv, k_threads=k_threads, row_groups=row_groups, unit=unit, subgroup=self.limits.subgroup)

    def check(self, problem: MatmulProblem, chosen: LinearSchedule) -> None:
        """Raises `CompileError` naming the limit that a schedule exceeds."""
        for bucket, schedule in chosen.by_bucket.items():
            assert not isinstance(schedule, GemvSchedule | GemmSchedule), "a CPU's"
            for what, used, limit in (
                ("threads in a block", schedule.threads, self.limits.max_threads),
                ("bytes of shared memory", schedule.shared_bytes, self.limits.shared_bytes),
            ):
                if used > limit:
                    raise CompileError(
                        f"{problem.name}, {bucket}: {used} {what}, and {self.name} has {limit} ({self.limits.source})"
                    )


def _fitted(gemm: SimtGemmSchedule | MatrixGemmSchedule, k: int, unit: int) -> SimtGemmSchedule | MatrixGemmSchedule:
    """A template that takes K in whole blocks, and whole units for every thread."""
    if isinstance(gemm, SimtGemmSchedule):
        return replace(gemm, unit=unit)
    for block_k, warps_n in itertools.product((gemm.block_k, 32), (gemm.warps_n, 1)):
        if k % block_k == 0:
            with suppress(CompileError):
                return replace(gemm, unit=unit, block_k=block_k, warps_n=warps_n)
    raise CompileError(f"no blocks of {gemm} divide K = {k} in units of {unit}")


def tvm_limits(limits: HardwareLimits) -> dict[str, object]:
    """The limits as attributes of a TVM target. Its warp size 1 keeps TVM's reductions in shared memory."""
    return {
        "max_num_threads": limits.max_threads,
        "max_threads_per_block": limits.max_threads,
        "max_shared_memory_per_block": limits.shared_bytes,
        "thread_warp_size": max(limits.subgroup, 1),
    }


def decode_attention(limits: HardwareLimits, vector_bytes: int = 16) -> DecodeAttentionSchedule:
    """Untuned: blocks that a phone's GPU takes, as many as keep a desktop's busy, and loads of at most `vector_bytes`.

    Two blocks share a core's memory where heads are of the common sizes.
    """
    return DecodeAttentionSchedule(
        threads=min(128, limits.max_threads),
        key_threads=8,
        keys=1,
        values=4,
        vector_bytes=vector_bytes,
        positions=256,
        blocks=128,
        subgroup=limits.subgroup,
        shared_bytes=limits.shared_bytes,
        sums=1,
    )
