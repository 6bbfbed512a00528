"""One pass over W for many x gives what each of them gives alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from awq_compile.formats import Float16Spec, QuantSpec, WeightSpec
from awq_compile.problem import MatmulProblem
from awq_compile.verify.case import Case, Expected, arrays_after, call_arguments, judge, same_bytes
from awq_compile.verify.oracles import linear as oracle


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
