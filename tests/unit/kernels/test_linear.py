"""The kernels compute what the float64 oracle computes: every format, epilogue, bucket of rows and width."""

import pytest
import tvm
from helpers_linear import check_linear

from awq_compile.formats import Float16Spec, QuantSpec
from awq_compile.kernels.build import scheduled_linear
from awq_compile.kernels.linear import reference_linear
from awq_compile.problem import Epilogue, MatmulProblem
from awq_compile.schedules import GemmSchedule, GemvSchedule, LinearSchedule
from awq_compile.targets import resolve_target

ROWS = (1, 2, 7, 8, 9, 70)
SPECS = [
    QuantSpec(b, g, s) for b, g, s in ((4, 128, True), (4, 32, False), (3, 64, True), (3, 128, False), (8, 32, True))
]
EPILOGUES = [
    Epilogue(),
    Epilogue(bias=True, activation="relu"),
    Epilogue(activation="silu_mul"),
    Epilogue(bias=True, residual=True),
]


def host() -> object:
    """This machine's CPU."""
    return tvm.target.Target(resolve_target("cpu").tvm_target)


def schedule(lanes: int) -> LinearSchedule:
    """Small blocks, so that small problems have several, with tails."""
    return LinearSchedule(
        GemvSchedule(lanes, 4, prefetch=1), GemvSchedule(lanes, 2, batch=3), GemmSchedule(lanes, 4, 2, 128, 16)
    )


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: e.name or "plain")
@pytest.mark.parametrize("spec", [*SPECS, Float16Spec()], ids=lambda s: s.name)
def test_all_formats_and_epilogues(spec: QuantSpec, epilogue: Epilogue) -> None:
    """N = 67 leaves tails in every blocking; K = 384 is no multiple of the deepest panel."""
    problem = MatmulProblem(67, 384, spec, epilogue)
    check_linear(scheduled_linear(problem, schedule(16)), problem, ROWS, host())


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize(
    "spec", [QuantSpec(4, 32), QuantSpec(3, 32, False), QuantSpec(8, 64), Float16Spec()], ids=lambda s: s.name
)
def test_narrow_vectors(spec: QuantSpec, lanes: int) -> None:
    """The schedules of AVX2 and NEON, run with whatever this machine has."""
    problem = MatmulProblem(33, 192, spec, Epilogue(residual=True))
    check_linear(scheduled_linear(problem, schedule(lanes)), problem, (1, 3, 17), host())


@pytest.mark.parametrize("n", [1, 2, 3, 16])
def test_fewer_columns_than_a_block(n: int) -> None:
    """Blocks shrink to N, so that nothing outside W is read or written."""
    for epilogue in (Epilogue(), Epilogue(activation="silu_mul")):
        problem = MatmulProblem(n, 128, QuantSpec(4, 64), epilogue)
        check_linear(scheduled_linear(problem, schedule(16)), problem, (1, 5, 20), host())


def test_a_k_that_fits_no_wide_vector() -> None:
    """K = 96 at group 32: twelve words a row, so vectors of four lanes at most."""
    problem = MatmulProblem(8, 96, QuantSpec(4, 32))
    check_linear(scheduled_linear(problem, schedule(16)), problem, ROWS, host())


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: e.name or "plain")
def test_the_unscheduled_reference(epilogue: Epilogue) -> None:
    """What the pass emits before scheduling is already right."""
    for spec in (QuantSpec(4, 32), QuantSpec(3, 32, False), Float16Spec()):
        problem = MatmulProblem(10, 64, spec, epilogue)
        check_linear(reference_linear(problem), problem, (1, 3), host())


def test_a_wrong_zero_point_is_seen() -> None:
    """The comparison itself can fail: a kernel for another zero point does not pass."""
    wrong, right = MatmulProblem(16, 128, QuantSpec(4, 64)), MatmulProblem(16, 128, QuantSpec(4, 32))
    with pytest.raises((AssertionError, Exception), match=r"M=|shape|Mismatched"):
        check_linear(scheduled_linear(wrong, schedule(16)), right, (1,), host())
