"""One linear as emitted GPU code, run through an executor beside its float64 oracle."""

from __future__ import annotations

import numpy as np
from helpers_kernels import build

from awq_compile.kernels.build import scheduled_linear
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import LinearSchedule
from awq_compile.verify.cases.linear import linear_cases
from awq_compile.verify.executors.base import Executor
from awq_compile.verify.executors.opencl import OpenCLExecutor
from awq_compile.verify.executors.simt import SimtExecutor
from awq_compile.verify.launch_table import run_prim_func

ROWS = (0, 1, 2, 7, 8, 9, 37)


def check(problem: MatmulProblem, kind: str, chosen: LinearSchedule, rows: tuple[int, ...] = ROWS) -> None:
    """Runs the emitted code for several M on fresh activations and a poisoned output, and compares."""
    function = scheduled_linear(problem, chosen).with_attr("global_symbol", "linear")
    built = build(function, kind)
    device: Executor = OpenCLExecutor() if kind == "opencl" else SimtExecutor()
    device.load(built.code)
    for case in linear_cases(problem, rows, np.random.default_rng(0)):
        launched = run_prim_func(built.tables["linear"], device, list(case.arguments))
        assert bool(launched) == (case.label != "M=0"), "TVM's runtime makes one block of a grid without blocks"
        for index, expected in case.expected.items():
            y = np.asarray(case.arguments[index], np.float64)
            error = np.abs(y - expected.values)
            worst = f"{problem.name} {case.label}: {np.nanmax(error, initial=0)}, {np.isnan(error).sum()} NaN"
            assert (error <= expected.bound).all(), worst
