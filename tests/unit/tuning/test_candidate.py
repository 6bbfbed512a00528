"""Candidates become PrimFuncs: ours alone in a module, and those by others as they were recorded."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tvm
from tvm.s_tir import Schedule

from awq_compile.errors import CompileError
from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import reference_linear
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.targets import resolve_target
from awq_compile.tuning.candidate import KERNEL, build
from awq_compile.tuning.foreign import Candidate, Dlight, Trace, decode_candidate, describe, encode_candidate
from awq_compile.tuning.inputs import make_inputs
from awq_compile.tuning.measure import Work
from awq_compile.tuning.metaschedule import _plain

PROBLEM = MatmulProblem(48, 128, QuantSpec(4, 32), Epilogue(bias=True, residual=True))


def trace(work: Work) -> Trace:
    """A trace that splits the rows of W, runs them in parallel, and inlines the decoding."""
    schedule = Schedule(tvm.IRModule({"main": reference_linear(work.problem, work.rows)}))
    schedule.compute_inline(schedule.get_sblock("dequantized"))
    _, n, _ = schedule.get_loops(schedule.get_sblock("matmul"))
    outer, _ = schedule.split(n, [None, 4])
    schedule.parallel(outer)
    return Trace(json.dumps(_plain(schedule.trace.as_json(remove_postproc=False))))


@pytest.mark.parametrize(("bucket", "rows"), [("gemv", 1), ("small", 3), ("gemm", 70)])
@pytest.mark.parametrize("whose", ["ours", "dlight", "trace"])
def test_each_kind_computes_the_problem(bucket: str, rows: int, whose: str) -> None:
    """Built alone for this machine and run on the inputs that tuning measures with, against their own oracle."""
    spec, work = resolve_target("cpu"), Work(PROBLEM, bucket, rows)
    rule = spec.rule(PROBLEM).of(bucket)
    candidate: Candidate = {"ours": rule, "dlight": Dlight(), "trace": trace(work)}[whose]
    assert decode_candidate(encode_candidate(candidate)) == candidate
    assert describe(candidate)
    inputs = make_inputs(work, seed=3)
    y: Any = tvm.runtime.tensor(inputs.output())
    arrays = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (inputs.x, *inputs.weight, *inputs.extra)]
    build(work, candidate, spec).module[KERNEL](*arrays, y)
    assert inputs.wrong(y.numpy(), arrays[0].numpy()) == ""


def test_device_code_comes_with_its_launches() -> None:
    """OpenCL C of one kernel, and a table that launches it."""
    spec = resolve_target("opencl")
    problem = MatmulProblem(64, 128, QuantSpec(4, 32), dtype="float16")
    work = Work(problem, "gemv", 1)
    built = build(work, spec.rule(problem).gemv, spec)
    assert built.table is not None and built.table["name"] == KERNEL
    assert "__kernel void linear_kernel" in built.source


@pytest.mark.parametrize("data", [[], {"template": "other"}, {}])
def test_unknown_candidates_are_refused(data: Any) -> None:
    """From a bundle's results, say."""
    with pytest.raises(CompileError):
        decode_candidate(data)
