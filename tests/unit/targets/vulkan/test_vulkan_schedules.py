"""Operators under TVM's own GPU schedules, and random expressions, against LLVM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from helpers_vulkan import Built, elementwise, executor, run_elementwise, run_llvm, validate, vulkan_target
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te, tirx, topi
from tvm.relax.backend.gpu_generic.cumsum import gpu_2d_continuous_cumsum
from tvm.relax.backend.gpu_generic.sampling import gpu_multinomial_from_uniform
from tvm.s_tir import dlight
from tvm.script import tirx as T


def scheduled(function: Any) -> Any:
    gpu = dlight.gpu
    rules = [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]
    with vulkan_target():
        return dlight.ApplyDefaultSchedule(*rules)(tvm.IRModule({"main": function}))


def matmul(m: int, n: int, k: int, dtype: str) -> list[te.Tensor]:
    a, b = te.placeholder((m, k), dtype, name="a"), te.placeholder((n, k), dtype, name="b")
    kk = te.reduce_axis((0, k), "kk")
    body = lambda i, j: te.sum(a[i, kk].astype("float32") * b[j, kk].astype("float32"), axis=kk)  # noqa: E731
    return [a, b, te.compute((m, n), body, name="c")]


def softmax() -> list[te.Tensor]:
    x = te.placeholder((7, 300), "float32", name="x")
    return [x, topi.nn.softmax(x)]


def layer_norm() -> list[te.Tensor]:
    x = te.placeholder((5, 256), "float32", name="x")
    gamma, beta = (te.placeholder((256,), "float32", name=name) for name in ("gamma", "beta"))
    return [x, gamma, beta, topi.nn.layer_norm(x, gamma, beta, [1], 1e-5)]


def total() -> list[te.Tensor]:
    x = te.placeholder((3, 1000), "float32", name="x")
    return [x, topi.sum(x, axis=1)]


def largest() -> list[te.Tensor]:
    x = te.placeholder((3, 500), "float32", name="x")
    return [x, topi.argmax(x, axis=1)]


CASES = {
    "matmul": lambda: matmul(70, 50, 64, "float32"),
    "matmul of halves": lambda: matmul(64, 96, 128, "float16"),
    "gemv": lambda: matmul(1, 128, 256, "float16"),
    "softmax": softmax,
    "layer norm": layer_norm,
    "sum": total,
    "argmax": largest,
}


@pytest.mark.parametrize("name", CASES)
def test_operators_under_dlight(name: str) -> None:
    """dlight's schedules (shared memory, allreduce, vectors, unrolling) compute what the plain loops compute."""
    tensors = CASES[name]()
    function = te.create_prim_func(tensors)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal([int(d) for d in t.shape]).astype(str(t.dtype)) for t in tensors[:-1]]
    arrays.append(np.zeros([int(d) for d in tensors[-1].shape], str(tensors[-1].dtype)))
    found = Built(scheduled(function))(executor("float16", "storage16"), *arrays)[-1]
    expected = run_llvm(function, *arrays)[-1]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_sorting_scanning_and_sampling(tmp_path: Path) -> None:
    """TVM's GPU sort, prefix sum and multinomial sampling are valid shaders.

    They are not run: sort and scan have workspaces on the device, which the wheel cannot allocate, and scan
    and sampling add in place within 32 threads without a barrier, which takes subgroups of 32 in lockstep.
    """
    x = te.placeholder((3, 600), "float32", name="x")
    with vulkan_target():
        sort = te.create_prim_func([x, topi.gpu.sort(x, axis=1, is_ascend=False)])
        scan, sample = gpu_2d_continuous_cumsum(in_dtype="float32"), gpu_multinomial_from_uniform()
        functions = {"sort": sort, "scan": scan, "sample": sample}
        named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
        built = Built(tvm.IRModule(named))
    assert len(built.shaders) >= 5
    validate(list(built.shaders.values()), tmp_path)


def test_prefix_sum_with_barriers() -> None:
    """A scan over a block with a barrier on either side of each addition."""

    @T.prim_func
    def main(a: T.Buffer((256,), "float32"), b: T.Buffer((256,), "float32")):
        T.func_attr({"tirx.noalias": True})
        bx = T.launch_thread("blockIdx.x", 2)
        tx = T.launch_thread("threadIdx.x", 128)
        s = T.alloc_buffer((128,), "float32", scope="shared")
        add = T.alloc_buffer((1,), "float32", scope="local")
        s[tx] = a[bx * 128 + tx]
        for k in range(7):
            T.tvm_storage_sync("shared")
            add[0] = T.if_then_else(tx >= T.shift_left(1, k), s[tx - T.shift_left(1, k)], T.float32(0))
            T.tvm_storage_sync("shared")
            s[tx] = s[tx] + add[0]
        b[bx * 128 + tx] = s[tx]

    a = np.random.default_rng(3).integers(-9, 9, 256).astype("float32")
    _, b = Built(main)(executor(), a, np.zeros_like(a))
    np.testing.assert_array_equal(b, np.cumsum(a.reshape(2, 128), axis=1).reshape(-1))


def expressions(inputs: int) -> st.SearchStrategy[Any]:
    """Trees over `inputs` int32 values, as functions of them."""
    cast = tirx.Cast
    binary = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "floordiv": lambda a, b: tirx.floordiv(a, (b & 7) + 1),
        "floormod": lambda a, b: tirx.floormod(a, (b & 7) + 1),
        "truncmod": lambda a, b: tirx.truncmod(a, (b & 15) + 1),
        "min": tirx.min,
        "max": tirx.max,
        "and": lambda a, b: a & b,
        "xor": lambda a, b: a ^ b,
        "shr": lambda a, b: a >> (b & 31),
        "shl": lambda a, b: a << (b & 7),
        "select": lambda a, b: tirx.Select(a < b, a, b * 2),
        "branch": lambda a, b: tirx.if_then_else(a >= b, tirx.floordiv(a, (b & 3) + 1), b),
        "wide": lambda a, b: cast("int32", cast("int64", a) * cast("int64", b) >> tirx.const(7, "int64")),
        "narrow": lambda a, b: cast("int32", cast("int8", a)) + cast("int32", cast("uint16", b & 0xFFFF)),
        "unsigned": lambda a, b: cast("int32", cast("uint32", a & 0x7FFFFFFF) // (cast("uint32", b & 63) + 1)),
        "float": lambda a, b: cast("int32", cast("float32", a & 1023) * cast("float32", b & 63)),
    }
    leaves = st.one_of(
        st.integers(0, inputs - 1).map(lambda k: lambda x: x[k]),
        st.integers(-9, 9).map(lambda v: lambda x: tirx.const(v, "int32")),
    )

    def node(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        parts = st.tuples(st.sampled_from(sorted(binary)), children, children)
        return parts.map(lambda p: lambda x: binary[p[0]](p[1](x), p[2](x)))

    return st.recursive(leaves, node, max_leaves=10)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.lists(expressions(3), min_size=8, max_size=8))
def test_random_expressions(trees: list[Any]) -> None:
    """Integer expressions of every kind, nested at random, agree with LLVM bit for bit."""
    rng = np.random.default_rng(2)
    inputs = [rng.integers(-(1 << 20), 1 << 20, 96).astype("int32") for _ in range(3)]
    outputs = [("int32", lambda *x, tree=tree: tree(x)) for tree in trees]
    found = run_elementwise(executor("int64", "int8", "int16"), inputs, outputs)
    plain = elementwise(["int32"] * 3, outputs, 96, gpu=False)
    expected = run_llvm(plain, *inputs, *[np.zeros(96, "int32") for _ in trees])[3:]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
