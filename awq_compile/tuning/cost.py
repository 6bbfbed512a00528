"""An analytical model: the roofline of a problem, and an estimate of each schedule that ranks them.

    t = max(bytes / (bandwidth e), instructions / (rate o)) + fixed

bytes count what the kernel asks of memory, e is the share of each transaction that it uses (coalescing) and o the
share of the machine that has work (occupancy, the last wave, a unit's idle lanes). Instructions are those of the
innermost loops of `kernels/`, per weight and per row of x. The model is for order, not for seconds: a search
starts with its first, and measures.
"""

from __future__ import annotations

import math
from typing import Final

from awq_compile.formats import Float16Spec, QuantSpec
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import (
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
from awq_compile.targets.roofs import Roof
from awq_compile.tuning.space import registers_of, vectors
from awq_compile.tuning.templates import Schedule

_SECTOR: Final = 32  # bytes of a memory transaction: CUDA C++ Best Practices Guide, "Coalesced Access to Global Memory"
_RESIDENT_REGISTERS: Final = 1 << 16  # of a multiprocessor: CUDA C++ Programming Guide, 7.5 to 12.0
_RESIDENT_THREADS: Final = 1 << 11
_ADDRESSES: Final = 24  # registers for addresses and indices, beside the values that `registers_of` counts
_BARRIER_SECONDS: Final = 50e-9
_L1_BYTES: Final = 32 << 10


def flops(problem: MatmulProblem, rows: int) -> float:
    """Of the products and sums, a multiply-add as two."""
    return 2.0 * rows * problem.weight_rows * problem.k


def least_bytes(problem: MatmulProblem, rows: int) -> float:
    """Of W once, x once, y once, and what the epilogue reads."""
    of_x, of_y = ({"float16": 2, "float32": 4}[dtype] for dtype in (problem.dtype, problem.out_dtype))
    residual = of_x if problem.epilogue.residual else 0
    matrices = rows * (problem.k * of_x + problem.n * (of_y + residual))
    return problem.weight_nbytes + matrices + (2 * problem.n if problem.epilogue.bias else 0)


def roofline_seconds(problem: MatmulProblem, rows: int, roof: Roof) -> float:
    """No kernel can be faster: every byte once and every multiply-add, each at its full rate.

    Williams, Waterman and Patterson, "Roofline" (2009).
    """
    peak = max(roof.flops_per_second, roof.matrix_flops_per_second)
    return max(least_bytes(problem, rows) / roof.bytes_per_second, flops(problem, rows) / peak)


def estimate(problem: MatmulProblem, rows: int, spec: TargetSpec, schedule: Schedule, roof: Roof) -> float:
    """Seconds that a schedule should take, for comparison with others of the same problem."""
    if isinstance(spec, CpuTarget):
        if isinstance(schedule, GemvSchedule):
            return _simd_gemv(problem, rows, spec, schedule, roof)
        assert isinstance(schedule, GemmSchedule)
        return _simd_gemm(problem, rows, spec, schedule, roof)
    assert isinstance(spec, GpuTarget)
    if isinstance(schedule, SimtGemvSchedule | ColumnGemvSchedule):
        return _gpu_gemv(problem, rows, schedule, roof)
    if isinstance(schedule, MatrixGemvSchedule):
        return _matrix_gemv(problem, rows, schedule, roof)
    if isinstance(schedule, StagedMatrixSchedule | WarpgroupSchedule):
        return _staged_matrix(problem, rows, schedule, roof)
    assert isinstance(schedule, SimtGemmSchedule | MatrixGemmSchedule)
    return _gpu_gemm(problem, rows, schedule, roof)


def ranked(
    problem: MatmulProblem, rows: int, spec: TargetSpec, schedules: tuple[Schedule, ...], roof: Roof
) -> list[Schedule]:
    """The schedules, best estimate first; equal ones keep their order."""
    return sorted(schedules, key=lambda s: estimate(problem, rows, spec, s, roof))


def code_size(schedule: Schedule) -> int:
    """Instructions of the unrolled loops, for comparison within a template: compilers take that much longer.

    Zero for templates of matrix instructions, whose code is short.
    """
    if isinstance(schedule, GemvSchedule):
        return schedule.rows * schedule.batch
    if isinstance(schedule, GemmSchedule):
        return schedule.n_vectors * (schedule.m_tile + 4)  # a vector of W is loaded and decoded
    if isinstance(schedule, SimtGemvSchedule):
        return schedule.rows * schedule.unit * (schedule.batch + 1)
    if isinstance(schedule, ColumnGemvSchedule):
        return schedule.columns * schedule.unit * (schedule.batch + 1)
    return schedule.thread_m * schedule.thread_n + schedule.unit if isinstance(schedule, SimtGemmSchedule) else 0


def _decode(problem: MatmulProblem, magic: bool = False) -> float:
    """Instructions that turn a stored weight into float32: mask or shift, convert."""
    if isinstance(problem.spec, Float16Spec):
        return 1.0
    return {3: 6.0, 4: 2.0, 8: 2.0}[problem.spec.bits] + (0.0 if magic else 0.5)


def _simd_gemv(p: MatmulProblem, rows: int, spec: CpuTarget, s: GemvSchedule, roof: Roof) -> float:
    rate = roof.flops_per_second / (2 * spec.unit.lanes)  # vector instructions a second
    per_weight = _decode(p) + s.batch * (1 + 1 / s.rows)  # multiply-adds, and loads of x shared by the rows
    group = p.spec.group if isinstance(p.spec, QuantSpec) else p.k
    per_group = (6 + 4 * s.batch) * vectors(s.lanes, spec)  # scales, shifts, and the sums of a group
    used = vectors(s.lanes, spec)
    lanes_used = min(s.lanes, spec.unit.lanes) / spec.unit.lanes
    tiles = math.ceil(rows / s.batch)
    weights = p.weight_rows * p.k
    count = tiles * (weights * per_weight / (spec.unit.lanes * lanes_used) + weights / group * per_group / 4)
    spilled = max(0, (s.rows * s.batch * 2 + s.batch) * used - spec.unit.registers)
    count *= 1 + 0.05 * spilled
    fetched = {0: 0.8, 1: 1.0, 2: 1.0}.get(s.prefetch, 0.95)
    memory = least_bytes(p, rows) / (roof.bytes_per_second * fetched)
    return max(memory, count / rate) + 0.2 * min(memory, count / rate)


def _simd_gemm(p: MatmulProblem, rows: int, spec: CpuTarget, s: GemmSchedule, roof: Roof) -> float:
    rate = roof.flops_per_second / (2 * spec.unit.lanes)
    lanes_used = min(s.lanes, spec.unit.lanes) / spec.unit.lanes
    width = s.n_vectors * s.lanes
    columns = math.ceil(p.weight_rows / width) * width
    padded = math.ceil(rows / s.m_tile) * s.m_tile
    multiply = padded * columns * p.k / (spec.unit.lanes * lanes_used)
    # Loads of x and of the panel beside each row of multiply-adds: two loads go with two of them.
    used = vectors(s.lanes, spec) * s.n_vectors
    loads = (s.m_tile + used) / (s.m_tile * used)
    multiply *= max(1.0, loads) * (1 + 0.5 / min(s.m_tile * used, 8))  # fewer sums than the latency are waited for
    if 4 * width * s.k_block > _L1_BYTES:
        multiply *= 1.1
    decoded = math.ceil(rows / s.m_block) * columns * p.k * (_decode(p) + 3) / (spec.unit.lanes * lanes_used)
    kept = 4 * padded * columns * math.ceil(p.k / s.k_block) / (spec.unit.lanes * lanes_used)
    return (multiply + decoded + kept) / rate


def _parallel(blocks: int, threads: int, registers: int, shared: int, roof: Roof) -> tuple[float, float]:
    """(share of the resident threads that fit, share of the units that have work in all waves)."""
    fit = min(_RESIDENT_THREADS // threads, _RESIDENT_REGISTERS // (threads * registers), 32)
    if shared:
        fit = min(fit, (100 << 10) // shared)
    fit = max(fit, 1)
    waves = blocks / (roof.units * fit)
    return fit * threads / _RESIDENT_THREADS, waves / math.ceil(waves)


def _gpu_gemv(p: MatmulProblem, rows: int, s: SimtGemvSchedule | ColumnGemvSchedule, roof: Roof) -> float:
    pairs = p.epilogue.activation == "silu_mul"
    bits = 16 if isinstance(p.spec, Float16Spec) else p.spec.bits
    if isinstance(s, ColumnGemvSchedule):
        per_block, per_thread = s.n_threads * s.columns, s.columns * (2 if pairs else 1)
        run = s.n_threads * s.columns * 4  # bytes side by side that the threads of a block read at once
        along_k = s.k_threads
    else:
        outputs = max(s.rows // 2, 1) if pairs else s.rows
        per_block, per_thread = outputs * s.row_groups, s.rows
        run = s.k_threads * s.unit * bits // 8
        along_k = s.k_threads
    tiles = math.ceil(rows / s.batch)
    blocks = math.ceil(p.n / per_block) * tiles
    occupancy, waves = _parallel(blocks, s.threads, registers_of(p, s) + _ADDRESSES, s.shared_bytes, roof)
    coalesced = run / (math.ceil(run / _SECTOR) * _SECTOR)
    memory = tiles * least_bytes(p, rows) / (roof.bytes_per_second * coalesced * min(1.0, 2 * occupancy))
    # Per weight: decoding, a multiply-add for each row of x; x is loaded, widened and summed once for all rows of W.
    of_code, of_x = _decode(p, s.magic), 3.0
    if isinstance(s, SimtGemvSchedule) and s.in_place and not isinstance(p.spec, Float16Spec):
        of_code, of_x = of_code - 1, of_x + 1
    per_weight = of_code + s.batch + of_x * s.batch / per_thread + 8 / s.unit
    weights = p.weight_rows * p.k * tiles
    idle = math.ceil(p.k / (along_k * s.unit)) * along_k * s.unit / p.k
    sums = blocks * s.threads * per_thread * s.batch * math.log2(max(along_k, 2)) * (2 if s.shared_bytes else 1)
    compute = (weights * per_weight * idle + sums) / (roof.flops_per_second / 2 * min(1.0, 4 * occupancy))
    return max(memory, compute) / waves + (_BARRIER_SECONDS * math.log2(max(along_k, 2)) if s.shared_bytes else 0)


def _matrix_gemv(p: MatmulProblem, rows: int, s: MatrixGemvSchedule, roof: Roof) -> float:
    outputs = (8 if p.epilogue.activation == "silu_mul" else 16) * s.tiles
    across = math.ceil(rows / (8 * s.columns))
    blocks = math.ceil(p.n / outputs) * across
    registers = registers_of(p, s) + _ADDRESSES
    if s.resident:
        registers = min(registers, _RESIDENT_REGISTERS // (s.threads * s.resident))
    occupancy, waves = _parallel(blocks, s.threads, registers, s.shared_bytes, roof)
    in_flight = min(1.0, blocks * s.warps * s.stages / (32 * roof.units)) * min(1.0, 2 * occupancy)
    memory = least_bytes(p, rows) / (roof.bytes_per_second * in_flight)
    # Nine instructions decode a word of eight INT4; loads and pairs of x are shared by the tiles.
    per_weight = (0.1 if isinstance(p.spec, Float16Spec) else 1.2) + s.columns * (0.15 + 0.6 / s.tiles)
    compute = p.weight_rows * p.k * across * per_weight / (roof.flops_per_second / 2 * min(1.0, 4 * occupancy))
    return max(memory, compute) / waves + _BARRIER_SECONDS * s.warps * s.tiles * s.columns


def _staged_matrix(p: MatmulProblem, rows: int, s: StagedMatrixSchedule | WarpgroupSchedule, roof: Roof) -> float:
    wide = isinstance(s, WarpgroupSchedule)
    slices = s.slices if isinstance(s, WarpgroupSchedule) else 1
    warps = s.threads // 32 // slices
    outputs = (8 if p.epilogue.activation == "silu_mul" else 16) * s.tiles * warps
    blocks = math.ceil(p.n / outputs) * math.ceil(rows / (8 * s.columns))
    occupancy, waves = _parallel(blocks, s.threads, registers_of(p, s) + _ADDRESSES, s.shared_bytes, roof)
    # mma.sync reaches two thirds of what wgmma does.
    products = blocks * 16 * s.tiles * warps * 8 * s.columns * p.k * (1.0 if wide else 1.5)
    # Thirteen instructions decode and scale a word of eight weights; pairs of x are shared by tiles, or made once.
    pairs = 0 if wide else s.columns * 8 * 0.8 * warps
    others = blocks * p.k * (s.tiles * 16 * warps * 1.7 + pairs)
    compute = 2 * products / (roof.matrix_flops_per_second or roof.flops_per_second)
    compute += others / (roof.flops_per_second / 2)
    barriers = p.k / 64 / slices * _BARRIER_SECONDS * math.ceil(blocks / roof.units) / s.stages
    traffic = blocks * p.k * (s.columns * 16 + warps * s.tiles * 8)
    memory = traffic / (4 * roof.bytes_per_second)
    return max(compute / min(1.0, 8 * occupancy), memory) / waves + barriers


def _gpu_gemm(p: MatmulProblem, rows: int, s: SimtGemmSchedule | MatrixGemmSchedule, roof: Roof) -> float:
    across = math.ceil(p.weight_rows / s.block_n)
    blocks = across * math.ceil(rows / s.block_m)
    occupancy, waves = _parallel(blocks, s.threads, registers_of(p, s) + _ADDRESSES, s.shared_bytes, roof)
    tile = s.block_m * s.block_n * p.k * blocks
    staged = blocks * p.k * (s.block_n * (_decode(p, s.magic) + 2 + 8 / s.unit) + s.block_m * 2)
    if isinstance(s, SimtGemmSchedule):
        loads = (s.thread_m + s.thread_n) / (s.thread_m * s.thread_n) * (2 if s.shared == "float16" else 1)
        compute = tile * (1 + loads) / (roof.flops_per_second / 2)
    else:
        m, n, _ = s.shape
        a, b = s.block_m // s.warps_m // m, s.block_n // s.warps_n // n
        compute = 2 * tile * (1 + 0.5 * (a + b) / (a * b)) / (roof.matrix_flops_per_second or roof.flops_per_second)
    compute += staged / (roof.flops_per_second / 2)
    barriers = 2 * p.k / s.block_k * _BARRIER_SECONDS * math.ceil(blocks / roof.units)
    traffic = blocks * p.k * (s.block_m * 2 + s.block_n * p.weight_nbytes / (p.weight_rows * p.k))
    memory = traffic / (4 * roof.bytes_per_second)  # most of it from the second-level cache
    return max(compute / min(1.0, 4 * occupancy), memory) / waves + barriers
