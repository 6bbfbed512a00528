"""The quantised linears' GPU templates as shaders, against the float64 product of the packed codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_linear import arrays_of, product_and_bound, random_matrix
from helpers_vulkan import Built, executor, validate

from awq_compile.formats import Float16Spec, QuantSpec, WeightSpec
from awq_compile.kernels.build import scheduled_linear
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.schedules import ColumnGemvSchedule, LinearSchedule, SimtGemmSchedule, SimtGemvSchedule

SPECS: list[WeightSpec] = [
    QuantSpec(4, 128),
    QuantSpec(4, 32, False),
    QuantSpec(3, 64),
    QuantSpec(8, 32),
    Float16Spec(),
    QuantSpec(4, 32, order="KN"),
    QuantSpec(3, 32, False, "KN"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("subgroup", [0, 8])
def test_quantised_linear(spec: WeightSpec, subgroup: int, tmp_path: Path) -> None:
    """GEMV, small batch and GEMM, reduced through shared memory and through subgroup shuffles."""
    device = executor("float16", "int16", "int64", "storage16", *(("shuffle",) if subgroup else ()))
    if subgroup and device.info.subgroup_size % subgroup:
        pytest.skip(f"{device.info.name} has subgroups of {device.info.subgroup_size}")
    unit = 32 if isinstance(spec, QuantSpec) and spec.bits == 3 else 8
    schedule = LinearSchedule(
        SimtGemvSchedule(subgroup or 32, 2, 2, 32, subgroup=subgroup),
        SimtGemvSchedule(subgroup or 16, 4, 4, unit, 4, subgroup),
        SimtGemmSchedule(16, 32, 32, 2, 4, unit),
    )
    if isinstance(spec, QuantSpec) and spec.order == "KN":
        columns = ColumnGemvSchedule(16, 4, 2, unit)
        schedule = replace(schedule, gemv=columns, small=replace(columns, batch=3))
    problem = MatmulProblem(96, 256, spec, Epilogue(residual=True), "float16")
    built = Built(scheduled_linear(problem, schedule))
    validate(list(built.shaders.values()), tmp_path)
    rng = np.random.default_rng(0)
    matrix = random_matrix(spec, problem.weight_rows, problem.k, rng)
    for rows in (1, 2, 7, 9, 37):
        x, residual = (rng.standard_normal((rows, n)).astype(np.float16) for n in (problem.k, problem.n))
        expected, bound = product_and_bound(x, matrix)
        empty = np.full((rows, problem.n), np.nan, np.float16)
        found = built(device, x, *arrays_of(matrix), residual, empty)[-1]
        # Weights of the tiled kernel and all results are rounded to float16.
        error = np.abs(found - (expected + residual))
        assert (error <= bound + 2.0**-10 * (np.abs(expected) + 16)).all(), (rows, error.max())
