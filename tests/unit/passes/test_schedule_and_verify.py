"""`ApplySchedules` schedules every quantised linear; `VerifyQuantized` names whatever survived."""

from __future__ import annotations

from typing import Any

import pytest
from helpers_passes import block_module, block_plan, check_golden
from tvm import relax

from awq_compile.errors import CompileError
from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import TAG, reference_linear
from awq_compile.passes.apply_schedules import ApplySchedules
from awq_compile.passes.base import add_prim_func, copy
from awq_compile.passes.fuse_epilogue import FuseEpilogue
from awq_compile.passes.quantize_linears import QuantizeLinears
from awq_compile.passes.verify_quantized import VerifyQuantized
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import GemmSchedule, GemvSchedule, LinearSchedule

SPEC = QuantSpec(4, 32)
PLAN = block_plan(SPEC)


def choose(problem: MatmulProblem) -> LinearSchedule:
    """One schedule for all."""
    del problem
    return LinearSchedule(GemvSchedule(4, 2), GemvSchedule(4, 2, 2), GemmSchedule(4, 2, 2, 128, 4))


def scheduled() -> Any:
    """The block, through all passes."""
    module = FuseEpilogue().as_tvm()(QuantizeLinears(PLAN).as_tvm()(block_module()))
    return ApplySchedules(choose).as_tvm()(module)


def test_every_linear_is_scheduled_once() -> None:
    """The tag and the signature stay, and the body is the template's."""
    module = scheduled()
    tagged = [f for f in module.functions.values() if f.attrs and TAG in f.attrs]
    assert len(tagged) == 4
    assert all("tirx.is_scheduled" in f.attrs for f in tagged)
    assert VerifyQuantized(PLAN).survivors(module) == []


def test_golden_ir() -> None:
    """The three kernels of one small linear, instruction by instruction."""
    module = scheduled()
    name = "qmatmul_w4g32_n64_k96_residual"
    only = copy(module)
    for var in module.get_global_vars():
        if var.name_hint != name:
            del only[var]
    check_golden("apply_schedules", only)


def survivors(module: Any) -> str:
    """What the pass says when it fails."""
    with pytest.raises(CompileError) as caught:
        VerifyQuantized(PLAN).run(module)
    return str(caught.value)


def test_an_unquantised_matmul_is_named() -> None:
    """A plan that one function did not follow."""
    partly = QuantizeLinears({k: v for k, v in PLAN.items() if k != "down.weight"}).as_tvm()(block_module())
    said = survivors(ApplySchedules(choose).as_tvm()(partly))
    assert "run still takes down.weight in floating point" in said
    assert "run does not take down.q_weight" in said
    assert "without quantising it" in said


def test_an_unscheduled_linear_is_named() -> None:
    """It would run as three nested scalar loops."""
    assert "qmatmul_w4g32_n64_k96 has no schedule" in survivors(QuantizeLinears(PLAN).as_tvm()(block_module()))


def test_a_dequantise_outside_its_matmul_is_named() -> None:
    """A PrimFunc that reads packed words and is no quantised linear."""
    module = copy(scheduled())
    stray = reference_linear(MatmulProblem(64, 32, SPEC)).without_attr(TAG)
    add_prim_func(module, stray, "stray")
    assert "stray dequantises outside its matmul" in survivors(module)


def test_the_module_passes_through_unchanged() -> None:
    """A check, not a rewrite."""
    module = scheduled()
    assert VerifyQuantized(PLAN).run(module) is module
    assert isinstance(module["run"], relax.Function)
