"""The memory of a function is that of its planned storages and its results, at the bounds of its sizes."""

from __future__ import annotations

import tvm
from tvm.relax import transform as t
from tvm.script import ir as I
from tvm.script import relax as R

from awq_compile.passes.memory_usage import memory_usage


@I.ir_module
class Steps:
    """Two sums that share a storage after the third, and a result."""

    @R.function
    def step(x: R.Tensor(("n", 8), "float32")) -> R.Tensor(("n", 8), "float16"):
        R.func_attr({"tir_var_upper_bound": {"n": 10}})
        with R.dataflow():
            a = R.add(x, x)
            b = R.add(a, x)
            c = R.add(b, x)
            out = R.astype(c, "float16")
            R.output(out)
        return out

    @R.function
    def unbounded(x: R.Tensor(("rows", 8), "float32")) -> R.Tensor(("rows", 8), "float32"):
        with R.dataflow():
            out = R.add(x, x)
            R.output(out)
        return out


def test_temporaries_and_results_are_counted() -> None:
    passes = (
        t.LegalizeOps(),
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        t.LowerAllocTensor(),
    )
    planned = tvm.transform.Sequential(passes)(Steps)
    temporary, result = 10 * 8 * 4, 10 * 8 * 2
    assert memory_usage(planned) == {"step": 2 * temporary + result, "unbounded": 0}
