"""`QuantizeLinears` rewrites what is planned, in both orientations, computes the same, and declines the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_linear import arrays_of, random_matrix
from helpers_passes import block_module, block_plan, check_golden, run_module
from tvm import relax

from awq_compile.errors import CompileError
from awq_compile.formats import QuantizedMatrix, QuantSpec, dequantize_matrix
from awq_compile.passes.fuse_epilogue import FuseEpilogue
from awq_compile.passes.quantize_linears import QuantizeLinears

SPEC = QuantSpec(4, 32)
SHAPES = {"embed": (50, 64), "mix": (64, 64), "gate_up": (192, 64), "down": (64, 96)}


def weights(spec: QuantSpec) -> dict[str, QuantizedMatrix]:
    """Packed matrices of `Block`."""
    rng = np.random.default_rng(1)
    return {name: random_matrix(spec, n, k, rng) for name, (n, k) in SHAPES.items()}  # type: ignore[misc]


def expected(packed: dict[str, QuantizedMatrix], bias: Any, ids: Any) -> Any:
    """`Block.run` in float64."""
    w = {name: np.asarray(dequantize_matrix(matrix, np.float64)) for name, matrix in packed.items()}
    x = w["embed"][ids]
    x = x @ w["mix"].T + bias + x
    gate, up = np.split(x @ w["gate_up"].T, 2, axis=-1)
    x = (gate / (1 + np.exp(-gate)) * up) @ w["down"].T + x
    return x @ w["embed"].T


@pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("spec", [SPEC, QuantSpec(3, 32, False)], ids=lambda s: s.name)
def test_the_rewritten_module_computes_the_dequantised_one(spec: QuantSpec, fuse: bool) -> None:
    """With the tied embedding packed once and read by the take and the last matmul."""
    module = QuantizeLinears(block_plan(spec)).as_tvm()(block_module())
    module = FuseEpilogue().as_tvm()(module) if fuse else module
    packed, rng = weights(spec), np.random.default_rng(2)
    bias, ids = rng.standard_normal(64).astype(np.float16), np.array([3, 0, 49, 3], np.int32)
    arguments = [ids]
    for name in SHAPES:
        arguments += arrays_of(packed[name]) + ([bias] if name == "mix" else [])
    names = [p.name for p in module["run"].params]
    assert len(names) == len(arguments) and len(set(names)) == len(names)
    result, exact = run_module(module, arguments), expected(packed, bias, ids)
    assert np.abs(result - exact).max() < 1e-4 * np.abs(exact).max()


def test_golden_ir() -> None:
    """The rewritten graph, word for word."""
    check_golden("quantize_linears", QuantizeLinears(block_plan(SPEC)).as_tvm()(block_module()))


def test_the_given_module_is_left_alone() -> None:
    """Several targets are built from one exported module."""
    module = block_module()
    before = module.script()
    QuantizeLinears(block_plan(SPEC)).as_tvm()(module)
    assert module.script() == before


def direct(read_twice: bool = False) -> Any:
    """run(x (2, 3, 64), w (64, 96)) = x @ w (+ sum of w): the orientation of ONNX."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3, 64), "float32"))
    w = relax.Var("w.weight", relax.TensorType((64, 96), "float32"))
    with builder.function("run", [x, w], {"num_input": 1}):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, w))
            if read_twice:
                y = builder.emit(relax.op.add(y, relax.op.sum(w, axis=[0])))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    return builder.get()


def test_a_weight_without_transpose_is_packed_as_its_transpose() -> None:
    """W (K, N) becomes packed rows of Wᵀ, and a rank-3 x is flattened around the call."""
    matrix = random_matrix(SPEC, 96, 64, np.random.default_rng(3))
    assert isinstance(matrix, QuantizedMatrix)
    x = np.random.default_rng(4).standard_normal((2, 3, 64)).astype(np.float32)
    module = QuantizeLinears({"w.weight": SPEC}).as_tvm()(direct())
    result = run_module(module, [x, *arrays_of(matrix)])
    assert np.abs(result - x @ dequantize_matrix(matrix).T).max() < 1e-4


def test_another_reader_of_a_planned_weight_is_an_error() -> None:
    """A weight cannot be packed and still be summed; the parameter and the operator are named."""
    with pytest.raises(CompileError, match=r"w\.weight is read by .*sum"):
        QuantizeLinears({"w.weight": SPEC}).run(direct(read_twice=True))


def test_a_planned_parameter_that_nothing_reads_is_an_error() -> None:
    """A typing error in a plan does not leave a weight in floating point."""
    with pytest.raises(CompileError, match=r"down\.wait"):
        QuantizeLinears(block_plan(SPEC) | {"down.wait": SPEC}).run(block_module())


def test_an_unplanned_matmul_is_left() -> None:
    """Its weight stays one parameter, stored as float16."""
    plan = {name: spec for name, spec in block_plan(SPEC).items() if name != "down.weight"}
    module = QuantizeLinears(plan).as_tvm()(block_module())
    kept = next(p for p in module["run"].params if p.name == "down.weight")
    assert str(kept.ty.dtype) == "float16"
    assert "R.matmul" in module["run"].script()
