"""What the host code of a library launches, as data: recorded at build time, run by any executor.

TVM splits a PrimFunc into host code, which computes sizes and launches, and kernels. The host code right
after the split becomes a table in JSON:

    {"name": "f", "params": [{"name": "x", "dtype": "float16", "shape": [["var", "m"], 64]}, …],
     "body": [["let", "v", EXPR], ["alloc", "work", "float32", [EXPR]],
              ["if", EXPR, [BODY], [BODY]], ["for", "i", EXPR, EXPR, [BODY]],
              ["launch", {"kernel": "f_kernel", "buffers": ["x", "work"], "scalars": [EXPR],
                          "grid": [EXPR × 3], "block": [EXPR × 3], "dynamic_shared": EXPR}]]}

EXPR is a number, or `["var", name]`, `["cast", dtype, e]`, `[operator, e, …]` with an operator of `evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from awq_compile.errors import CompileError
from awq_compile.verify.executors.base import Argument, Executor, KernelError
from awq_compile.verify.expressions import Expr, evaluate

Table = dict[str, Any]
_POISON = 0xCD


@dataclass(frozen=True)
class View:
    """Part of an array as a PrimFunc sees it: `shape` elements from element `offset` of `base` on."""

    base: np.ndarray[Any, Any]
    offset: int
    shape: tuple[int, ...]


def run_prim_func(table: Table, executor: Executor, args: Sequence[Argument | View]) -> list[str]:
    """Launches what the host code would, on `args` in the PrimFunc's order. Returns the kernels launched.

    Workspaces start poisoned. Raises `KernelError` when the arguments do not fit the table.
    """
    run = _Run(executor, {}, {}, [])
    run.bind(table, args)
    run.block(table["body"])
    return run.launched


@dataclass(frozen=True)
class _Run:
    executor: Executor
    scalars: dict[str, int | float]
    buffers: dict[str, np.ndarray[Any, Any]]
    launched: list[str]

    def value(self, expression: Expr) -> int | float:
        return evaluate(expression, self.scalars)

    def size(self, expression: Expr) -> int:
        return int(self.value(expression))

    def bind(self, table: Table, args: Sequence[Argument | View]) -> None:
        name, params = table["name"], table["params"]
        if len(params) != len(args):
            raise KernelError(f"{name} takes {len(params)} arguments, and was given {len(args)}")
        checks: list[tuple[str, Expr, int]] = []
        for param, arg in zip(params, args, strict=True):
            if "shape" not in param:
                if isinstance(arg, np.ndarray | View):
                    raise KernelError(f"{name}: {param['name']} is a number")
                self.scalars[param["name"]] = self.value(["cast", param["dtype"], arg])
                continue
            view = View(arg, 0, arg.shape) if isinstance(arg, np.ndarray) else arg
            if not isinstance(view, View) or str(view.base.dtype) != param["dtype"]:
                raise KernelError(f"{name}: {param['name']} is an array of {param['dtype']}, not {_words(arg)}")
            if len(view.shape) != len(param["shape"]):
                raise KernelError(f"{name}: {param['name']} has {len(param['shape'])} axes, not {len(view.shape)}")
            self.buffers[param["name"]] = view.base
            strides = [int(np.prod(view.shape[i + 1 :], dtype=np.int64)) for i in range(len(view.shape))]
            sizes = [
                *zip(param["shape"], view.shape, strict=True),
                *zip(param.get("strides", []), strides, strict=False),
            ]
            for expression, actual in [*sizes, (param.get("elem_offset", 0), view.offset)]:
                if isinstance(expression, list) and expression[0] == "var" and expression[1] not in self.scalars:
                    self.scalars[expression[1]] = actual
                checks.append((param["name"], expression, actual))
        for argument, expression, actual in checks:
            if (wanted := self.size(expression)) != actual:
                raise KernelError(f"{name}: a size of {argument} is {actual}, and the library expects {wanted}")

    def block(self, body: list[Any]) -> None:
        for statement in body:
            kind = statement[0]
            if kind == "let":
                self.scalars[statement[1]] = self.value(statement[2])
            elif kind == "alloc":
                shape = [self.size(e) for e in statement[3]]
                array = np.empty(shape, statement[2])
                array.reshape(-1).view(np.uint8)[...] = _POISON
                self.buffers[statement[1]] = array
            elif kind == "if":
                self.block(statement[2] if self.value(statement[1]) else statement[3])
            elif kind == "for":
                first = self.size(statement[2])
                for i in range(first, first + self.size(statement[3])):
                    self.scalars[statement[1]] = i
                    self.block(statement[4])
            elif kind == "launch":
                self.launch(statement[1])
            else:
                raise CompileError(f"a launch table holds the unknown statement {kind!r}")

    def launch(self, launch: dict[str, Any]) -> None:
        args: list[Argument] = [self.buffers[b] for b in launch["buffers"]]
        args += [self.value(e) for e in launch["scalars"]]
        grid, block = (self._three(launch[key]) for key in ("grid", "block"))
        self.launched.append(launch["kernel"])
        shared = {"dynamic_shared": self.size(launch["dynamic_shared"])} if "dynamic_shared" in launch else {}
        self.executor.launch(launch["kernel"], args, grid, block, **shared)

    def _three(self, sizes: list[Expr]) -> tuple[int, int, int]:
        x, y, z = (self.size(e) for e in sizes)
        return x, y, z


def kernels_of(table: Table) -> list[str]:
    """Names of all kernels in a table, in the order of its text, each once."""

    def walk(body: list[Any]) -> list[str]:
        found = []
        for statement in body:
            if statement[0] == "launch":
                found.append(statement[1]["kernel"])
            for part in statement[1:]:
                if statement[0] in ("if", "for") and isinstance(part, list) and part and isinstance(part[0], list):
                    found += walk(part)
        return found

    return list(dict.fromkeys(walk(table["body"])))


def bounds_of(table: Table) -> list[int]:
    """The numbers that the host code compares an argument with to choose a kernel."""

    def walk(body: list[Any]) -> list[int]:
        found = []
        for statement in body:
            if statement[0] == "if":
                operator, *operands = statement[1]
                found += [o for o in operands if operator in ("eq", "le", "lt") and isinstance(o, int)]
                found += walk(statement[2]) + walk(statement[3])
            elif statement[0] == "for":
                found += walk(statement[4])
        return found

    return list(dict.fromkeys(walk(table["body"])))


def _words(arg: Any) -> str:
    return f"of {arg.dtype}" if isinstance(arg, np.ndarray) else type(arg).__name__
