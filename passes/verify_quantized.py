"""`VerifyQuantized`: fails, naming survivors, when a planned linear is not quantised, fused and scheduled.

Changes nothing. Looks for a parameter of the plan that is still read as floating point, for a function
that lacks the packed arrays that others have, for a quantised linear without a schedule, and for a
PrimFunc that dequantises into memory (a dequantise outside its matmul).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from awq_compile.errors import CompileError
from awq_compile.formats import QuantSpec, WeightSpec, packed_name
from awq_compile.kernels.embedding import EMBEDDING_TAG
from awq_compile.kernels.linear import TAG
from awq_compile.passes.base import RelaxPass, bindings_of, called_op, relax_functions


@dataclass(frozen=True)
class VerifyQuantized(RelaxPass):
    """`plan`: the same as `QuantizeLinears` was given."""

    plan: Mapping[str, WeightSpec]

    def run(self, module: Any) -> Any:
        """The module itself, or a `CompileError`."""
        if survivors := self.survivors(module):
            raise CompileError("VerifyQuantized: " + "; ".join(survivors))
        return module

    def survivors(self, module: Any) -> list[str]:
        """What should not be there, one sentence each."""
        found = []
        packed = {
            packed_name(name, "q_weight"): name for name, spec in self.plan.items() if isinstance(spec, QuantSpec)
        }
        for var, function in relax_functions(module):
            if not function.attrs or "num_input" not in function.attrs:
                continue
            names = {p.name for p in function.params}
            found += [
                f"{var.name_hint} still takes {n} in floating point" for n in sorted(set(packed.values()) & names)
            ]
            found += [f"{var.name_hint} does not take {n}" for n in sorted(set(packed) - names)]
            weights = set(function.params[int(function.attrs["num_input"]) :])
            for binding in bindings_of(function):
                op, arguments = called_op(binding.value), list(getattr(binding.value, "args", ()))
                if op in _VIEWS and arguments[0] in weights:
                    weights.add(binding.var)
                elif op == "relax.matmul" and arguments[1] in weights:
                    found.append(f"{var.name_hint} multiplies by {arguments[1].name} without quantising it")
        for var, function in module.functions.items():
            if not isinstance(function, tirx.PrimFunc):
                continue
            tagged = function.attrs and (TAG in function.attrs or EMBEDDING_TAG in function.attrs)
            if tagged and "tirx.is_scheduled" not in function.attrs:
                found.append(f"{var.name_hint} has no schedule")
            if not tagged and any(str(p.name).startswith("q_weight") for p in function.params):
                found.append(f"{var.name_hint} dequantises outside its matmul")
        return found


_VIEWS = ("relax.permute_dims", "relax.astype")
