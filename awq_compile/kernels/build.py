"""From a `MatmulProblem` and its schedule to one scheduled PrimFunc that dispatches on the rows M."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.linear import linear_function
from awq_compile.kernels.simd_gemm import emit_gemm
from awq_compile.kernels.simd_gemv import emit_gemv
from awq_compile.problem import SMALL_ROWS, MatmulProblem
from awq_compile.schedules import LinearSchedule


def simd_linear(problem: MatmulProblem, schedule: LinearSchedule) -> Any:
    """The quantised linear for machines with vector registers: one function, three kernels."""
    with linear_function(problem, {"tirx.is_scheduled": True}) as (builder, args), T.If(args.m == 1):
        with T.Then():
            emit_gemv(args, schedule.gemv, 1)
        with T.Else(), T.If(args.m <= SMALL_ROWS):
            with T.Then():
                emit_gemv(args, schedule.small, SMALL_ROWS)
            with T.Else():
                emit_gemm(args, schedule.gemm)
    return builder.get()
