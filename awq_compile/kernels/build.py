"""From a `MatmulProblem` and its schedule to one scheduled PrimFunc that dispatches on the rows M."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from awq_compile.errors import CompileError
from awq_compile.formats import QuantSpec
from awq_compile.kernels.column_gemv import emit_column_gemv
from awq_compile.kernels.linear import LinearArgs, linear_function
from awq_compile.kernels.mma_gemm import emit_mma_gemm
from awq_compile.kernels.mma_gemv import emit_mma_gemv
from awq_compile.kernels.mma_staged import emit_mma_staged
from awq_compile.kernels.simd_gemm import emit_gemm
from awq_compile.kernels.simd_gemv import emit_gemv
from awq_compile.kernels.simdgroup_gemm import emit_simdgroup_gemm
from awq_compile.kernels.simt_gemm import emit_simt_gemm
from awq_compile.kernels.simt_gemv import emit_simt_gemv
from awq_compile.kernels.wgmma_gemm import emit_wgmma_gemm
from awq_compile.problem import FEW_ROWS, ROW_BUCKETS, MatmulProblem
from awq_compile.schedules import (
    ColumnGemvSchedule,
    FewRows,
    GemmSchedule,
    GemvSchedule,
    LinearSchedule,
    ManyRows,
    MatrixGemmSchedule,
    MatrixGemvSchedule,
    SimtGemvSchedule,
    StagedMatrixSchedule,
    WarpgroupSchedule,
)


def scheduled_linear(problem: MatmulProblem, schedule: LinearSchedule, *, planned: bool = False) -> Any:
    """The quantised linear: one function, a kernel for each bucket of rows, by the template of its schedule.

    `planned`: where x is arranged first, that memory is an argument, else a workspace of the runtime's.
    """
    check_order(problem, *schedule.by_bucket.values())
    attrs = {"tirx.is_scheduled": True}
    arranged = planned and schedule.arranges
    # Without rows nothing is launched: of a grid without blocks TVM's runtime makes one block, which would read x.
    with linear_function(problem, attrs, arranged=arranged) as (builder, args), T.If(args.m > 0), T.Then():
        _by_rows(args, list(schedule.by_bucket.items()))
    return builder.get()


def _by_rows(args: LinearArgs, buckets: list[tuple[str, FewRows | ManyRows]]) -> None:
    (bucket, schedule), *larger = buckets
    if not larger:
        _kernel(args, bucket, schedule)
        return
    with T.If(args.m <= ROW_BUCKETS[bucket]):
        with T.Then():
            _kernel(args, bucket, schedule)
        with T.Else():
            _by_rows(args, larger)


def _kernel(args: LinearArgs, bucket: str, schedule: FewRows | ManyRows) -> None:
    if bucket in FEW_ROWS:
        _few_rows(args, schedule, ROW_BUCKETS[bucket])  # type: ignore[arg-type]
    else:
        _many_rows(args, schedule)  # type: ignore[arg-type]


def bucket_linear(problem: MatmulProblem, bucket: str, schedule: FewRows | ManyRows) -> Any:
    """The kernel of one bucket of rows alone, without the dispatch: what tuning builds. It serves M of that bucket."""
    check_order(problem, schedule)
    with linear_function(problem, {"tirx.is_scheduled": True}) as (builder, args):
        _kernel(args, bucket, schedule)
    return builder.get()


def check_order(problem: MatmulProblem, *schedules: FewRows | ManyRows) -> None:
    """Raises `CompileError` for a template that does not read the weights' order, or does not take K whole."""
    kn = isinstance(problem.spec, QuantSpec) and problem.spec.order == "KN"
    nk_only = (
        *(GemvSchedule, GemmSchedule, SimtGemvSchedule),
        *(MatrixGemvSchedule, StagedMatrixSchedule, WarpgroupSchedule),
    )
    for chosen in schedules:
        block = getattr(chosen, "block_k", 1)
        if problem.k % block:
            raise CompileError(f"{problem.name}: K = {problem.k} is not a multiple of the block of {block}")
        if isinstance(chosen, nk_only) if kn else isinstance(chosen, ColumnGemvSchedule):
            raise CompileError(f"{problem.name}: {type(chosen).__name__} does not read {'KN' if kn else 'NK'} weights")


def _few_rows(args: LinearArgs, schedule: FewRows, max_rows: int) -> None:
    if isinstance(schedule, GemvSchedule):
        emit_gemv(args, schedule, max_rows)
    elif isinstance(schedule, MatrixGemvSchedule):
        emit_mma_gemv(args, schedule, max_rows)
    elif isinstance(schedule, ColumnGemvSchedule):
        emit_column_gemv(args, schedule, max_rows)
    else:
        emit_simt_gemv(args, schedule, max_rows)


def _many_rows(args: LinearArgs, schedule: ManyRows) -> None:
    if isinstance(schedule, GemmSchedule):
        emit_gemm(args, schedule)
    elif isinstance(schedule, MatrixGemvSchedule):
        emit_mma_gemv(args, schedule, None)
    elif isinstance(schedule, StagedMatrixSchedule):
        emit_mma_staged(args, schedule)
    elif isinstance(schedule, WarpgroupSchedule):
        emit_wgmma_gemm(args, schedule)
    elif isinstance(schedule, MatrixGemmSchedule):
        emit = emit_simdgroup_gemm if schedule.instruction == "simdgroup8x8" else emit_mma_gemm
        emit(args, schedule)
    else:
        emit_simt_gemm(args, schedule)
