"""Puts a system library's prefix before the names of its PrimFuncs, which become symbols of the app.

    rms_norm(x, weight, y)  →  model_rms_norm(x, weight, y)

An app may link several models, whose `rms_norm` differ; TVM's runtime looks up `prefix + name` first. TVM's own
`AttachGlobalSymbol` would do it, but in 0.27 its rewrite of TensorIR fails on views of buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from awq_compile.passes.base import IRModule, RelaxPass


@dataclass(frozen=True)
class PrefixSymbols(RelaxPass):
    """`prefix` with its last underscore."""

    prefix: str

    def run(self, module: IRModule) -> IRModule:
        """Names of Relax functions stay: the engine looks them up in the VM code, which is the library's own."""
        renamed = {}
        for var, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc):
                renamed[str(var.name_hint)] = new = tvm.ir.GlobalVar(self.prefix + str(var.name_hint))
                relax.expr._update_type(new, var.ty)

        @mutator
        class Rename(PyExprMutator):  # type: ignore[misc]
            def visit_global_var_(self, var: Any) -> Any:
                return renamed.get(str(var.name_hint), var)

        functions = {}
        for var, function in module.functions.items():
            name = str(var.name_hint)
            if name in renamed:
                functions[renamed[name]] = function.with_attr("global_symbol", self.prefix + name)
            else:
                functions[var] = Rename().visit_expr(function)
        return tvm.IRModule(functions, attrs=module.attrs)
