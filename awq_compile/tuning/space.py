"""The legal schedules of a problem on a target, as data: enumerated and filtered before anything is built.

A `Space` is a template with the values that each of its fields may take; its members are those combinations that
the schedule itself, the problem and the target's limits allow, in the order in which the fields vary, the last one
fastest. The values of the untuned schedule's fields are always among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from awq_compile.errors import CompileError
from awq_compile.formats import Float16Spec, QuantSpec
from awq_compile.problem import FEW_ROWS, MatmulProblem
from awq_compile.schedules import (
    LANES,
    WGMMA_COLUMNS,
    ColumnGemvSchedule,
    GemmSchedule,
    GemvSchedule,
    MatrixGemmSchedule,
    MatrixGemvSchedule,
    SimtGemmSchedule,
    SimtGemvSchedule,
    StagedMatrixSchedule,
    WarpgroupSchedule,
)
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.cpu import CpuTarget
from awq_compile.targets.gpu import GpuTarget
from awq_compile.tuning.templates import TEMPLATES, Schedule, fits_bucket, template_of

_SMALL_BATCHES: Final = (1, 2, 4, 8)
# A panel and the sums beside it stay in the second-level cache, 256 KiB or more on every CPU of the last ten years.
_CACHED_BYTES: Final = 512 << 10
# NVIDIA CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", 9.0: of a block that opts in.
_HOPPER_SHARED_BYTES: Final = 227 << 10
_REGISTERS: Final = 64 << 10  # of a multiprocessor, of compute capability 7.5 to 12.0
_RESIDENT_THREADS: Final = {  # of a multiprocessor: the same table
    **dict.fromkeys(("sm_80", "sm_90", "sm_100"), 2048),
    **dict.fromkeys(("sm_86", "sm_87", "sm_89", "sm_120"), 1536),
}
_BLOCK_THREADS: Final = 32  # fewer leave lanes of every GPU's smallest wave idle


@dataclass(frozen=True)
class Space:
    """Values of the fields of `template` for one problem, bucket and target."""

    problem: MatmulProblem
    bucket: str
    spec: TargetSpec
    template: str
    choices: Mapping[str, tuple[Any, ...]]

    @cached_property
    def members(self) -> tuple[Schedule, ...]:
        """Every legal schedule."""
        return tuple(self._enumerated())

    def _enumerated(self) -> Iterator[Schedule]:
        kind: Any = TEMPLATES[self.template]
        for values in itertools.product(*self.choices.values()):
            try:
                schedule = kind(**dict(zip(self.choices, values, strict=True)))
            except CompileError:
                continue
            if why_illegal(self.problem, self.bucket, self.spec, schedule) is None:
                yield schedule


def space_of(problem: MatmulProblem, bucket: str, spec: TargetSpec) -> Space:
    """The space around the target's untuned schedule. Raises `CompileError` where the problem fits no schedule."""
    rule = spec.rule(problem).of(bucket)
    choices = _cpu_choices(spec, bucket, rule) if isinstance(spec, CpuTarget) else _gpu_choices(problem, bucket, rule)
    merged = {name: tuple(sorted({*values, getattr(rule, name)})) for name, values in choices.items()}
    space = Space(problem, bucket, spec, template_of(rule), merged)
    if not space.members:
        raise CompileError(
            f"{problem.name}, {bucket}: no schedule fits {spec.name}: {why_illegal(problem, bucket, spec, rule)}"
        )
    return space


def _cpu_choices(spec: CpuTarget, bucket: str, rule: Schedule) -> dict[str, tuple[Any, ...]]:
    lanes = tuple(n for n in LANES if n in (spec.unit.lanes // 2, spec.unit.lanes, spec.unit.lanes * 2))
    if isinstance(rule, GemvSchedule):
        batches = (1,) if bucket == "gemv" else _SMALL_BATCHES
        return {"lanes": lanes, "rows": (2, 4, 6, 8, 12, 16), "batch": batches, "prefetch": (0, 1, 2, 4)}
    tiles = (2, 4, 6, 8, 10, 12, 14)
    blocks = tuple(sorted({tile * times for tile in tiles for times in (4, 8, 16, 32)}))
    return {
        "lanes": lanes,
        "m_tile": tiles,
        "n_vectors": (1, 2, 3, 4),
        "k_block": (128, 256, 512, 1024, 2048),
        "m_block": blocks,
    }


def _gpu_choices(problem: MatmulProblem, bucket: str, rule: Schedule) -> dict[str, tuple[Any, ...]]:
    batches = (1,) if bucket == "gemv" else _SMALL_BATCHES
    # float16 weights are not codes: the field changes nothing
    magic = (getattr(rule, "magic", False),) if isinstance(problem.spec, Float16Spec) else (False, True)
    units = (8, 16, 32)
    if isinstance(rule, SimtGemvSchedule):
        return {
            "k_threads": tuple(sorted({1, 2, 4, 8, 16, 32, 64, 128, rule.k_threads})),
            "row_groups": (1, 2, 4, 8, 16, 32),
            "rows": (2, 4, 8),
            "unit": units,
            "batch": batches,
            "subgroup": (0, rule.subgroup),
            "magic": magic,
        }
    if isinstance(rule, ColumnGemvSchedule):
        return {
            "n_threads": (8, 16, 32, 64, 128),
            "k_threads": (1, 2, 4, 8, 16, 32),
            "columns": (1, 2, 4),
            "unit": units,
            "batch": batches,
            "magic": magic,
        }
    if isinstance(rule, MatrixGemvSchedule):
        many = bucket not in FEW_ROWS
        return {
            "warps": (1, 2, 4, 8, 16, 32),
            "tiles": (1, 2, 4),
            "columns": (1, 2, 4) if many else (1,),
            "stages": (1,) if isinstance(problem.spec, Float16Spec) else (1, 2, 3, 4),
            "resident": (0, 1, 2, 4, 8),
        }
    if isinstance(rule, StagedMatrixSchedule):
        return {"warps": (2, 4, 8), "tiles": (1, 2, 4), "columns": (4, 8, 16), "stages": (2, 3, 4)}
    if isinstance(rule, WarpgroupSchedule):
        return {
            "warpgroups": (1, 2, 4),
            "tiles": (1, 2),
            "columns": WGMMA_COLUMNS,
            "slices": (1, 2, 4, 8),
            "stages": (3, 4, 5, 6),
            "ahead": (1, 2, 4),
        }
    if isinstance(rule, MatrixGemmSchedule):
        return {
            "block_m": (16, 32, 64, 128),
            "block_n": (32, 64, 128, 256),
            "block_k": (32, 64),
            "warps_m": (1, 2, 4),
            "warps_n": (1, 2, 4),
            "unit": units,
            "instruction": (rule.instruction,),
            "magic": magic,
        }
    return {
        "block_m": (16, 32, 64, 128),
        "block_n": (16, 32, 64, 128),
        "block_k": (8, 16, 32, 64),
        "thread_m": (1, 2, 4, 8),
        "thread_n": (2, 4, 8),
        "unit": units,
        "shared": ("float16", "float32"),
        "magic": magic,
    }


def why_illegal(problem: MatmulProblem, bucket: str, spec: TargetSpec, schedule: Schedule) -> str | None:
    """The first limit that a schedule breaks, None where it is legal. Also asked of records from a database."""
    if not fits_bucket(template_of(schedule), bucket):
        return f"the template {template_of(schedule)} does not serve the bucket {bucket}"
    if isinstance(schedule, GemvSchedule | GemmSchedule):
        if not isinstance(spec, CpuTarget):
            return f"{template_of(schedule)} is for CPUs"
        if isinstance(schedule, GemvSchedule):
            return _why_not_simd_gemv(problem, bucket, spec, schedule)
        return _why_not_simd_gemm(problem, spec, schedule)
    if not isinstance(spec, GpuTarget):
        return f"{template_of(schedule)} is for GPUs"
    return _why_not_gpu(problem, bucket, spec, schedule)


def vectors(lanes: int, spec: CpuTarget) -> int:
    """Registers that a vector of `lanes` takes."""
    return -(-lanes // spec.unit.lanes)


def _why_not_simd_gemv(problem: MatmulProblem, bucket: str, spec: CpuTarget, s: GemvSchedule) -> str | None:
    outputs = s.rows // 2 if problem.epilogue.activation == "silu_mul" else s.rows
    if outputs > max(problem.n, 2):
        return f"{outputs} outputs a step, and there are {problem.n}"
    if bucket == "gemv" and s.batch != 1:
        return f"a batch of {s.batch} rows for one row"
    # Sums of every pair of rows, one row of x, and a vector of decoded weights.
    used = (s.rows * s.batch + 2) * vectors(s.lanes, spec)
    return _over(used, spec.unit.registers, "vector registers", spec.unit.name)


def _why_not_simd_gemm(problem: MatmulProblem, spec: CpuTarget, s: GemmSchedule) -> str | None:
    pairs = problem.epilogue.activation == "silu_mul"
    if s.fit(problem.n, pairs=pairs) != s:
        return f"{s.n_vectors} vectors of {s.lanes} lanes do not fit {problem.n} outputs"
    if s.k_block > max(128, -(-problem.k // 128) * 128):
        return f"blocks of {s.k_block} along K, which has {problem.k}"
    # The sums of a register tile, a row of the panel, and an element of x.
    used = (s.m_tile * s.n_vectors + s.n_vectors + 1) * vectors(s.lanes, spec)
    width = s.n_vectors * s.lanes
    cached = 4 * width * (s.k_block + s.m_block)
    return _over(used, spec.unit.registers, "vector registers", spec.unit.name) or _over(
        cached, _CACHED_BYTES, "bytes of panel and sums", "the cache"
    )


def _why_not_gpu(problem: MatmulProblem, bucket: str, spec: GpuTarget, s: Any) -> str | None:
    limits, name = spec.limits, spec.name
    pairs = problem.epilogue.activation == "silu_mul"
    kn = isinstance(problem.spec, QuantSpec) and problem.spec.order == "KN"
    if isinstance(s, SimtGemvSchedule if kn else ColumnGemvSchedule):
        return f"{template_of(s)} does not read weights in {'KN' if kn else 'NK'}"
    if isinstance(s, MatrixGemvSchedule | StagedMatrixSchedule | WarpgroupSchedule):
        return _why_not_matrix(problem, bucket, spec, s)
    if (reason := _why_not_unit(problem, s)) is not None:
        return reason
    if bucket == "gemv" and s.batch != 1:
        return f"a batch of {s.batch} rows for one row"
    if isinstance(s, SimtGemvSchedule):
        if s.subgroup not in (0, limits.subgroup):
            return f"subgroups of {s.subgroup} threads, and {name} promises {limits.subgroup}"
        if s.k_threads * s.unit > problem.k:
            return f"{s.k_threads} threads of {s.unit} weights along K, which has {problem.k}"
        if not s.shared_bytes and s.subgroup and s.k_threads == 1:
            return "nothing to reduce: the same kernel as without subgroups"
    elif isinstance(s, ColumnGemvSchedule):
        if s.fit(problem.n) != s or s.n_threads * s.columns > max(problem.n, 64):
            return f"{s.n_threads} threads of {s.columns} outputs for {problem.n}"
        if s.k_threads * s.unit > problem.k:
            return f"{s.k_threads} threads of {s.unit} weights along K, which has {problem.k}"
    else:
        if problem.k % s.block_k:
            return f"K = {problem.k} is not a multiple of {s.block_k}"
        if s.block_n // (2 if pairs else 1) > max(problem.n, 64):
            return f"tiles of {s.block_n} columns for {problem.n} outputs"
    if s.threads < _BLOCK_THREADS:
        return f"{s.threads} threads in a block"
    arguments = 2 + len(problem.spec.arrays(problem.weight_rows, problem.k))
    arguments += problem.epilogue.bias + problem.epilogue.residual + 1  # M, where the API takes it as an argument
    return (
        _over(s.threads, limits.max_threads, "threads in a block", name)
        or _over(s.shared_bytes, limits.shared_bytes, "bytes of shared memory", name)
        or _over(registers_of(problem, s), limits.registers, "registers of a thread", name)
        or _over(arguments, limits.arguments, "arguments", name)
    )


def _why_not_matrix(
    problem: MatmulProblem,
    bucket: str,
    spec: GpuTarget,
    s: MatrixGemvSchedule | StagedMatrixSchedule | WarpgroupSchedule,
) -> str | None:
    limits, name = spec.limits, spec.name
    archs = getattr(spec, "archs", ())
    if isinstance(s, WarpgroupSchedule) and archs != ("sm_90",):
        return f"{name} has no wgmma, which is sm_90's alone"
    if isinstance(s, WarpgroupSchedule):
        if not s.divides(problem.k):
            return f"{s.slices} slices for {problem.k // 128} groups"
        if s.ahead > (groups := problem.k // 128 // s.slices):
            return f"{s.ahead} groups ahead, and a slice has {groups}"
    if bucket == "wide" and s.columns > 16:  # which at 256 rows may be faster, and takes as long for 65
        return f"{8 * s.columns} rows of x a block, of which the bucket may have a quarter"
    floats = isinstance(problem.spec, Float16Spec)
    if floats and not isinstance(s, MatrixGemvSchedule):
        return f"{type(s).__name__} does not read {problem.spec.name}"
    if not isinstance(spec.rule(problem).gemv, MatrixGemvSchedule):
        return f"{name} has no tensor cores for {problem.spec.name}"
    if isinstance(s, MatrixGemvSchedule):
        if bucket in FEW_ROWS and s.columns > 1:
            return f"{8 * s.columns} rows of x for at most 8"
        if s.warps > (groups := s.groups(problem)):
            return f"{s.warps} warps for {groups} groups"
        if s.stages > 1 and floats:
            return "float16 weights wait in registers"
    shared, registers = limits.shared_bytes, limits.registers
    if isinstance(s, MatrixGemvSchedule) and s.resident:
        registers = min(registers, _REGISTERS // (s.threads * s.resident))
        most = min((_RESIDENT_THREADS.get(arch, 1024) for arch in archs), default=1024)
        if reason := _over(s.threads * s.resident, most, "resident threads", name):
            return reason
    if isinstance(s, WarpgroupSchedule):
        shared, registers = _HOPPER_SHARED_BYTES, min(registers, _REGISTERS // s.threads)
    return (
        _over(s.threads, limits.max_threads, "threads in a block", name)
        or _over(s.shared_bytes, shared, "bytes of shared memory", name)
        or _over(registers_of(problem, s), registers, "registers of a thread", name)
    )


def _why_not_unit(problem: MatmulProblem, s: Any) -> str | None:
    """Units must be whole words and lie within a group; 3-bit codes come in blocks of 32."""
    if isinstance(problem.spec, Float16Spec):
        if s.unit > 16:
            return f"units of {s.unit} float16 weights, and 16 are 32 bytes"
        return f"K = {problem.k} in units of {s.unit}" if problem.k % s.unit else None
    if problem.spec.bits == 3 and s.unit != 32:
        return f"units of {s.unit} 3-bit codes"
    return None


def registers_of(problem: MatmulProblem, s: Any) -> int:
    """Values of 32 bits that a thread holds at once in its innermost loop, addresses aside."""
    pairs = 2 if problem.epilogue.activation == "silu_mul" else 1
    if isinstance(s, SimtGemvSchedule):  # sums, x, its totals and parts, the words of a row
        return s.rows * s.batch + s.unit * s.batch + 2 * s.batch + _words(problem, s.unit)
    if isinstance(s, MatrixGemvSchedule):  # sums, words read and ahead, x of a group, one row's pairs
        return s.tiles * (8 * s.columns + (32 if isinstance(problem.spec, Float16Spec) else 16 + 8)) + 16
    if isinstance(s, StagedMatrixSchedule):  # sums, words read and ahead, one word's operands
        return s.tiles * (4 * s.columns + 16 + 8) + 24
    if isinstance(s, WarpgroupSchedule):  # sums, words read and ahead, with scales and zero points, two words' operands
        waiting = 1 if isinstance(problem.spec, QuantSpec) and problem.spec.symmetric else 3
        return s.tiles * (4 * s.columns + 8 + (8 + waiting) * s.ahead + 16) + 16
    if isinstance(s, ColumnGemvSchedule):
        return s.columns * s.batch * pairs + s.unit * s.batch + 2 * s.batch + s.columns * _words(problem, s.unit)
    if isinstance(s, SimtGemmSchedule):
        return s.thread_m * s.thread_n + s.thread_m + s.thread_n + _words(problem, s.unit)
    assert isinstance(s, MatrixGemmSchedule)
    m, n, k = s.shape
    a, b = s.block_m // s.warps_m // m, s.block_n // s.warps_n // n  # instructions of a warp
    return (a * b * m * n + a * m * k // 2 + b * n * k // 2) // 32


def _words(problem: MatmulProblem, unit: int) -> int:
    spec = problem.spec
    return unit // 2 if isinstance(spec, Float16Spec) else unit * spec.bits // 32


def _over(used: int, limit: int, what: str, whose: str) -> str | None:
    return f"{used} {what}, and {whose} has {limit}" if used > limit else None
