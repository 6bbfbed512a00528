"""Names of problems are keys: every field changes them."""

from dataclasses import replace

import pytest

from awq_compile.errors import CompileError
from awq_compile.formats import Float16Spec, QuantSpec
from awq_compile.problem import ROW_BUCKETS, Epilogue, MatmulProblem, decode_problem, encode_problem, row_bucket, serves
from awq_compile.schedules import GemmSchedule, GemvSchedule

BASE = MatmulProblem(64, 128, QuantSpec(4, 32))
VARIANTS = [
    replace(BASE, n=65),
    replace(BASE, k=256),
    replace(BASE, dtype="float16"),
    *(
        replace(BASE, spec=s)
        for s in (
            QuantSpec(3, 32),
            QuantSpec(4, 64),
            QuantSpec(4, 32, False),
            QuantSpec(4, 32, order="KN"),
            Float16Spec(),
        )
    ),
    *(
        replace(BASE, epilogue=e)
        for e in (
            Epilogue(bias=True),
            Epilogue(activation="relu"),
            Epilogue(activation="silu_mul"),
            Epilogue(residual=True),
            Epilogue(wide=True),
        )
    ),
]


def test_every_field_changes_the_name() -> None:
    """Two problems never share a record of the database."""
    names = [p.name for p in (BASE, *VARIANTS)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("problem", [BASE, *VARIANTS], ids=lambda p: p.name)
def test_the_tag_holds_the_whole_problem(problem: MatmulProblem) -> None:
    """What a PrimFunc carries is enough to build its kernels."""
    assert decode_problem(encode_problem(problem)) == problem


def test_buckets_of_rows() -> None:
    """A kernel of many rows may also get those of the buckets that have none of their own."""
    found = [row_bucket(m) for m in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 256, 257)]
    few, many = ["gemv", "pair"], ["quad", "small", "medium", "broad", "large", "wide"]
    assert found == [*few, *(bucket for bucket in many for _ in range(2)), "gemm"]
    for rows, serving in (
        (1, ("gemv",)),
        (2, ("pair", "quad", "small")),
        (8, ("small",)),
        (9, ("medium", "broad", "large", "wide", "gemm")),
        (64, ("large", "wide", "gemm")),
    ):
        assert tuple(bucket for bucket in ROW_BUCKETS if serves(bucket, rows)) == serving


@pytest.mark.parametrize(
    "make",
    [
        lambda: GemvSchedule(5, 4),
        lambda: GemvSchedule(8, 3),
        lambda: GemmSchedule(16, 8, 0, 256, 64),
        lambda: GemmSchedule(16, 8, 2, 100, 64),
        lambda: GemmSchedule(16, 8, 2, 256, 60),
    ],
)
def test_illegal_schedules_cannot_be_made(make: object) -> None:
    """A record of a hand-edited database fails when it is read, not when it runs."""
    with pytest.raises(CompileError):
        make()  # type: ignore[operator]
