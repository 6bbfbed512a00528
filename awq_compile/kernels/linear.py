"""The quantised linear as one PrimFunc: arguments, dispatch by rows, and the tag that names the problem.

    y[b, s, n] = epilogue(sum_k x[b, s, k] * W[n, k])        x (B, S, K), y (B, S, N), M = B * S

Arguments in order: x, the arrays of W (`WeightSpec.arrays`), the bias (N) float16 and the residual
(B, S, N) where the epilogue has them, then y. A rank-2 x (M, K) has S left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from awq_compile.formats import QuantSpec, WeightSpec
from awq_compile.kernels.simd import cast, ramp
from awq_compile.problem import Epilogue, MatmulProblem

Expr = Any
Buffer = Any

TAG: Final = "awq_compile.problem"  # function and sblock attribute: a MatmulProblem as JSON


def encode_problem(problem: MatmulProblem) -> str:
    """A `MatmulProblem` as a JSON string, the value of `TAG`."""
    return json.dumps(asdict(problem), sort_keys=True)


def decode_problem(text: str) -> MatmulProblem:
    """Inverse of `encode_problem`."""
    data = json.loads(text)
    spec = data["spec"]
    data["spec"] = QuantSpec(**spec) if "bits" in spec else _float16(spec)
    return MatmulProblem(**{**data, "epilogue": Epilogue(**data["epilogue"])})


def _float16(spec: dict[str, Any]) -> WeightSpec:
    from awq_compile.formats import Float16Spec

    return Float16Spec(**spec)


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

    @property
    def codes(self) -> str:
        """Name of the array of packed words, or of float16 weights."""
        return next(iter(self.weight))

    def column(self, name: str, first_row: Expr, column: Expr, lanes: int) -> Expr:
        """One column of an array of W, in `lanes` rows from `first_row` on."""
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
            acc = tirx.max(acc, cast("float32", tirx.const(0, "float32"), 1) if lanes == 1 else acc * 0.0)
        if gate is not None:
            acc = gate / (tirx.exp(gate * -1.0) + 1.0) * acc
        if self.residual is not None:
            acc = acc + cast("float32", self.residual[m, n], lanes)
        return acc if self.problem.dtype == "float32" else cast(self.problem.dtype, acc, lanes)


@contextmanager
def linear_function(problem: MatmulProblem, rank: int, attrs: dict[str, Any]) -> Iterator[tuple[IRBuilder, LinearArgs]]:
    """Opens a PrimFunc with the arguments of `problem`; `builder.get()` is the function, after the block."""
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(problem.name)
            T.func_attr({"tirx.noalias": True, TAG: encode_problem(problem), **attrs})
            batch = [tirx.Var(name, "int64") for name in ("b", "s", "t")[: rank - 1]]
            m: Expr = batch[0]
            for size in batch[1:]:
                m = m * size
            n, k, dtype = problem.n, problem.k, problem.dtype

            def matrix(whole: Buffer, columns: int) -> Buffer:
                return whole if rank == 2 else T.decl_buffer((m, columns), dtype, data=whole.data)

            x = T.arg("x", T.buffer((*batch, k), dtype))
            arrays = problem.spec.arrays(problem.weight_rows, k)
            weight = {name: T.arg(name, T.buffer(shape, kind)) for name, (shape, kind) in arrays.items()}
            bias = T.arg("bias", T.buffer((n,), "float16")) if problem.epilogue.bias else None
            residual = T.arg("residual", T.buffer((*batch, n), dtype)) if problem.epilogue.residual else None
            y = T.arg("y", T.buffer((*batch, n), dtype))
            residual = None if residual is None else matrix(residual, n)
            flat = {
                name: T.decl_buffer((rows * columns,), kind, data=weight[name].data)
                for name, ((rows, columns), kind) in arrays.items()
            }
            yield builder, LinearArgs(problem, m, matrix(x, k), weight, flat, bias, residual, matrix(y, n))
