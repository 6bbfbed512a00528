"""`ApplySchedules`: every quantised linear's reference PrimFunc becomes the scheduled one of the target.

Before, `qmatmul_w4g128_n4096_k2048` is the unscheduled reference; after, it is one function that dispatches
on the rows M to a GEMV, a small-batch and a GEMM kernel, each with its own schedule:

    if m == 1: …    elif m <= 8: …    else: …

`choose` gives the schedules of a problem and says where each came from; `CompileReport` shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from awq_compile.kernels.build import scheduled_linear
from awq_compile.kernels.linear import TAG
from awq_compile.passes.base import RelaxPass, copy
from awq_compile.problem import MatmulProblem, decode_problem
from awq_compile.schedules import LinearSchedule


@dataclass(frozen=True)
class ApplySchedules(RelaxPass):
    """`choose(problem)` gives the schedule of each bucket of rows."""

    choose: Callable[[MatmulProblem], LinearSchedule]

    def run(self, module: Any) -> Any:
        """See the module docstring."""
        result = copy(module)
        for var, function in module.functions.items():
            if function.attrs and TAG in function.attrs:
                problem = decode_problem(str(function.attrs[TAG]))
                result[var] = scheduled_linear(problem, self.choose(problem))
        return result
