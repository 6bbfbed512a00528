"""The memory of a function is that of its planned storages and its results, at the bounds of its sizes."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax, tirx
from tvm.relax import transform as t
from tvm.script import ir as I
from tvm.script import relax as R

from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import reference_linear
from awq_compile.models.kv_cache import ATTENTION
from awq_compile.passes.apply_schedules import ApplySchedules
from awq_compile.passes.memory_usage import memory_usage
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import LinearSchedule, MatrixGemvSchedule, StagedMatrixSchedule, WarpgroupSchedule


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


PLANS = (
    t.LegalizeOps(),
    t.ToNonDataflow(),
    t.RemovePurityChecking(),
    t.CallTIRRewrite(),
    t.StaticPlanBlockMemory(),
    t.LowerAllocTensor(),
)


@pytest.mark.parametrize("wide", [False, True])
def test_memory_for_arranging_x_is_planned(wide: bool) -> None:
    """A linear that a kernel for warpgroups serves has a second result of its rows and a block's."""
    problem = MatmulProblem(64, 128, QuantSpec(4, 128), dtype="float16")
    few = MatrixGemvSchedule(1)
    chosen = LinearSchedule(few, few, WarpgroupSchedule(1, 1, 16) if wide else StagedMatrixSchedule(1, 1, 8))
    builder = relax.BlockBuilder()
    n = tirx.Var("n", "int64")
    arrays = [relax.Var(name, R.Tensor(*given)) for name, given in problem.spec.arrays(64, 128).items()]
    x = relax.Var("x", R.Tensor((n, 128), "float16"))
    with builder.function("step", [x, *arrays], attrs={"tir_var_upper_bound": {"n": 10}}):
        kernel = builder.add_func(reference_linear(problem), problem.name)
        with builder.dataflow():
            y = builder.emit(relax.call_tir(kernel, [x, *arrays], R.Tensor((n, 64), "float16")))
            out = builder.emit_output(relax.op.add(y, y))
        builder.emit_func_output(out)
    module = ApplySchedules(lambda _: chosen).as_tvm()(builder.finalize())
    result, product, arranged = 10 * 64 * 2, 10 * 64 * 2, (10 + 255) * 128 * 2
    planned = tvm.transform.Sequential(PLANS)(module)
    assert memory_usage(planned) == {"step": result + product + (arranged if wide else 0)}


def test_temporaries_and_results_are_counted() -> None:
    planned = tvm.transform.Sequential(PLANS)(Steps)
    temporary, result = 10 * 8 * 4, 10 * 8 * 2
    assert memory_usage(planned) == {"step": 2 * temporary + result, "unbounded": 0}


def test_what_attends_has_the_workspace_of_attention() -> None:
    """Once, for the runtime gives the same memory to every layer; other functions have none."""
    builder = relax.BlockBuilder()
    for name, layers in (("decode", 2), ("get_logits", 0)):
        cache, x = relax.Var("cache", relax.AnyType()), relax.Var("x", R.Tensor((4, 8), "float32"))
        with builder.function(name, [cache, x]):
            with builder.dataflow():
                y = builder.emit(relax.op.add(x, x))
                for layer in range(layers):
                    call = relax.call_dps_packed(ATTENTION, [cache, relax.prim_value(layer), y], out_ty=x.ty)
                    y = builder.emit(call)
                out = builder.emit_output(relax.op.add(y, x))
            builder.emit_func_output(out)
    planned = tvm.transform.Sequential(PLANS)(builder.finalize())
    without, found = memory_usage(planned), memory_usage(planned, attention=1000)
    assert found == {"decode": without["decode"] + 1000, "get_logits": without["get_logits"]}
