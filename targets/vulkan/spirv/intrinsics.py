"""Math functions, by the name that TVM gives them, with or without C's suffix: `tirx.exp`, `expf`.

GLSL.std.450 computes most of them in 16 and 32 bits; float64 goes through float32 where it does not.
Where its result is open and C's is not (pow of a negative base), C's is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from awq_compile.errors import CompileError
from awq_compile.targets.vulkan.spirv.arithmetic import Arithmetic, Value, in_float32
from awq_compile.targets.vulkan.spirv.enums import Glsl, Op
from awq_compile.targets.vulkan.spirv.types import UINT32, DType

Function = Callable[[Arithmetic, tuple[Value, ...]], Value]


def _plain(instruction: Glsl, *, any_width: bool = False) -> Function:
    def emit(a: Arithmetic, x: tuple[Value, ...]) -> Value:
        if any_width:
            return a.glsl(instruction, *x)
        if x[0].dtype.bits == 64:
            return in_float32(a, lambda *v: a.glsl(instruction, *v), *x)
        return a.glsl(instruction, *x)

    return emit


def _scaled(instruction: Glsl, factor: float) -> Function:
    """`instruction(x) * factor`"""

    def emit(a: Arithmetic, x: tuple[Value, ...]) -> Value:
        found = _plain(instruction)(a, x)
        return a.binary("mul", found, a.constant(found.dtype, factor))

    return emit


def _exp10(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    return _plain(Glsl.EXP2)(a, (a.binary("mul", x[0], a.constant(x[0].dtype, math.log2(10))),))


def _log1p(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    """log(1 + x) * x / ((1 + x) - 1), which keeps the digits of a small x (Higham, Accuracy and Stability, 1.14.1)."""
    one = a.constant(x[0].dtype, 1)
    u = a.binary("add", x[0], one)
    small = a.binary("sub", u, one)
    scaled = a.binary("div", a.binary("mul", _plain(Glsl.LOG)(a, (u,)), x[0]), small)
    return a.select(a.binary("eq", u, one), x[0], scaled)


def _tanh(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    """Clamped to where tanh is not yet 1: some drivers compute inf / inf beyond."""
    low, high = a.constant(x[0].dtype, -10.0), a.constant(x[0].dtype, 10.0)
    clamped = a.maximum(a.minimum(x[0], high), low)
    return _plain(Glsl.TANH)(a, (clamped,))


def _pow(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    """x^y as C has it: x^0 = 1, and a negative x with a whole y takes its sign from whether y is odd."""
    base, power = x
    dtype = base.dtype
    zero, one = a.constant(dtype, 0), a.constant(dtype, 1)
    size = _plain(Glsl.POW)(a, (a.glsl(Glsl.F_ABS, base), power))
    half = a.binary("mul", power, a.constant(dtype, 0.5))
    is_even = a.binary("eq", a.glsl(Glsl.FLOOR, half), half)
    is_whole = a.binary("eq", a.glsl(Glsl.FLOOR, power), power)
    signed = a.select(is_even, size, a.binary("sub", zero, size))
    signed = a.select(is_whole, signed, a.constant(dtype, math.nan))
    result = a.select(a.binary("lt", base, zero), signed, size)
    return a.select(a.binary("eq", power, zero), one, result)


def _atan2(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    """0 at the origin, where GLSL leaves it open."""
    zero = a.constant(x[0].dtype, 0)
    origin = a.binary("and", a.binary("eq", x[0], zero), a.binary("eq", x[1], zero))
    return a.select(origin, zero, _plain(Glsl.ATAN2)(a, x))


def _leg(a: Arithmetic, x: Value) -> Value:
    """sqrt(1 - x²). GLSL's asin and acos have errors of 4e-4 with some drivers, its atan2 has not."""
    one = a.constant(x.dtype, 1)
    return a.glsl(Glsl.SQRT, a.binary("mul", a.binary("sub", one, x), a.binary("add", one, x)))


def _erf(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    """sign(x) (1 - p(t) exp(-x²)), t = 1 / (1 + 0.3275911 |x|); Abramowitz and Stegun 7.1.26, error below 1.5e-7."""

    def compute(v: Value) -> Value:
        dtype = v.dtype
        one, size = a.constant(dtype, 1), a.glsl(Glsl.F_ABS, v)
        t = a.binary("div", one, a.binary("add", one, a.binary("mul", a.constant(dtype, 0.3275911), size)))
        p = a.constant(dtype, 1.061405429)
        for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            p = a.binary("add", a.binary("mul", p, t), a.constant(dtype, c))
        square = a.binary("mul", size, a.binary("sub", a.constant(dtype, 0), size))
        tail = a.binary("mul", a.binary("mul", p, t), a.glsl(Glsl.EXP, square))
        return a.binary("mul", a.glsl(Glsl.F_SIGN, v), a.binary("sub", one, tail))

    return in_float32(a, compute, x[0])


def _round(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    return x[0] if x[0].dtype.is_integer else a.glsl(Glsl.ROUND_EVEN, *x)


def _fabs(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    if x[0].dtype.is_integer:
        return a.maximum(x[0], a.binary("sub", a.constant(x[0].dtype, 0), x[0]))
    return a.glsl(Glsl.F_ABS, *x)


def _sigmoid(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    one, negative = a.constant(x[0].dtype, 1), a.binary("sub", a.constant(x[0].dtype, 0), x[0])
    return a.binary("div", one, a.binary("add", one, _plain(Glsl.EXP)(a, (negative,))))


def _copysign(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    bits = DType("uint", x[0].dtype.bits, x[0].dtype.lanes)
    top = a.constant(bits, 1 << bits.bits - 1)
    size = a.binary("and", a.bitcast(bits, x[0]), a.bitwise_not(top))
    return a.bitcast(x[0].dtype, a.binary("or", size, a.binary("and", a.bitcast(bits, x[1]), top)))


def _classify(op: Op) -> Function:
    def emit(a: Arithmetic, x: tuple[Value, ...]) -> Value:
        ids = [a.builder.pure(op, a.types.vector(DType("bool", 1), 1), s) for s in a.scalars(x[0])]
        return a.gather(DType("bool", 1, x[0].dtype.lanes), ids)

    return emit


def _isfinite(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    """x - x is 0, or else not a number."""
    return a.binary("eq", a.binary("sub", x[0], x[0]), a.constant(x[0].dtype, 0))


def _popcount(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    """Vulkan counts in 32 bits only."""
    low, high = _words(a, x[0])
    count = _count(a, low) if high is None else a.binary("add", _count(a, low), _count(a, high))
    return a.cast(x[0].dtype, count)


def _clz(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    """Bits above the highest set one: bits - 1 - FindUMsb, which is -1 for 0."""
    dtype = x[0].dtype
    low, high = _words(a, x[0])
    found = a.glsl(Glsl.FIND_U_MSB, low)
    if high is not None:
        upper = a.binary("add", a.glsl(Glsl.FIND_U_MSB, high), a.constant(high.dtype, 32))
        found = a.select(a.binary("eq", high, a.constant(high.dtype, 0)), found, upper)
    return a.cast(dtype, a.binary("sub", a.constant(found.dtype, dtype.bits - 1), found))


def _words(a: Arithmetic, x: Value) -> tuple[Value, Value | None]:
    """Low and high word of each lane, as uint32."""
    to = UINT32.with_lanes(x.dtype.lanes)
    unsigned = Value(DType("uint", x.dtype.bits, x.dtype.lanes), x.ids)
    if x.dtype.bits < 64:
        return a.cast(to, unsigned), None
    return a.cast(to, unsigned), a.cast(to, a.binary("shr", unsigned, a.constant(unsigned.dtype, 32)))


def _count(a: Arithmetic, x: Value) -> Value:
    kind = a.types.vector
    parts = zip(x.ids, x.dtype.widths, strict=True)
    return Value(x.dtype, tuple(a.builder.pure(Op.BIT_COUNT, kind(x.dtype, width), part) for part, width in parts))


def _fma(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    return a.glsl(Glsl.FMA, *x)


def _hypot(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    squares = [a.binary("mul", v, v) for v in x]
    return a.glsl(Glsl.SQRT, a.binary("add", *squares))


def _ldexp(a: Arithmetic, x: tuple[Value, ...]) -> Value:
    power = x[1] if x[1].dtype.kind == "float" else a.cast(x[0].dtype, x[1])
    return a.binary("mul", x[0], _plain(Glsl.EXP2)(a, (power,)))


FUNCTIONS: Final[dict[str, Function]] = {
    "exp": _plain(Glsl.EXP),
    "exp2": _plain(Glsl.EXP2),
    "exp10": _exp10,
    "log": _plain(Glsl.LOG),
    "log2": _plain(Glsl.LOG2),
    "log10": _scaled(Glsl.LOG2, math.log10(2)),
    "log1p": _log1p,
    "sqrt": _plain(Glsl.SQRT, any_width=True),
    "rsqrt": _plain(Glsl.INVERSE_SQRT, any_width=True),
    "pow": _pow,
    "sin": _plain(Glsl.SIN),
    "cos": _plain(Glsl.COS),
    "tan": _plain(Glsl.TAN),
    "asin": lambda a, x: _atan2(a, (x[0], _leg(a, x[0]))),
    "acos": lambda a, x: _atan2(a, (_leg(a, x[0]), x[0])),
    "atan": _plain(Glsl.ATAN),
    "atan2": _atan2,
    "sinh": _plain(Glsl.SINH),
    "cosh": _plain(Glsl.COSH),
    "tanh": _tanh,
    "asinh": _plain(Glsl.ASINH),
    "acosh": _plain(Glsl.ACOSH),
    "atanh": _plain(Glsl.ATANH),
    "erf": _erf,
    "sigmoid": _sigmoid,
    "floor": _plain(Glsl.FLOOR, any_width=True),
    "ceil": _plain(Glsl.CEIL, any_width=True),
    "trunc": _plain(Glsl.TRUNC, any_width=True),
    "round": _round,
    "nearbyint": _round,
    "rint": _round,
    "fabs": _fabs,
    "abs": _fabs,
    "fmod": lambda a, x: a.mod(*x),
    "fma": _fma,
    "hypot": _hypot,
    "ldexp": _ldexp,
    "copysign": _copysign,
    "isnan": _classify(Op.IS_NAN),
    "isinf": _classify(Op.IS_INF),
    "isfinite": _isfinite,
    "popcount": _popcount,
    "popcountll": _popcount,
    "clz": _clz,
    "fmin": lambda a, x: a.minimum(*x),
    "fmax": lambda a, x: a.maximum(*x),
}


def math_function(name: str) -> Function | None:
    """By TVM's or C's name."""
    bare = name.rpartition(".")[2].removeprefix("__")
    return FUNCTIONS.get(bare) or FUNCTIONS.get(bare.removesuffix("f"))


def glsl_by_number(a: Arithmetic, number: int, operands: tuple[Value, ...]) -> Value:
    """`call_spirv_pure_glsl450`, which TVM's own lowering rules emit."""
    try:
        instruction = Glsl(number)
    except ValueError:
        raise CompileError(f"Vulkan: instruction {number} of GLSL.std.450 is not supported") from None
    return a.glsl(instruction, *operands)
