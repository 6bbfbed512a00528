"""How much memory each function of a planned module takes, for `_metadata`.

    storage = R.memory.alloc_storage(R.shape([n * 256]), …)    with tir_var_upper_bound = {"n": 512}
    → 131072 bytes

MLC's own estimate leaves every storage of symbolic size out, and so all results, for those are not planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tvm import relax, sym
from tvm.ir import Range
from tvm.tirx.analysis import undefined_vars

from awq_compile.models.kv_cache import ATTENTION
from awq_compile.passes.base import IRModule, bindings_of, called_op, relax_functions

_BOUNDS: Final = "tir_var_upper_bound"


def memory_usage(module: IRModule, *, attention: int = 0) -> dict[str, int]:
    """Bytes that each Relax function allocates when its sizes are at their upper bounds, results included.

    `module` has its storages planned and its tensors lowered to storages (`StaticPlanBlockMemory`,
    `LowerAllocTensor`). What has no bound is left out: only a sampler's rows, which are few.

    TVM's runtime keeps the workspaces that it gives to PrimFuncs. Those of the KV cache's kernels, `attention` bytes,
    count for every function that attends: the runtime chooses the kernels by the lengths. A sampler's are left out.
    """
    usage = {}
    for var, function in relax_functions(module):
        bounds, values = bounds_of(function), [binding.value for binding in bindings_of(function)]
        storages = (value for value in values if called_op(value) == "relax.memory.alloc_storage")
        planned = sum(most(storage.args[0].values[0], bounds) for storage in storages)
        usage[str(var.name_hint)] = planned + (attention if any(map(_attends, values)) else 0)
    return usage


def _attends(value: Any) -> bool:
    callee = value.op if isinstance(value, relax.Call) else None
    return isinstance(callee, relax.ExternFunc) and str(callee.global_symbol) == ATTENTION


def bounds_of(function: Any) -> dict[str, int]:
    """The largest value of each size of a Relax function, by name."""
    return {str(name): int(bound) for name, bound in (function.attrs or {}).get(_BOUNDS, {}).items()}


def most(size: Any, bounds: Mapping[str, int]) -> int:
    """The largest value of an expression, 0 where it has none."""
    analyzer = sym.Analyzer()
    for var in undefined_vars(size):
        if str(var.name) not in bounds:
            return 0
        analyzer.bind(var, Range(0, bounds[str(var.name)] + 1))
    return int(analyzer.const_int_bound(size).max_value)
