"""The CPU shim sees a wait that the wgmma kernel lacks: none of them is there for nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from helpers_kernels import build

from awq_compile.formats import QuantSpec
from awq_compile.kernels.build import bucket_linear
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.schedules import WarpgroupSchedule
from awq_compile.verify.cases.linear import linear_cases
from awq_compile.verify.executors.base import KernelError
from awq_compile.verify.executors.simt import SimtExecutor
from awq_compile.verify.launch_table import run_prim_func

PROBLEM = MatmulProblem(64, 1024, QuantSpec(4, 128), Epilogue(), "float16")
SCHEDULES = (WarpgroupSchedule(1, 1, 2, 1, 2), WarpgroupSchedule(1, 1, 2, 2, 3))
FAULTS = {
    "a stage is read before it has come": (r"awq_stage_wait\([^;]*\);", ""),
    "operands are overwritten while they are read": (r"awq_wgmma_wait_1\(\);", ""),
    "a stage is overwritten while others read it": (r"(?:__syncthreads\(\)|awq_barrier_of<\d+>\(\w+\));(?=\s+if)", ""),
    "products are not ended": (r"awq_wgmma_commit\(\);", ""),
}


def wrong(schedule: WarpgroupSchedule, pattern: str, new: str) -> bool:
    """Whether the kernel with every match replaced fails, or gives another result than float64."""
    built = build(bucket_linear(PROBLEM, "wide", schedule).with_attr("global_symbol", "linear"), "cuda")
    changed, count = re.subn(pattern, new, str(built.code.code))
    assert count, pattern
    device = SimtExecutor(seconds=10)
    device.load(replace(built.code, code=changed))
    (case,) = linear_cases(PROBLEM, (20,), np.random.default_rng(0))
    try:
        run_prim_func(built.tables["linear"], device, list(case.arguments))
    except KernelError:
        return True
    ((number, expected),) = case.expected.items()
    error = np.abs(np.asarray(case.arguments[number], np.float64) - expected.values)
    return not (error <= expected.bound).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_wait_is_seen(fault: str, schedule: WarpgroupSchedule) -> None:
    pattern, new = FAULTS[fault]
    assert wrong(schedule, pattern, new)


def test_sums_that_are_left_too_early_are_seen() -> None:
    """Where slices share K, one's sums lie where another's stages were."""
    assert wrong(SCHEDULES[1], r"__syncthreads\(\);(?=\s+if [^{]*\{[^}]*awq_leave_sums)", "")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_kernel_itself_is_right(schedule: WarpgroupSchedule) -> None:
    assert not wrong(schedule, "awq_wgmma_commit", "awq_wgmma_commit")
