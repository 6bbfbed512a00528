"""The passes serve any front end: an MLP that comes through `tvm.relax.frontend.onnx`."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import tvm
from helpers_linear import random_matrix
from helpers_passes import run_module
from onnx import TensorProto, helper, numpy_helper
from tvm.relax.frontend.onnx import from_onnx

from awq_compile.formats import QuantizedMatrix, QuantSpec, dequantize_matrix, packed_name
from awq_compile.kernels.linear import TAG
from awq_compile.passes.apply_schedules import ApplySchedules
from awq_compile.passes.fuse_epilogue import FuseEpilogue
from awq_compile.passes.quantize_linears import QuantizeLinears
from awq_compile.passes.verify_quantized import VerifyQuantized
from awq_compile.problem import decode_problem
from awq_compile.targets import resolve_target

SPEC = QuantSpec(4, 32)
SIZES = {"w1": (64, 96), "w2": (96, 32)}  # (K, N): ONNX multiplies x (M, K) by W (K, N)


def mlp(weights: dict[str, np.ndarray], bias: np.ndarray) -> onnx.ModelProto:
    """y = relu(x w1 + bias) w2."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Add", ["h", "b1"], ["hb"]),
        helper.make_node("Relu", ["hb"], ["a"]),
        helper.make_node("MatMul", ["a", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 32])],
        [numpy_helper.from_array(a, name) for name, a in {**weights, "b1": bias}.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_an_onnx_mlp_is_quantised_fused_and_right() -> None:
    """Against onnxruntime on the dequantised weights."""
    rng = np.random.default_rng(0)
    packed = {name: random_matrix(SPEC, n, k, rng) for name, (k, n) in SIZES.items()}
    assert all(isinstance(matrix, QuantizedMatrix) for matrix in packed.values())
    dense = {name: np.ascontiguousarray(dequantize_matrix(m).T) for name, m in packed.items()}  # type: ignore[arg-type]
    bias = rng.standard_normal(96).astype(np.float16)
    model = mlp(dense, bias.astype(np.float32))
    module, _ = tvm.relax.frontend.detach_params(from_onnx(model, keep_params_in_input=True))
    plan = {p.name: SPEC for p in module["main"].params if tuple(int(s) for s in p.ty.shape) in SIZES.values()}
    assert len(plan) == 2
    cpu = resolve_target("cpu")
    for rewrite in (QuantizeLinears(plan), FuseEpilogue(), ApplySchedules(cpu.rule), VerifyQuantized(plan)):
        module = rewrite.as_tvm()(module)
    problems = [decode_problem(str(f.attrs[TAG])) for f in module.functions.values() if f.attrs and TAG in f.attrs]
    assert sorted(p.epilogue.name for p in problems) == ["", "bias_relu"]
    x = rng.standard_normal((5, 64)).astype(np.float32)
    stored = {packed_name(n, s): a for n, matrix in packed.items() for s, a in matrix.arrays().items()}  # type: ignore[union-attr]
    arguments = [stored.get(p.name, bias) for p in module["main"].params[1:]]
    result = run_module(module, [x, *arguments], "main")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.abs(result - session.run(None, {"x": x})[0]).max() < 1e-4
