"""`QuantizeLinears`: matmuls and embeddings whose weight is in the plan read packed weights instead.

Before, in each function that takes the parameter `w.weight` (4096, 2048) float32:

    t  = R.permute_dims(w.weight)          (or a w.weight of shape (2048, 4096), without this line)
    y  = R.matmul(x, t)
    e  = R.take(w.weight, ids, axis=0)

after, with the parameters `w.q_weight`, `w.q_scale` in its place:

    y  = R.call_tir(qmatmul_w4g128_n4096_k2048, (x, w.q_weight, w.q_scale))
    e  = R.call_tir(embedding_w4g128_…, (ids, w.q_weight, w.q_scale))

The called PrimFunc is the unscheduled reference and carries its `MatmulProblem`, spec included, as an
attribute. A tied weight is packed once and read by both. Parameters that are not in the plan (norm
weights, biases) are stored as float16 and widened where they are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from awq_compile.errors import CompileError
from awq_compile.formats import WeightSpec, packed_name
from awq_compile.kernels.embedding import embedding_take
from awq_compile.kernels.linear import reference_linear
from awq_compile.passes.base import (
    RelaxPass,
    add_prim_func,
    bindings_of,
    block_like,
    called_op,
    copy,
    relax_functions,
    uses_of,
    with_blocks,
)
from awq_compile.problem import MatmulProblem

Expr = Any


@dataclass(frozen=True)
class QuantizeLinears(RelaxPass):
    """`plan`: parameter name → format of its packed arrays. Every planned parameter must be rewritten.

    `threads`: size of a block for the embedding's kernel on a GPU, 0 on a CPU.

    A planned parameter that anything but a matmul (as its second operand) or a take of rows reads is an
    error that names the parameter and the reader.
    """

    plan: Mapping[str, WeightSpec]
    threads: int = 0

    def run(self, module: Any) -> Any:
        """See the module docstring."""
        result = copy(module)
        found: set[str] = set()
        for var, function in relax_functions(module):
            if function.attrs and "num_input" in function.attrs:
                rewriter = _FunctionRewriter(self, result, function, str(var.name_hint))
                result[var] = rewriter.rewritten()
                found |= rewriter.rewrote
        if missing := sorted(set(self.plan) - found):
            raise CompileError(f"QuantizeLinears: no matmul or take reads the planned parameters {', '.join(missing)}")
        return result


class _FunctionRewriter:
    """One Relax function: its parameters after `num_input` are weights."""

    def __init__(self, options: QuantizeLinears, module: Any, function: Any, name: str) -> None:
        self.options, self.module, self.function, self.name = options, module, function, name
        plan = options.plan
        self.inputs = int(function.attrs["num_input"])
        self.planned = {p: plan[p.name] for p in function.params[self.inputs :] if p.name in plan}
        self.transposed = {
            b.var: b.value.args[0]
            for b in bindings_of(function)
            if called_op(b.value) == "relax.permute_dims"
            and b.value.args[0] in self.planned
            and b.value.attrs.axes is None
        }
        self.packed: dict[Any, list[Any]] = {}
        self.in_out: dict[Any, bool] = {}
        self.rewrote: set[str] = set()

    def rewritten(self) -> Any:
        """The function with packed parameters."""
        params = list(self.function.params[: self.inputs])
        casts = []
        for param in self.function.params[self.inputs :]:
            if param in self.planned:
                params += self._packed_params(param)
            else:
                stored = relax.Var(param.name, relax.TensorType(param.ty.shape, "float16"))
                params.append(stored)
                casts.append(relax.VarBinding(param, relax.op.astype(stored, param.ty.dtype)))
        blocks = []
        for i, block in enumerate(self.function.body.blocks):
            bindings = [new for binding in block.bindings for new in self._binding(binding)]
            blocks.append(block_like(block, casts + bindings if i == 0 else bindings))
        result = with_blocks(self.function, blocks, params)
        self._check(result)
        for param in self.planned:
            self.rewrote.add(param.name)
        return result

    def _packed_params(self, param: Any) -> list[Any]:
        n, k = self._rows_and_columns(param)
        spec = self.planned[param]
        self.packed[param] = [
            relax.Var(packed_name(param.name, suffix), relax.TensorType(shape, dtype))
            for suffix, (shape, dtype) in spec.arrays(n, k).items()
        ]
        return self.packed[param]

    def _rows_and_columns(self, param: Any) -> tuple[int, int]:
        """(N, K): a weight that a matmul reads as it is has the shape (K, N), every other (N, K)."""
        first, second = (int(size) for size in param.ty.shape)
        direct = any(
            called_op(b.value) == "relax.matmul" and b.value.args[1].same_as(param) for b in bindings_of(self.function)
        )
        return (second, first) if direct else (first, second)

    def _binding(self, binding: Any) -> list[Any]:
        value = binding.value
        if binding.var in self.transposed:
            return []
        op = called_op(value)
        if op == "relax.matmul":
            weight = self.transposed.get(value.args[1], value.args[1])
            if weight in self.planned:
                return self._linear(binding.var, value.args[0], weight)
        if op == "relax.take" and value.args[0] in self.planned and int(value.attrs.axis) == 0:
            return self._take(binding.var, value.args[1], value.args[0])
        return [binding]

    def _linear(self, var: Any, x: Expr, weight: Any) -> list[Any]:
        n, k = self._rows_and_columns(weight)
        *leading, columns = list(x.ty.shape)
        assert int(columns) == k
        problem = MatmulProblem(n, k, self.planned[weight], dtype=str(x.ty.dtype))
        kernel = add_prim_func(self.module, reference_linear(problem), problem.name)
        if len(leading) == 1:
            call = relax.call_tir(kernel, [x, *self.packed[weight]], relax.TensorType((leading[0], n), x.ty.dtype))
            return [relax.VarBinding(var, call)]
        rows = math.prod(leading[1:], start=leading[0]) if leading else tirx.const(1, "int64")
        flat_in = relax.DataflowVar("rows", relax.TensorType((rows, k), x.ty.dtype))
        flat_out = relax.DataflowVar("products", relax.TensorType((rows, n), x.ty.dtype))
        call = relax.call_tir(kernel, [flat_in, *self.packed[weight]], flat_out.ty)
        return [
            relax.VarBinding(flat_in, relax.op.reshape(x, relax.ShapeExpr([rows, k]))),
            relax.VarBinding(flat_out, call),
            relax.VarBinding(var, relax.op.reshape(flat_out, relax.ShapeExpr([*leading, n]))),
        ]

    def _take(self, var: Any, ids: Expr, weight: Any) -> list[Any]:
        vocab, hidden = self._rows_and_columns(weight)
        function = embedding_take(self.planned[weight], vocab, hidden, str(var.ty.dtype), self.options.threads)
        kernel = add_prim_func(self.module, function, f"embedding_{self.planned[weight].name}_v{vocab}_h{hidden}")
        return [relax.VarBinding(var, relax.call_tir(kernel, [ids, *self.packed[weight]], var.ty))]

    def _check(self, result: Any) -> None:
        uses = uses_of(result)
        for weight in self.planned:
            if not uses[weight]:
                continue
            readers = [
                called_op(b.value) or str(b.value)[:60]
                for b in bindings_of(self.function)
                if any(weight.same_as(a) for a in getattr(b.value, "args", ()))
            ]
            raise CompileError(
                f"QuantizeLinears: {weight.name} is read by {', '.join(readers) or 'something else'} in {self.name}, "
                "and only matmul and take of rows can read packed weights"
            )
