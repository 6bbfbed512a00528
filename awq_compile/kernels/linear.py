"""The quantised linear as one PrimFunc: arguments, dispatch by rows, and the tag that names the problem.

    y[m, n] = epilogue(sum_k x[m, k] * W[n, k])        x (M, K), W (N, K), y (M, N), M dynamic

Arguments in order: x, the arrays of W (`WeightSpec.arrays`), the bias (N) float16 and the residual (M, N)
where the epilogue has them, then y. Where a kernel arranges x first, `arranged` may be the last: memory
that Relax plans, as a second result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import Float16Spec, QuantSpec
from awq_compile.kernels.simd import cast, ramp, zeros
from awq_compile.problem import MatmulProblem, encode_problem
from awq_compile.schedules import ARRANGED_BEHIND

Expr = Any
Buffer = Any

TAG: Final = "awq_compile.problem"  # function and sblock attribute: `problem.encode_problem`


@dataclass(frozen=True)
class LinearArgs:
    """The buffers of an open quantised linear: x, residual and y as matrices of M rows, W also flat."""

    problem: MatmulProblem
    m: Expr
    x: Buffer
    weight: dict[str, Buffer]
    flat: dict[str, Buffer]
    bias: Buffer | None
    residual: Buffer | None
    y: Buffer
    arranged: Buffer | None = None

    @property
    def m32(self) -> Expr:
        """M as the 32-bit integer with which GPUs compute indices."""
        return tirx.Cast("int32", self.m)

    @property
    def codes(self) -> str:
        """Name of the array of packed words, or of float16 weights."""
        return next(iter(self.weight))

    def stored(self, name: str, row: Expr, column: Expr) -> Expr:
        """What an array of W holds for `row` at `column` along K; a ramp may be the index that is contiguous."""
        spec = self.problem.spec
        place = spec.place(row, column) if isinstance(spec, QuantSpec) else (row, column)
        return self.weight[name][place]

    def column(self, name: str, first_row: Expr, column: Expr, lanes: int) -> Expr:
        """One column of an array of W in NK, in `lanes` rows from `first_row` on."""
        width = self.weight[name].shape[1]
        return self.flat[name][ramp(first_row * width + column, lanes, width)]

    def scale_and_shift(self, load: Callable[[str], Expr], lanes: int) -> tuple[Expr, Expr]:
        """(s, z s) in float32 of `lanes` groups, where `load` reads an array of W at those groups."""
        spec = self.problem.spec
        assert isinstance(spec, QuantSpec)
        scale = T.bind(cast("float32", load("q_scale"), lanes))
        zero = float(spec.zero) if spec.symmetric else cast("float32", load("q_zero"), lanes)
        return scale, T.bind(scale * zero)

    def finish(self, m: Expr, n: Expr, acc: Expr, gate: Expr | None, lanes: int = 1) -> Expr:
        """Epilogue of columns `n` of row `m`; for `silu_mul`, `gate` and `acc` are the two products."""
        epilogue = self.problem.epilogue
        if self.bias is not None:
            acc = acc + cast("float32", self.bias[n], lanes)
        if epilogue.activation == "relu":
            acc = tirx.max(acc, zeros(lanes))
        if gate is not None:
            acc = gate / (tirx.exp(gate * -1.0) + 1.0) * acc
        if self.residual is not None:
            acc = acc + cast("float32", self.residual[m, n], lanes)
        return acc if self.problem.out_dtype == "float32" else cast(self.problem.out_dtype, acc, lanes)


@contextmanager
def linear_function(
    problem: MatmulProblem, attrs: dict[str, Any], *, arranged: bool = False
) -> Iterator[tuple[IRBuilder, LinearArgs]]:
    """Opens a PrimFunc with the arguments of `problem`; `builder.get()` is the function, after the block.

    With `arranged`, that is one of them: M + `schedules.ARRANGED_BEHIND` rows of K at least.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_name(problem.name)
        T.func_attr({"tirx.noalias": True, TAG: encode_problem(problem), **attrs})
        m = tirx.Var("m", "int64")
        n, k, dtype = problem.n, problem.k, problem.dtype
        x = T.arg("x", T.buffer((m, k), dtype))
        arrays = problem.spec.arrays(problem.weight_rows, k)
        weight = {name: T.arg(name, T.buffer(shape, kind)) for name, (shape, kind) in arrays.items()}
        bias = T.arg("bias", T.buffer((n,), "float16")) if problem.epilogue.bias else None
        residual = T.arg("residual", T.buffer((m, n), dtype)) if problem.epilogue.residual else None
        y = T.arg("y", T.buffer((m, n), problem.out_dtype))
        rows = tirx.Var("arranged_rows", "int64")
        given = T.arg("arranged", T.buffer((rows, k), dtype)) if arranged else None
        flat = {
            name: T.decl_buffer((rows * columns,), kind, data=weight[name].data)
            for name, ((rows, columns), kind) in arrays.items()
        }
        # As long as kernels use it, or its rows would be an argument of theirs.
        used = ((m + ARRANGED_BEHIND) * k,)
        place = None
        if given is not None:
            place = IRBuilder.name("arranged", T.decl_buffer(used, dtype, data=given.data))
        yield builder, LinearArgs(problem, m, x, weight, flat, bias, residual, y, place)


def reference_linear(problem: MatmulProblem, rows_of_x: int | None = None) -> Any:
    """The same PrimFunc unscheduled, one loop nest per step: what the templates must compute.

    `rows_of_x` fixes M, for schedules that need it.
    """
    spec, n, k = problem.spec, problem.n, problem.k
    rows = problem.weight_rows
    m = te.var("m", "int64") if rows_of_x is None else rows_of_x
    x = te.placeholder((m, k), problem.dtype, name="x")
    weight = {name: te.placeholder(shape, kind, name=name) for name, (shape, kind) in spec.arrays(rows, k).items()}
    bias = [te.placeholder((n,), "float16", name="bias")] if problem.epilogue.bias else []
    residual = [te.placeholder((m, n), problem.dtype, name="residual")] if problem.epilogue.residual else []

    def dequantized(i: Expr, j: Expr) -> Expr:
        if isinstance(spec, Float16Spec):
            return weight["weight"][i, j].astype("float32")
        code = spec.layout.code(lambda word: weight["q_weight"][spec.place(i, word)], j).astype("float32")
        group = spec.place(i, j // spec.group)
        zero = float(spec.zero) if spec.symmetric else weight["q_zero"][group].astype("float32")
        return (code - zero) * weight["q_scale"][group].astype("float32")

    w = te.compute((rows, k), dequantized, name="dequantized")
    kk = te.reduce_axis((0, k), "kk")
    acc = te.compute((m, rows), lambda i, j: te.sum(x[i, kk].astype("float32") * w[j, kk], axis=kk), name="matmul")

    def finished(i: Expr, j: Expr) -> Expr:
        value = acc[i, j]
        if bias:
            value = value + bias[0][j].astype("float32")
        if problem.epilogue.activation == "relu":
            value = tirx.max(value, tirx.const(0, "float32"))
        elif problem.epilogue.activation == "silu_mul":
            value = value * tirx.sigmoid(value) * acc[i, j + n]
        if residual:
            value = value + residual[0][i, j].astype("float32")
        return value.astype(problem.out_dtype)

    y = te.compute((m, n), finished, name="y")
    function = te.create_prim_func([x, *weight.values(), *bias, *residual, y])
    # 8 is kOpaque: FuseOps leaves it to FuseEpilogue.
    return function.with_attrs({TAG: encode_problem(problem), "tirx.noalias": True, "op_pattern": 8})
