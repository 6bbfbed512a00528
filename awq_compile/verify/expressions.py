"""The integer expressions of a launch table: JSON in, number out. Nothing is ever parsed from a string."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from awq_compile.errors import CompileError

Expr = Any  # int | float | bool | list
Number = int | float


def _truncated_div(a: Number, b: Number) -> Number:
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _truncated_div,
    "mod": lambda a, b: a - b * _truncated_div(a, b),
    "floordiv": operator.floordiv,
    "floormod": operator.mod,
    "min": min,
    "max": max,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "not": operator.not_,
    "shift_left": operator.lshift,
    "shift_right": operator.rshift,
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor,
}


def evaluate(expression: Expr, variables: Mapping[str, Number]) -> Number:
    """The value of an expression. Integers are exact until a cast wraps them."""
    if isinstance(expression, bool | int | float):
        return expression
    if not isinstance(expression, list) or not expression:
        raise CompileError(f"a launch table holds the malformed expression {expression!r}")
    kind, *operands = expression
    if kind == "var":
        if operands[0] not in variables:
            raise CompileError(f"a launch table uses {operands[0]!r} before it is known")
        return variables[operands[0]]
    if kind == "cast":
        return _cast(operands[0], evaluate(operands[1], variables))
    if kind == "select":
        return evaluate(operands[1 if evaluate(operands[0], variables) else 2], variables)
    if kind == "and":
        return all(evaluate(e, variables) for e in operands)
    if kind == "or":
        return any(evaluate(e, variables) for e in operands)
    if kind not in OPERATORS:
        raise CompileError(f"a launch table holds the unknown operator {kind!r}")
    try:
        result: Number = OPERATORS[kind](*(evaluate(e, variables) for e in operands))
    except (ZeroDivisionError, TypeError, ValueError) as error:
        raise CompileError(f"{kind} in a launch table: {error}") from None
    return result


def _cast(dtype: str, value: Number) -> Number:
    if dtype == "bool":
        return bool(value)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return float(kind.type(value))
    bits = 8 * kind.itemsize
    wrapped = int(value) & ((1 << bits) - 1)
    return wrapped - (1 << bits) if kind.kind == "i" and wrapped >> (bits - 1) else wrapped
