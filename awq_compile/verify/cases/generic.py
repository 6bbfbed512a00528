"""Cases of every other PrimFunc: the same function, unscheduled, built by LLVM, says what must come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from awq_compile.errors import CompileError
from awq_compile.verify.case import Case, Expected, poisoned
from awq_compile.verify.expressions import evaluate
from awq_compile.verify.launch_table import Table
from awq_compile.verify.tolerance import FUNCTION, ROUNDOFF, SMALLEST

SIZES: Final = (1, 2, 7, 8, 64, 128)


@dataclass(frozen=True)
class Reference:
    """An unscheduled PrimFunc as a function of arrays. `outputs` counts its last array arguments."""

    call: Any
    outputs: int

    def __call__(self, arguments: list[Any]) -> list[Any]:
        """All arguments after the call; the given ones are left as they are."""
        import tvm

        tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
        self.call(*tensors)
        return [t.numpy() if isinstance(a, np.ndarray) else a for t, a in zip(tensors, arguments, strict=True)]


def build_references(functions: Mapping[str, tuple[Any, int]]) -> dict[str, Reference]:
    """One LLVM library of unscheduled PrimFuncs: name → (function, number of outputs)."""
    if not functions:
        return {}
    library = reference_library({name: function for name, (function, _) in functions.items()}, "llvm")
    return {name: Reference(library[name], outputs) for name, (_, outputs) in functions.items()}


def reference_library(functions: Mapping[str, Any], target: Any) -> Any:
    """The runtime module of PrimFuncs, each under its name."""
    import tvm

    named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
    return tvm.tirx.build(tvm.IRModule(named), target=tvm.target.Target(target))


def generic_cases(table: Table, reference: Reference, rng: np.random.Generator) -> Iterator[Case]:
    """Every dynamic size takes each of `SIZES`, two different ones where there are two."""
    variables = _variables(table)
    for size in SIZES if variables else (1,):
        # A second size is smaller: it counts positions among rows of the first.
        sizes = {name: max(1, size - 3 * i) for i, name in enumerate(variables)}
        arguments, outputs = _arguments(table, reference.outputs, sizes, rng)
        after = reference(arguments)
        expected = {i: Expected(after[i].astype(np.float64), _bound(table, arguments, after[i])) for i in outputs}
        yield Case(", ".join(f"{k}={v}" for k, v in sizes.items()) or "fixed", arguments, expected)


def _bound(table: Table, arguments: list[Any], found: Any) -> Any:
    """Both sides round: to the result's type, and sums of a row in float32, whose terms no longer show.

    What is only moved or widened must be the same bit for bit; LLVM's own float16 arithmetic rounds alike.
    """
    dtype = str(found.dtype)
    if dtype not in ROUNDOFF:
        return 0.0
    wide = np.abs(np.nan_to_num(found.astype(np.float64)))
    row = max([int(a.shape[-1]) for a in arguments if isinstance(a, np.ndarray) and a.ndim], default=1)
    computed = 2 * (row + 8) * ROUNDOFF["float32"] + FUNCTION
    return wide * (2 * ROUNDOFF[dtype] + computed) + 2 * SMALLEST[dtype]


def _variables(table: Table) -> list[str]:
    """Dynamic sizes, in the order of the parameters."""
    found: dict[str, None] = {}

    def walk(expression: Any) -> None:
        if isinstance(expression, list):
            if expression[0] == "var":
                found[expression[1]] = None
            else:
                for part in expression[1:]:
                    walk(part)

    for param in table["params"]:
        for expression in param.get("shape", []):
            walk(expression)
    return list(found)


def _arguments(
    table: Table, count: int, sizes: Mapping[str, int], rng: np.random.Generator
) -> tuple[list[Any], list[int]]:
    arrays = [i for i, p in enumerate(table["params"]) if "shape" in p]
    outputs = arrays[len(arrays) - count :]
    least = min(sizes.values(), default=1)
    first = next(iter(sizes.values()), 1)
    arguments: list[Any] = []
    for number, param in enumerate(table["params"]):
        dtype = param["dtype"]
        if "shape" not in param:
            if param["name"] not in sizes:
                raise CompileError(f"{table['name']} takes the number {param['name']}, whose meaning is not known")
            arguments.append(sizes[param["name"]])
            continue
        shape = [int(evaluate(e, sizes)) for e in param["shape"]]
        kind = np.dtype(dtype).kind
        if number in outputs:
            arguments.append(poisoned(shape, dtype))
        elif kind == "f":
            arguments.append(rng.standard_normal(shape).astype(dtype))
        elif kind == "b":
            arguments.append(rng.integers(0, 2, shape).astype(dtype))
        else:  # indices: of a row of the first array
            values = rng.integers(0, max(first, least), shape).astype(dtype)
            if values.size:
                values.flat[-1] = max(first, least) - 1
            arguments.append(values)
    return arguments, outputs
