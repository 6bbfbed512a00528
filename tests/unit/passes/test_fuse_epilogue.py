"""`FuseEpilogue` fuses bias, activation and residual, in that order, and nothing that is read elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from helpers_passes import block_module, block_plan, check_golden
from tvm import relax

from awq_compile.formats import QuantSpec
from awq_compile.kernels.linear import TAG
from awq_compile.passes.fuse_epilogue import FuseEpilogue
from awq_compile.passes.quantize_linears import QuantizeLinears
from awq_compile.problem import decode_problem

SPEC = QuantSpec(4, 32)


def epilogues(module: Any) -> list[str]:
    """Names of the epilogues of all quantised linears."""
    found = [decode_problem(str(f.attrs[TAG])) for f in module.functions.values() if f.attrs and TAG in f.attrs]
    return sorted(p.epilogue.name for p in found)


def quantised(body: Any, dtype: str = "float32") -> Any:
    """run(x (m, 32), r (m, 64), w (64, 32), b) → body(builder, x Wᵀ, r, b), quantised."""
    builder = relax.BlockBuilder()
    from tvm import tirx

    m = tirx.Var("m", "int64")
    x, r = (relax.Var(name, relax.TensorType((m, size), dtype)) for name, size in (("x", 32), ("r", 64)))
    w, b = (
        relax.Var("w.weight", relax.TensorType((64, 32), dtype)),
        relax.Var("b", relax.TensorType((64,), dtype)),
    )
    with builder.function("run", [x, r, w, b], {"num_input": 2}):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, builder.emit(relax.op.permute_dims(w))))
            out = builder.emit_output(body(builder, y, r, b))
        builder.emit_func_output(out)
    return FuseEpilogue().as_tvm()(QuantizeLinears({"w.weight": SPEC}).as_tvm()(builder.get()))


def test_golden_ir() -> None:
    """A whole block: bias + residual, silu · mul, residual, and a plain last matmul."""
    module = FuseEpilogue().as_tvm()(QuantizeLinears(block_plan(SPEC)).as_tvm()(block_module()))
    assert epilogues(module) == ["", "bias_residual", "residual", "silu_mul"]
    check_golden("fuse_epilogue", module)


@pytest.mark.parametrize(
    ("body", "fused"),
    [
        (lambda b, y, r, c: relax.op.add(r, y), "residual"),
        (lambda b, y, r, c: relax.op.add(b.emit(relax.op.add(y, c)), r), "bias_residual"),
        (lambda b, y, r, c: relax.op.nn.relu(b.emit(relax.op.add(c, y))), "bias_relu"),
        (lambda b, y, r, c: relax.op.add(b.emit(relax.op.nn.relu(y)), r), "relu_residual"),
    ],
)
def test_what_is_fused(body: Any, fused: str) -> None:
    """Whatever the order of an addition's operands."""
    assert epilogues(quantised(body)) == [fused]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        # the product is read twice
        (lambda b, y, r, c: relax.op.multiply(b.emit(relax.op.add(y, r)), y), ""),
        # a bias behind the residual would change the order
        (lambda b, y, r, c: relax.op.add(b.emit(relax.op.add(y, r)), c), "residual"),
        # a second residual has no place
        (lambda b, y, r, c: relax.op.add(b.emit(relax.op.add(y, r)), r), "residual"),
        # an activation behind the residual likewise
        (lambda b, y, r, c: relax.op.nn.relu(b.emit(relax.op.add(y, r))), "residual"),
        # a bias that is computed is not stored as float16
        (lambda b, y, r, c: relax.op.add(y, b.emit(relax.op.multiply(c, c))), ""),
        # silu(a) * b where b is no half of the same product
        (lambda b, y, r, c: relax.op.multiply(b.emit(relax.op.nn.silu(y)), r), ""),
    ],
)
def test_what_is_declined(body: Any, left: str) -> None:
    """These keep their operators outside."""
    assert epilogues(quantised(body)) == [left]


@pytest.mark.parametrize(
    ("sections", "left", "columns"),
    [(2, "silu_mul", 32), ([32], "silu_mul", 32), (4, "", 16), ([16, 32], "", 16), ([1], "", 63)],
)
def test_only_halves_are_a_gate_and_its_up(sections: int | list[int], left: str, columns: int) -> None:
    """Other parts, and those that nobody reads, leave the split where it is, and the result as wide as it was."""

    def body(b: Any, y: Any, r: Any, c: Any) -> Any:
        parts = b.emit(relax.op.split(y, sections, axis=-1))
        gate = b.emit(relax.op.nn.silu(b.emit(relax.TupleGetItem(parts, 0))))
        return relax.op.multiply(gate, b.emit(relax.TupleGetItem(parts, 1)))

    module = quantised(body)
    assert epilogues(module) == [left]
    assert int(module["run"].ret_ty.shape[1]) == columns


def test_logits_are_not_rounded_to_float16() -> None:
    """A cast behind the product, or behind its residual, becomes the type of y; an addition behind the cast stays."""

    def cast(b: Any, y: Any) -> Any:
        return b.emit(relax.op.astype(y, "float32"))

    module = quantised(lambda b, y, r, c: cast(b, y), "float16")
    assert epilogues(module) == ["wide"]
    assert module["run"].ret_ty.dtype == "float32"
    assert epilogues(quantised(lambda b, y, r, c: cast(b, b.emit(relax.op.add(y, r))), "float16")) == ["residual_wide"]
    assert epilogues(quantised(lambda b, y, r, c: relax.op.add(cast(b, y), cast(b, r)), "float16")) == ["wide"]
    assert epilogues(quantised(lambda b, y, r, c: relax.op.astype(y, "float16"))) == [""]
