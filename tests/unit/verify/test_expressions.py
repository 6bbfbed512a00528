"""Launch table expressions mean what TIR means by them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_compile.errors import CompileError
from awq_compile.verify.expressions import evaluate

SMALL = st.integers(-1000, 1000)


@given(SMALL, SMALL.filter(bool))
def test_division_truncates_or_floors_as_the_operator_says(a: int, b: int) -> None:
    assert evaluate(["div", a, b], {}) == int(a / b)
    assert evaluate(["mod", a, b], {}) == a - int(a / b) * b
    assert evaluate(["floordiv", ["var", "a"], b], {"a": a}) == a // b
    assert evaluate(["floormod", a, b], {}) == a % b


@given(st.integers(-(2**70), 2**70))
def test_casts_wrap_as_registers_do(value: int) -> None:
    wrapped = evaluate(["cast", "int32", value], {})
    assert -(2**31) <= wrapped < 2**31 and (wrapped - value) % 2**32 == 0
    assert evaluate(["cast", "uint8", value], {}) == value % 256


def test_the_branch_not_taken_is_not_evaluated() -> None:
    assert evaluate(["select", ["gt", ["var", "n"], 0], ["floordiv", 6, ["var", "n"]], 0], {"n": 0}) == 0
    assert evaluate(["and", ["lt", 1, 0], ["var", "unknown"]], {}) is False


@pytest.mark.parametrize("bad", [["var", "x"], ["system", "ls"], [], "1 + 1", None, ["floordiv", 1, 0], ["add", 1]])
def test_anything_else_is_refused(bad: Any) -> None:
    with pytest.raises(CompileError):
        evaluate(bad, {})
