"""What the passes share: their form, and walking the bindings of a Relax function.

The graphs that front ends give are straight-line: bindings in blocks. A pass keeps the variables of
bindings and replaces their values, so that nothing has to be renamed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import tvm
from tvm import relax

IRModule = Any
Expr = Any
Binding = Any
Function = Any


class RelaxPass(ABC):
    """One rewrite of a module. Subclasses are frozen dataclasses: their options are their fields."""

    @abstractmethod
    def run(self, module: IRModule) -> IRModule:
        """The rewritten module; the given one is left as it was."""

    def as_tvm(self) -> Any:
        """As a TVM pass, named like the class, so that instruments see it."""

        def transform(module: IRModule, _: Any) -> IRModule:
            return relax.transform.Normalize()(self.run(module))  # new values get their types

        return tvm.ir.transform.module_pass(transform, opt_level=0, name=type(self).__name__)


def copy(module: IRModule) -> IRModule:
    """A module with the same functions, safe to update."""
    return tvm.IRModule(dict(module.functions.items()), attrs=module.attrs)


def relax_functions(module: IRModule) -> Iterator[tuple[Any, Function]]:
    """(global variable, function) of every Relax function, by name."""
    items = [(var, f) for var, f in module.functions.items() if isinstance(f, relax.Function)]
    yield from sorted(items, key=lambda item: str(item[0].name_hint))


def bindings_of(function: Function) -> Iterator[Binding]:
    """Every binding, in order. Branches inside are not entered."""
    for block in function.body.blocks:
        yield from block.bindings


def with_blocks(function: Function, blocks: Iterable[Any], params: list[Any] | None = None) -> Function:
    """`function` with other blocks, and other parameters if given."""
    body = relax.SeqExpr(list(blocks), function.body.body)
    kept = function.params if params is None else params
    return relax.Function(kept, body, function.ret_ty, function.is_pure, function.attrs)


def block_like(block: Any, bindings: list[Binding]) -> Any:
    """A block of the same kind with other bindings."""
    return type(block)(bindings)


def uses_of(function: Function) -> Counter[Any]:
    """How often each variable is read."""
    uses: Counter[Any] = Counter()

    def count(expr: Expr) -> None:
        if isinstance(expr, relax.Var):
            uses[expr] += 1

    for binding in bindings_of(function):
        relax.analysis.post_order_visit(binding.value, count)
    relax.analysis.post_order_visit(function.body.body, count)
    return uses


def called_op(value: Expr) -> str:
    """Name of the Relax operator that `value` calls, else an empty string."""
    return str(value.op.name) if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else ""


def called_prim_func(module: IRModule, value: Expr, attribute: str) -> Any | None:
    """The PrimFunc that `value` calls through call_tir, if it carries `attribute`."""
    if called_op(value) != "relax.call_tir":
        return None
    function = module[value.args[0]]
    return function if function.attrs and attribute in function.attrs else None


def add_prim_func(module: IRModule, function: Any, name: str) -> Any:
    """Global variable of the PrimFunc `name`, added to `module` unless it is there already."""
    for var in module.get_global_vars():
        if var.name_hint == name:
            return var
    typed = relax.BlockBuilder().add_func(function, name)  # the builder gives the variable its type
    module[typed] = function
    return typed
