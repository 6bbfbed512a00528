"""Every operator, type and conversion, computed by a shader and by NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers_vulkan import executor, run_elementwise
from tvm import tirx

INTS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", "float32", "float64"]
COUNT = 200


def numbers(dtype: str, seed: int = 0) -> np.ndarray:
    """Values of both signs where the type has them, with the smallest and the largest among the integers."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, COUNT).astype(bool)
    if dtype.startswith("float"):
        return (rng.standard_normal(COUNT) * 20).astype(dtype)
    info = np.iinfo(dtype)
    found = rng.integers(info.min, info.max, COUNT, dtype=dtype, endpoint=True)
    found[:60] = rng.integers(max(info.min, -9), 9, 60)
    found[60:62] = info.min, info.max
    return found


def needs(dtype: str) -> tuple[str, ...]:
    """The device's features that a type takes."""
    name = dtype.removeprefix("u")
    storage = {"int8": ("storage8",), "bool": ("storage8",), "int16": ("storage16",), "float16": ("storage16",)}
    return storage.get(name, ()) + ((name,) if name not in ("bool", "int32", "float32") else ())


def trunc_div(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    quotient = np.abs(a.astype(object)) // np.abs(b.astype(object))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


@pytest.mark.parametrize("dtype", INTS)
def test_integer_arithmetic(dtype: str) -> None:
    """Sums, products, both kinds of division, bits, shifts and comparisons of integers are C's, and wrap."""
    a, b = numbers(dtype, 1), numbers(dtype, 2)
    divisor = b.copy()
    divisor[divisor == 0] = 3
    if dtype.startswith("int"):
        divisor[divisor == -1] = -2  # the smallest number divided by -1 has no result
    shift = (np.abs(b.astype(np.int64)) % np.iinfo(dtype).bits).astype(dtype)
    table: list[tuple[str, Any, np.ndarray]] = [
        (dtype, lambda a, b, d, s: a + b, a + b),
        (dtype, lambda a, b, d, s: a - b, a - b),
        (dtype, lambda a, b, d, s: a * b, a * b),
        (dtype, lambda a, b, d, s: tirx.truncdiv(a, d), trunc_div(a, divisor)),
        (dtype, lambda a, b, d, s: tirx.truncmod(a, d), (a - trunc_div(a, divisor) * divisor).astype(dtype)),
        (dtype, lambda a, b, d, s: tirx.floordiv(a, d), a // divisor),
        (dtype, lambda a, b, d, s: tirx.floormod(a, d), a % divisor),
        (dtype, lambda a, b, d, s: tirx.min(a, b), np.minimum(a, b)),
        (dtype, lambda a, b, d, s: tirx.max(a, b), np.maximum(a, b)),
        (dtype, lambda a, b, d, s: a & b, a & b),
        (dtype, lambda a, b, d, s: a | b, a | b),
        (dtype, lambda a, b, d, s: a ^ b, a ^ b),
        (dtype, lambda a, b, d, s: ~a, ~a),
        (dtype, lambda a, b, d, s: a << s, a << shift),
        (dtype, lambda a, b, d, s: a >> s, a >> shift),
        ("bool", lambda a, b, d, s: a < b, a < b),
        ("bool", lambda a, b, d, s: a <= b, a <= b),
        ("bool", lambda a, b, d, s: a > b, a > b),
        ("bool", lambda a, b, d, s: a >= b, a >= b),
        ("bool", lambda a, b, d, s: a.equal(b), a == b),
        ("bool", lambda a, b, d, s: tirx.NE(a, b), a != b),
        (dtype, lambda a, b, d, s: tirx.Select(a < b, a, b), np.where(a < b, a, b)),
    ]
    if not dtype.startswith("u"):
        table.append((dtype, lambda a, b, d, s: tirx.abs(a), np.abs(a)))
    device = executor(*needs(dtype), "storage8")
    found = run_elementwise(device, [a, b, divisor, shift], [(t, f) for t, f, _ in table])
    for k, (value, (_, _, expected)) in enumerate(zip(found, table, strict=True)):
        np.testing.assert_array_equal(value, expected, err_msg=f"operator {k}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_arithmetic(dtype: str) -> None:
    """Floating-point operators agree to one unit in the last place; comparisons know NaN."""
    a, b = numbers(dtype, 3), numbers(dtype, 4)
    a[:3] = np.nan, np.inf, 0
    b[:3] = 1, np.nan, 5
    eps = np.finfo(dtype).eps
    table: list[tuple[str, Any, np.ndarray]] = [
        (dtype, lambda a, b: a + b, a + b),
        (dtype, lambda a, b: a - b, a - b),
        (dtype, lambda a, b: a * b, a * b),
        (dtype, lambda a, b: a / b, a / b),
        (dtype, lambda a, b: tirx.Select(a < b, a, b), np.where(a < b, a, b)),
        ("bool", lambda a, b: a < b, a < b),
        ("bool", lambda a, b: a >= b, a >= b),
        ("bool", lambda a, b: a.equal(b), a == b),
        ("bool", lambda a, b: tirx.NE(a, b), a != b),
        ("bool", lambda a, b: tirx.isnan(a), np.isnan(a)),
    ]
    device = executor(*needs(dtype), "storage8")
    found = run_elementwise(device, [a, b], [(t, f) for t, f, _ in table])
    for k, (value, (_, _, expected)) in enumerate(zip(found, table, strict=True)):
        np.testing.assert_allclose(value, expected, rtol=2 * eps, atol=0, err_msg=f"operator {k}")


def test_logic() -> None:
    """And, or, not and bools stored as bytes."""
    a, b = numbers("bool", 1), numbers("bool", 2)
    table = [
        (lambda a, b: tirx.all(a, b), a & b),
        (lambda a, b: tirx.any(a, b), a | b),
        (lambda a, b: tirx.Not(a), ~a),
        (lambda a, b: tirx.Select(a, b, tirx.Not(b)), np.where(a, b, ~b)),
    ]
    found = run_elementwise(executor("storage8"), [a, b], [("bool", f) for f, _ in table])
    for value, (_, expected) in zip(found, table, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("source", [*INTS, *FLOATS, "bool"])
def test_casts(source: str) -> None:
    """From each type to every other: integers wrap, floats round to zero or to nearest, bool is `!= 0`."""
    a = numbers(source, 5)
    if source.startswith("float"):
        a = np.clip(a, -100, 100)
    device = executor(*{feature for t in (*INTS, *FLOATS, "bool") for feature in needs(t)})
    targets = [t for t in (*INTS, *FLOATS, "bool") if t != source]
    found = run_elementwise(device, [a], [(t, lambda a, t=t: a.astype(t)) for t in targets])
    for target, value in zip(targets, found, strict=True):
        kept = np.ones(COUNT, bool)
        if source.startswith("float") and target in ("uint32", "uint64"):
            kept = a > -1  # C leaves the others open
        with np.errstate(over="ignore"):
            expected = a.astype("int64").astype(target) if source[0] == "f" and target[0] in "iu" else a.astype(target)
        eps = np.finfo(target).eps if target[0] == "f" else 0
        np.testing.assert_allclose(value[kept], expected[kept], rtol=float(eps), atol=0, err_msg=f"{source} → {target}")


MATH: list[tuple[str, Any, float, float]] = [
    ("exp", np.exp, -8, 8),
    ("exp2", np.exp2, -8, 8),
    ("exp10", lambda x: 10.0**x, -3, 3),
    ("log", np.log, 0.01, 50),
    ("log2", np.log2, 0.01, 50),
    ("log10", np.log10, 0.01, 50),
    ("log1p", np.log1p, -0.5, 9),
    ("sqrt", np.sqrt, 0, 60),
    ("rsqrt", lambda x: 1 / np.sqrt(x), 0.1, 60),
    ("sin", np.sin, -3, 3),
    ("cos", np.cos, -3, 3),
    ("tan", np.tan, -1.2, 1.2),
    ("asin", np.arcsin, -0.9, 0.9),
    ("acos", np.arccos, -0.9, 0.9),
    ("atan", np.arctan, -5, 5),
    ("sinh", np.sinh, -3, 3),
    ("cosh", np.cosh, -3, 3),
    ("tanh", np.tanh, -60, 60),
    ("asinh", np.arcsinh, -5, 5),
    ("acosh", np.arccosh, 1.1, 9),
    ("atanh", np.arctanh, -0.9, 0.9),
    ("erf", np.vectorize(math.erf), -4, 4),
    ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), -9, 9),
    ("floor", np.floor, -9, 9),
    ("ceil", np.ceil, -9, 9),
    ("trunc", np.trunc, -9, 9),
    ("round", np.round, -9, 9),
    ("nearbyint", np.rint, -9, 9),
    ("abs", np.abs, -9, 9),
]


@pytest.mark.parametrize("first", range(0, len(MATH), 8))
@pytest.mark.parametrize("dtype", FLOATS)
def test_math_functions(dtype: str, first: int) -> None:
    """One-argument functions, within what Vulkan grants (GLSL.std.450 at the type's precision, at best float32's)."""
    rng = np.random.default_rng(6)
    rows = MATH[first : first + 8]
    inputs = [rng.uniform(low, high, COUNT).astype(dtype) for _, _, low, high in rows]
    outputs = [(dtype, lambda *x, k=k, name=row[0]: getattr(tirx, name)(x[k])) for k, row in enumerate(rows)]
    found = run_elementwise(executor(*needs(dtype)), inputs, outputs)
    tolerance = 2e-2 if dtype == "float16" else 1e-4
    for (name, reference, _, _), x, value in zip(rows, inputs, found, strict=True):
        expected = reference(x.astype("float64"))
        np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance, err_msg=name)


def test_functions_of_two() -> None:
    """pow as C has it (negative bases, zero powers), atan2, fmod, copysign, hypot, ldexp, fma."""
    rng = np.random.default_rng(7)
    a, b = rng.uniform(-4, 4, COUNT).astype("float32"), rng.uniform(-3, 3, COUNT).astype("float32")
    b[:80] = np.round(b[:80])
    a[:2], b[:2] = 0, (0, 2)
    table = [
        (lambda a, b: tirx.pow(a, b), np.power),
        (lambda a, b: tirx.atan2(a, b), np.arctan2),
        (lambda a, b: tirx.fmod(a, b + 5.0), lambda a, b: np.fmod(a, b + 5)),
        (lambda a, b: tirx.copysign(a, b), np.copysign),
        (lambda a, b: tirx.hypot(a, b), np.hypot),
        (lambda a, b: tirx.ldexp(a, tirx.Cast("int32", b)), lambda a, b: np.ldexp(a, b.astype(int))),
    ]
    found = run_elementwise(executor(), [a, b], [("float32", f) for f, _ in table])
    for k, (value, (_, reference)) in enumerate(zip(found, table, strict=True)):
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(value, reference(a, b), rtol=2e-5, atol=2e-5, err_msg=f"function {k}")


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_counting_bits(dtype: str) -> None:
    """Population count and leading zeros, also beyond the 32 bits that Vulkan counts in."""
    a = numbers(dtype, 8)
    bits = np.iinfo(dtype).bits
    unsigned = [int(x) % (1 << bits) for x in a]
    outputs = [(dtype, lambda a: tirx.popcount(a)), ("int32", lambda a: tirx.Cast("int32", tirx.clz(a)))]
    ones, zeros = run_elementwise(executor(*needs(dtype)), [a], outputs)
    np.testing.assert_array_equal(ones, [x.bit_count() for x in unsigned])
    np.testing.assert_array_equal(zeros, [bits - x.bit_length() for x in unsigned])


def test_reinterpreted_bits() -> None:
    """The same bits as another type of the same size."""
    a = numbers("float32", 9)
    outputs = [("uint32", lambda a: tirx.reinterpret("uint32", a)), ("int32", lambda a: tirx.reinterpret("int32", a))]
    for value in run_elementwise(executor(), [a], outputs):
        np.testing.assert_array_equal(value, a.view(value.dtype))


def test_special_constants() -> None:
    """Infinities, the largest finite numbers and 64-bit integers survive as constants."""
    a = np.zeros(COUNT, "float32")
    values: list[tuple[str, Any]] = [
        ("float32", float("inf")),
        ("float32", float("-inf")),
        ("float32", float(np.finfo("float32").min)),
        ("float16", 65504.0),
        ("float64", 1e300),
        ("int64", -(1 << 62) - 3),
        ("int8", -7),
        ("int16", -300),
        ("uint32", (1 << 32) - 1),
    ]
    device = executor("float16", "float64", "int64", "int8", "int16", "storage8", "storage16")
    found = run_elementwise(device, [a], [(t, lambda a, t=t, v=v: tirx.const(v, t)) for t, v in values])
    for (dtype, expected), value in zip(values, found, strict=True):
        np.testing.assert_array_equal(value, np.full(COUNT, expected, dtype))
