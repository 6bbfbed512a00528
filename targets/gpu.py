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
    """The untuned schedules of a device; `unit` and `rows` are what its compiler and registers take.

    The first four fields are for few rows and weights in NK, `column` for few rows and weights in KN, and `float16`,
    where it is given, for one row and weights in float16.
    """

    k_threads: int
    row_groups: int
    rows: int
    unit: int
    small_batch: int
    gemm: SimtGemmSchedule | MatrixGemmSchedule
    column: ColumnGemvSchedule
    magic: bool = False
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
        t, subgroup = self.templates, self.limits.subgroup
        # 3-bit codes come in blocks of 32; wider units than 16 bytes of words are split loads.
        three = isinstance(problem.spec, QuantSpec) and problem.spec.bits == 3
        unit = 32 if three else min(t.unit, 16) if not isinstance(problem.spec, QuantSpec) else t.unit
        gemv: FewRows
        small: FewRows
        if isinstance(problem.spec, QuantSpec) and problem.spec.order == "KN":
            gemv = replace(t.column, unit=32 if three else t.column.unit, magic=t.magic).fit(problem.n)
            small = replace(gemv, batch=t.small_batch)
        else:
            simt = SimtGemvSchedule(t.k_threads, t.row_groups, t.rows, unit, 1, subgroup, t.magic)
            if t.float16 is not None and not isinstance(problem.spec, QuantSpec):
                simt = t.float16
            while simt.k_threads * simt.unit >= 2 * problem.k:  # half the threads would have nothing of a row
                simt = replace(simt, k_threads=simt.k_threads // 2, row_groups=simt.row_groups * 2)
            gemv = simt
            small = replace(simt, batch=t.small_batch, unit=32 if three else min(simt.unit, 16))
        gemm = _fitted(t.gemm, problem.k, 32 if three else t.gemm.unit)
        chosen = LinearSchedule(gemv, small, gemm)
        self.check(problem, chosen)
        return chosen

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
