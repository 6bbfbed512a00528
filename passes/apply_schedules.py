"""`ApplySchedules`: every quantised linear's reference PrimFunc becomes the scheduled one of the target.

Before, `qmatmul_w4g128_n4096_k2048` is the unscheduled reference; after, it is one function that dispatches
on the rows M to a GEMV, a small-batch and a GEMM kernel, each with its own schedule:

    if m == 1: …    elif m <= 8: …    else: …

Where one of them has x arranged first, the function takes the memory for it as a second result, so that Relax plans it:

    y = R.call_tir(qmatmul, (x, …), [R.Tensor((m, n)), R.Tensor((2303, k))])[0]        where m is 2048 at most

`choose` gives the schedules of a problem and says where each came from; `CompileReport` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm import relax

from awq_compile.kernels.build import scheduled_linear
from awq_compile.kernels.linear import TAG
from awq_compile.passes.base import RelaxPass, add_prim_func, block_like, called_op, copy, relax_functions, with_blocks
from awq_compile.passes.memory_usage import bounds_of, most
from awq_compile.problem import MatmulProblem, decode_problem
from awq_compile.schedules import ARRANGED_BEHIND, LinearSchedule


@dataclass(frozen=True)
class ApplySchedules(RelaxPass):
    """`choose(problem)` gives the schedule of each bucket of rows."""

    choose: Callable[[MatmulProblem], LinearSchedule]

    def run(self, module: Any) -> Any:
        """See the module docstring."""
        result, changed = copy(module), {}
        for var, function in module.functions.items():
            if function.attrs and TAG in function.attrs:
                problem = decode_problem(str(function.attrs[TAG]))
                schedule = self.choose(problem)
                new = scheduled_linear(problem, schedule, planned=True)
                if not schedule.arranges:
                    result[var] = new
                    continue
                del result[var]  # its type is another now
                changed[var] = add_prim_func(result, new, str(var.name_hint))
        for var, function in relax_functions(module) if changed else ():
            bounds = bounds_of(function)
            blocks = [
                block_like(block, [new for old in block.bindings for new in _binding(old, changed, block, bounds)])
                for block in function.body.blocks
            ]
            result[var] = with_blocks(function, blocks)
        return result


def _binding(binding: Any, changed: Mapping[Any, Any], block: Any, bounds: Mapping[str, int]) -> list[Any]:
    """With a second result where the callee takes one."""
    value = binding.value
    if called_op(value) != "relax.call_tir" or value.args[0] not in changed:
        return [binding]
    assert len(value.args) == 2, value
    arguments = list(value.args[1].fields)
    m, k = arguments[0].ty.shape
    rows = (most(m, bounds) or m) + ARRANGED_BEHIND
    results = [value.ty_args[0], relax.TensorType((rows, k), arguments[0].ty.dtype)]
    variable = relax.DataflowVar if isinstance(block, relax.DataflowBlock) else relax.Var
    both = variable("both", relax.TupleType(results))
    return [
        relax.VarBinding(both, relax.call_tir(changed[value.args[0]], arguments, results)),
        relax.VarBinding(binding.var, relax.TupleGetItem(both, 0)),
    ]
