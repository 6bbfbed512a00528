"""The GPU kernels compute what the float64 oracle computes, run as emitted CUDA, Metal and OpenCL code."""

from __future__ import annotations

import pytest
from helpers_simt import check

from awq_compile.errors import CompileError
from awq_compile.formats import Float16Spec, QuantSpec, WeightSpec
from awq_compile.kernels.build import scheduled_linear
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.schedules import (
    LinearSchedule,
    MatrixGemmSchedule,
    MatrixGemvSchedule,
    SimtGemmSchedule,
    SimtGemvSchedule,
    StagedMatrixSchedule,
    WarpgroupSchedule,
)
from awq_compile.targets import resolve_target

SPECS: list[WeightSpec] = [
    QuantSpec(4, 128),
    QuantSpec(4, 32, False),
    QuantSpec(3, 64),
    QuantSpec(8, 32),
    Float16Spec(),
]


def schedule(spec: WeightSpec, kind: str, magic: bool = False) -> LinearSchedule:
    """Small blocks with tails everywhere; CUDA and Metal reduce by shuffles."""
    subgroup = 0 if kind == "opencl" else 32
    unit = 32 if isinstance(spec, QuantSpec) and spec.bits == 3 else 8
    return LinearSchedule(
        SimtGemvSchedule(32, 2, 2, 32, subgroup=subgroup, magic=magic),
        SimtGemvSchedule(16, 4, 4, unit, 4, subgroup, magic),
        SimtGemmSchedule(16, 32, 32, 2, 4, unit, magic=magic),
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["cuda", "metal", "opencl"])
def test_every_format(kind: str, spec: WeightSpec) -> None:
    """N = 67 and K = 384: tails in every blocking."""
    check(MatmulProblem(67, 384, spec, Epilogue(bias=True, residual=True), "float16"), kind, schedule(spec, kind))


@pytest.mark.parametrize("kind", ["cuda", "metal", "opencl"])
def test_gated_linears(kind: str) -> None:
    """Rows n and n + N meet in one thread."""
    check(MatmulProblem(50, 256, SPECS[0], Epilogue(activation="silu_mul"), "float16"), kind, schedule(SPECS[0], kind))


def test_integers_become_floats_by_their_bits() -> None:
    """The same values as a conversion."""
    for spec in SPECS[:4]:
        check(
            MatmulProblem(16, 128, spec, Epilogue(wide=True), "float16"),
            "cuda",
            schedule(spec, "cuda", magic=True),
            (1, 3, 20),
        )


@pytest.mark.parametrize("instruction", ["m16n8k16", "m16n8k8", "simdgroup8x8"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_matrix_instructions(spec: WeightSpec, instruction: str) -> None:
    """Two warps by two, tails in M and N, and gates beside their ups."""
    kind = "metal" if instruction == "simdgroup8x8" else "cuda"
    unit = 32 if isinstance(spec, QuantSpec) and spec.bits == 3 else 8
    plain = schedule(spec, kind)
    chosen = LinearSchedule(plain.gemv, plain.small, MatrixGemmSchedule(32, 64, 64, 2, 2, unit, instruction))
    for epilogue in (Epilogue(bias=True, residual=True), Epilogue(activation="silu_mul")):
        check(MatmulProblem(72, 256, spec, epilogue, "float16"), kind, chosen, (9, 70))


@pytest.mark.parametrize(("tiles", "stages"), [(1, 1), (2, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_decoded_in_registers(tiles: int, stages: int, symmetric: bool) -> None:
    """Three warps share four groups unevenly; tails in N; gates beside their ups."""
    spec = QuantSpec(4, 128, symmetric)
    few, many = MatrixGemvSchedule(3, tiles, 1, stages), MatrixGemvSchedule(tiles, tiles, 2 * tiles, stages)
    chosen = LinearSchedule(few, few, many, pair=few, quad=few)
    for epilogue in (Epilogue(bias=True, residual=True), Epilogue(activation="silu_mul")):
        check(MatmulProblem(67, 512, spec, epilogue, "float16"), "cuda", chosen, (0, 1, 2, 3, 4, 5, 8, 9, 37))


@pytest.mark.parametrize(("tiles", "warps", "groups"), [(1, 1, 1), (1, 3, 5), (2, 3, 8), (2, 2, 13)])
def test_float16_weights_on_tensor_cores(tiles: int, warps: int, groups: int) -> None:
    """Warps share the groups of 64 unevenly; tails in N; gates beside their ups; logits in float32."""
    few, many = MatrixGemvSchedule(warps, tiles), MatrixGemvSchedule(warps, tiles, 2)
    chosen = LinearSchedule(few, few, many, pair=few, quad=few)
    for epilogue in (Epilogue(bias=True, residual=True), Epilogue(activation="silu_mul"), Epilogue(wide=True)):
        problem = MatmulProblem(67, 64 * groups, Float16Spec(), epilogue, "float16")
        check(problem, "cuda", chosen, (1, 2, 3, 4, 5, 8, 9, 20))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 3, 8, 9, 11])
def test_turns_behind_the_loop(groups: int, stages: int) -> None:
    """From fewer turns than are read ahead to more than stand behind the loop."""
    one = MatrixGemvSchedule(1, 1, 1, stages, resident=2)
    many = WarpgroupSchedule(1, 1, 2, 1, stages=8)  # more than K = 128 has
    check(
        MatmulProblem(24, 128 * groups, QuantSpec(4, 128), Epilogue(), "float16"),
        "cuda",
        LinearSchedule(one, one, many, pair=one, quad=one),
        (1, 2, 3, 8, 20),
    )


@pytest.mark.parametrize(
    "many",
    [
        StagedMatrixSchedule(2, 2, 4, 3),
        StagedMatrixSchedule(4, 1, 8, 4),
        WarpgroupSchedule(1, 1, 8),
        WarpgroupSchedule(2, 2, 16),
        WarpgroupSchedule(1, 1, 8, 2),
        WarpgroupSchedule(1, 1, 8, 4),
        WarpgroupSchedule(2, 1, 32),
        WarpgroupSchedule(1, 1, 2, 8, 8),
        WarpgroupSchedule(1, 2, 2, 2, 3),
        WarpgroupSchedule(1, 1, 4, 1, 2),
        WarpgroupSchedule(1, 1, 4, 1, ahead=2),
        WarpgroupSchedule(1, 2, 2, 4, ahead=4),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.tiles}-{s.columns}-{getattr(s, 'slices', 1)}-{getattr(s, 'ahead', 1)}",
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_x_staged_in_shared_memory(symmetric: bool, many: StagedMatrixSchedule | WarpgroupSchedule) -> None:
    """Three groups a slice, so that the ring of stages ends anywhere; tails in M and N; kernels for fewer rows."""
    few = MatrixGemvSchedule(1)
    chosen = LinearSchedule(few, few, many, medium=MatrixGemvSchedule(1, columns=2), large=few, wide=many)
    for epilogue in (Epilogue(bias=True, residual=True), Epilogue(activation="silu_mul")):
        problem = MatmulProblem(67, 384 * getattr(many, "slices", 1), QuantSpec(4, 128, symmetric), epilogue, "float16")
        check(problem, "cuda", chosen, (9, 64, 65, 131, 257))


@pytest.mark.parametrize("spec", [QuantSpec(3, 32), QuantSpec(4, 32), Float16Spec()], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["cuda:sm_80", "cuda:sm_75", "metal"])
def test_rules_take_all_of_k(name: str, spec: WeightSpec) -> None:
    """K = 96 is no multiple of 64; a 3-bit unit is 32 weights."""
    problem = MatmulProblem(40, 96, spec, Epilogue(), "float16")
    check(problem, name.partition(":")[0], resolve_target(name).rule(problem), (1, 3, 9, 37))


def test_a_tail_of_k_is_refused() -> None:
    problem = MatmulProblem(40, 96, QuantSpec(4, 32), Epilogue(), "float16")
    plain = schedule(problem.spec, "cuda")
    chosen = LinearSchedule(plain.gemv, plain.small, MatrixGemmSchedule(32, 64, 64, 2, 2, 8, "m16n8k16"))
    with pytest.raises(CompileError, match="K = 96 is not a multiple of the block of 64"):
        scheduled_linear(problem, chosen)
