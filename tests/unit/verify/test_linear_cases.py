"""One pass over W for many x gives what each of them gives alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from helpers_models import DEMO

from awq_compile.formats import Float16Spec, QuantSpec, WeightSpec
from awq_compile.kernels.build import scheduled_linear
from awq_compile.models.config import read_config
from awq_compile.problem import MatmulProblem, encode_problem
from awq_compile.targets import resolve_target
from awq_compile.verify.case import Case, Expected, arrays_after, call_arguments, judge, same_bytes
from awq_compile.verify.launch_table import kernels_of, run_prim_func
from awq_compile.verify.oracles import linear as oracle
from awq_compile.verify.record import LaunchRecorder
from awq_compile.verify.roles import roles_of


@pytest.mark.parametrize("spec", [QuantSpec(4, 32, False), QuantSpec(4, 32, order="KN"), Float16Spec()])
def test_products_of_all(spec: WeightSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the x, of which some are bounded as few rows and some as many."""
    monkeypatch.setattr(oracle, "_BLOCK", 16 * 64)
    problem, rng = MatmulProblem(50, 64, spec, dtype="float16"), np.random.default_rng(0)
    matrix = oracle.random_matrix(spec, 50, 64, rng)
    xs = [rng.standard_normal((m, 64)).astype(np.float16) for m in (1, 37, 8, 9)]
    found = list(oracle.products_of_all(problem, xs, matrix))
    assert len(found) == len(xs)
    for x, (acc, error) in zip(xs, found, strict=True):
        alone, bound = oracle.products(problem, x, matrix)
        np.testing.assert_allclose(acc, alone, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(error, bound, rtol=1e-12)


def test_bytes_are_compared_beyond_the_first_part() -> None:
    """NaNs are equal to themselves, and 0.0 is not -0.0."""
    one = np.full(1 << 19, np.nan, np.float32)
    other = one.copy()
    assert same_bytes(one, other)
    one[-1], other[-1] = 0.0, -0.0
    assert not same_bytes(one, other) and not same_bytes(one, other[:-1])


def test_inputs_are_copied_once_for_the_cases_that_share_them() -> None:
    """What a kernel did to the copy is still seen, and outputs start anew."""
    weight, x = np.ones(4, np.float32), np.ones(4, np.float32)
    table = {"params": [{"name": name, "dtype": "float32", "shape": [4]} for name in "xwy"]}
    kept: dict[int, Any] = {}
    cases = [Case("", [x, weight, np.zeros(4, np.float32)], {2: Expected(np.zeros(4))}) for _ in range(2)]
    first, second = (call_arguments(table, case, kept) for case in cases)
    assert first[1] is second[1] is not weight and first[2] is not second[2]
    assert not judge(cases[1], arrays_after(second)).reason
    np.asarray(second[1])[2] = 7
    assert judge(cases[1], arrays_after(second)).reason == "argument 1, an input, was changed"


@pytest.mark.parametrize("name", ["cuda:sm_80", "cuda:sm_90", "metal"])
def test_every_kernel_of_a_linear_has_rows(name: str) -> None:
    """The host code tells kernels apart by M, and each of them gets one."""
    spec, recorder = resolve_target(name), LaunchRecorder()
    problem = MatmulProblem(64, 256, QuantSpec(4, 128), dtype="float16")
    function = scheduled_linear(problem, spec.rule(problem), planned=True).with_attr("global_symbol", "linear")
    context = tvm.transform.PassContext(instruments=[recorder.instrument()], config={"tirx.disable_cse_tir": True})
    with tvm.target.Target(spec.tvm_target) as target, context:
        tvm.tirx.build(tvm.IRModule({"linear": function}), target=target)
    table, launched = recorder.tables["linear"], Launched()
    role = roles_of({"linear": {"kind": "linear", "problem": encode_problem(problem)}}, {}, read_config(DEMO))["linear"]
    for case in role.cases(table, np.random.default_rng(0)):
        run_prim_func(table, launched, list(case.arguments))
        assert case.scratch == ({4} if name == "cuda:sm_90" else set())
    assert launched.kernels == set(kernels_of(table)) and len(launched.kernels) >= 3


class Launched:
    """An `Executor` that keeps the names."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def launch(self, kernel: str, args: Any, grid: Any, block: Any, *, dynamic_shared: int = 0) -> None:
        self.kernels.add(kernel)
