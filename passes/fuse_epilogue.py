"""`FuseEpilogue`: elementwise work behind a quantised linear moves into its PrimFunc.

    y = R.call_tir(qmatmul, (x, q_weight, q_scale))
    z = R.add(y, bias);  u = R.add(z, residual)           → call_tir(qmatmul…_bias_residual, (x, …, bias, residual))
    g, u = R.split(y, 2, axis=-1);  h = R.silu(g) * u     → call_tir(qmatmul…_silu_mul, (x, …))
    r = R.nn.relu(y)                                      → call_tir(qmatmul…_relu, (x, …))
    w = R.astype(y, "float32")                            → call_tir(qmatmul…_wide, (x, …)), rounded once less

The order is that of `Epilogue`: bias, activation, residual, wide. A linear whose output is read more than once,
or whose bias is computed rather than stored, is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax
from tvm_ffi import structural_equal

from awq_compile.kernels.linear import TAG, reference_linear
from awq_compile.passes.base import (
    RelaxPass,
    add_prim_func,
    bindings_of,
    block_like,
    called_op,
    called_prim_func,
    copy,
    relax_functions,
    uses_of,
    with_blocks,
)
from awq_compile.problem import Epilogue, MatmulProblem, decode_problem

Expr = Any


@dataclass(frozen=True)
class FuseEpilogue(RelaxPass):
    """Has no options."""

    def run(self, module: Any) -> Any:
        """See the module docstring; PrimFuncs that nothing calls any more are removed."""
        result = copy(module)
        for var, function in relax_functions(module):
            result[var] = _FunctionFuser(result, function).fused()
        called: set[Any] = set()
        for _, function in relax_functions(result):
            called |= {b.value.args[0] for b in bindings_of(function) if called_op(b.value) == "relax.call_tir"}
        dead = [v for v, f in result.functions.items() if f.attrs and TAG in f.attrs and v not in called]
        for var in dead:
            del result[var]
        return result


class _FunctionFuser:
    def __init__(self, module: Any, function: Any) -> None:
        self.module, self.function = module, function
        self.uses = uses_of(function)
        self.values = {b.var: b.value for b in bindings_of(function)}
        self.dropped: set[Any] = set()

    def fused(self) -> Any:
        """The function with epilogues fused; calls that became part of another are gone."""
        for binding in bindings_of(self.function):
            if (new := self._rewrite(binding.value)) is not None:
                self.values[binding.var] = new
        blocks = [
            block_like(
                block,
                [
                    relax.VarBinding(b.var, self.values[b.var]) if isinstance(b, relax.VarBinding) else b
                    for b in block.bindings
                    if b.var not in self.dropped
                ],
            )
            for block in self.function.body.blocks
        ]
        return with_blocks(self.function, blocks)

    def _linear(self, expr: Expr) -> MatmulProblem | None:
        """The problem of the quantised linear bound to `expr`, when only one reader uses it."""
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        if value is None or self.uses[expr] != 1:
            return None
        function = called_prim_func(self.module, value, TAG)
        return decode_problem(str(function.attrs[TAG])) if function is not None else None

    def _rewrite(self, value: Expr) -> Expr | None:
        op = called_op(value)
        if op == "relax.add":
            return self._either(self._add, value.args)
        if op == "relax.nn.relu":
            return self._activation(value.args[0], "relu")
        if op == "relax.multiply":
            return self._either(self._silu_mul, value.args)
        if op == "relax.astype" and str(value.ty.dtype) == "float32":
            return self._wide(value.args[0])
        return None

    @staticmethod
    def _either(rewrite: Callable[[Expr, Expr], Expr | None], operands: Any) -> Expr | None:
        """`rewrite` of a commutative operator's operands, in the order that fits."""
        first, second = operands
        found = rewrite(first, second)
        return rewrite(second, first) if found is None else found

    def _add(self, y: Expr, other: Expr) -> Expr | None:
        problem = self._linear(y)
        if problem is None or self._closed(problem.epilogue) or not isinstance(other.ty, relax.TensorType):
            return None
        if len(other.ty.shape) == 1 and problem.epilogue == Epilogue() and int(other.ty.shape[0]) == problem.n:
            stored = self._stored(other)
            return self._extend(y, problem, lambda e: replace(e, bias=True), [stored]) if stored is not None else None
        if structural_equal(other.ty, y.ty, map_free_vars=False):
            return self._extend(y, problem, lambda e: replace(e, residual=True), [other])
        return None

    @staticmethod
    def _closed(epilogue: Epilogue) -> bool:
        """Nothing but `wide` comes behind a residual, and nothing at all behind that."""
        return epilogue.residual or epilogue.wide

    def _stored(self, bias: Expr) -> Expr | None:
        """The float16 parameter that `bias` widens."""
        if str(bias.ty.dtype) == "float16":
            return bias
        value: Any = self.values.get(bias)
        if called_op(value) == "relax.astype" and str(value.args[0].ty.dtype) == "float16":
            return value.args[0]
        return None

    def _activation(self, y: Expr, name: str) -> Expr | None:
        problem = self._linear(y)
        if problem is None or self._closed(problem.epilogue) or problem.epilogue.activation != "none":
            return None
        return self._extend(y, problem, lambda e: replace(e, activation=name), [])

    def _wide(self, y: Expr) -> Expr | None:
        problem = self._linear(y)
        if problem is None or problem.out_dtype == "float32":
            return None
        return self._extend(y, problem, lambda e: replace(e, wide=True), [])

    def _silu_mul(self, left: Expr, right: Expr) -> Expr | None:
        """silu(split[0]) * split[1], where split = R.split(y, 2, axis=-1), and N is even."""
        activated: Any = self.values.get(left)
        gate, up = (activated.args[0] if called_op(activated) == "relax.nn.silu" else None), right
        picks: list[Any] = [self.values.get(v) for v in (gate, up)] if gate is not None else [None]
        if not all(isinstance(p, relax.TupleGetItem) for p in picks) or [p.index for p in picks] != [0, 1]:
            return None
        split, other = picks[0].tuple_value, picks[1].tuple_value
        source: Any = self.values.get(split)
        if not split.same_as(other) or called_op(source) != "relax.split" or self.uses[split] != 2:
            return None
        y = source.args[0]
        if int(source.attrs.axis) not in (-1, len(y.ty.shape) - 1) or any(self.uses[v] != 1 for v in (left, gate, up)):
            return None
        problem = self._linear(y)
        if problem is None or problem.epilogue != Epilogue() or not _halves(split, problem.n):
            return None
        self.dropped |= {left, gate, up, split}
        return self._extend(y, replace(problem, n=problem.n // 2), lambda e: replace(e, activation="silu_mul"), [])

    def _extend(
        self, y: Expr, problem: MatmulProblem, change: Callable[[Epilogue], Epilogue], extra: list[Expr]
    ) -> Expr:
        """The call bound to `y`, with a further epilogue and its arguments."""
        new = replace(problem, epilogue=change(problem.epilogue))
        kernel = add_prim_func(self.module, reference_linear(new), new.name)
        call = self.values[y]
        self.dropped.add(y)
        rows = call.ty_args[0].shape[0]
        out = relax.TensorType((rows, new.n), new.out_dtype)
        return relax.call_tir(kernel, [*call.args[1].fields, *extra], out)


def _halves(split: Expr, n: int) -> bool:
    """Whether a split along N makes two parts, and those are equal."""
    return [int(part.shape[-1]) * 2 for part in split.ty.fields] == [n, n]
