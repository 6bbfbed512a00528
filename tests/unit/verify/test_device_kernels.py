"""What TVM emits for CUDA, Metal and OpenCL, executed here and held against NumPy in float64 or LLVM."""

from __future__ import annotations

from typing import Any

import helpers_kernels as hk
import numpy as np
import pytest
import tvm
from tvm import te, tirx, topi
from tvm.script import tirx as T

from awq_compile.verify.executors.base import Executor, KernelError
from awq_compile.verify.executors.simt import SimtExecutor

RNG = np.random.default_rng(3)


def normal(*shape: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(dtype)


def empty(*shape: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    """Poison that no kernel computes by accident."""
    result = np.empty(shape, dtype)
    result.reshape(-1).view(np.uint8)[...] = 0xCD
    return result


def named(args: list[te.Tensor], name: str) -> Any:
    return te.create_prim_func(args).with_attr("global_symbol", name)


def test_addition_with_a_dynamic_length_writes_every_element_and_no_more(device: tuple[str, Executor]) -> None:
    kind, executor = device
    n = te.var("n", "int64")
    a, b = te.placeholder((n,), "float32", name="a"), te.placeholder((n,), "float32", name="b")
    built = hk.build(named([a, b, te.compute((n,), lambda i: a[i] + b[i], name="c")], "add"), kind, "fallback")
    for length in (1, 31, 256, 1000):
        x, y, out = normal(length), normal(length), empty(length)
        hk.run(built, executor, "add", [x, y, out])
        np.testing.assert_array_equal(out, x + y)


def softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 4e-3)])
def test_softmax_reduces_across_threads(device: tuple[str, Executor], dtype: str, tolerance: float) -> None:
    kind, executor = device
    n = te.var("n", "int64")
    x = te.placeholder((n, 96), dtype, name="x")
    built = hk.build(named([x, topi.nn.softmax(x)], "softmax"), kind)
    for rows in (1, 5):
        value, out = normal(rows, 96, dtype=dtype), empty(rows, 96, dtype=dtype)
        hk.run(built, executor, "softmax", [value, out])
        np.testing.assert_allclose(out, softmax(value.astype(np.float64)), rtol=tolerance, atol=tolerance / 50)


def test_rms_norm_in_half_precision(device: tuple[str, Executor]) -> None:
    kind, executor = device
    n = te.var("n", "int64")
    x, w = te.placeholder((n, 128), "float16", name="x"), te.placeholder((128,), "float16", name="w")
    built = hk.build(named([x, w, topi.nn.rms_norm(x, w, [1], 1e-5)], "rms_norm"), kind)
    value, weight, out = normal(3, 128, dtype="float16"), normal(128, dtype="float16"), empty(3, 128, dtype="float16")
    hk.run(built, executor, "rms_norm", [value, weight, out])
    exact = value.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(out, exact, rtol=4e-3, atol=1e-3)


def test_packed_codes_are_unpacked_from_words_and_bytes(device: tuple[str, Executor]) -> None:
    kind, executor = device
    words, zeros = te.placeholder((16, 8), "uint32", name="words"), te.placeholder((16, 1), "uint8", name="zeros")

    def code(i: tirx.Var, j: tirx.Var) -> Any:
        nibble = (words[i, j // 8] >> (j % 8 * 4).astype("uint32")) & tirx.const(15, "uint32")
        return (nibble.astype("float32") - zeros[i, 0].astype("float32")).astype("float16")

    built = hk.build(named([words, zeros, te.compute((16, 64), code, name="y")], "unpack"), kind, "fallback")
    packed = RNG.integers(0, 2**32, (16, 8), np.uint32)
    zero, out = RNG.integers(0, 200, (16, 1), np.uint8), empty(16, 64, dtype="float16")
    hk.run(built, executor, "unpack", [packed, zero, out])
    codes = (packed[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(16, 64)
    np.testing.assert_array_equal(out, codes.astype(np.float16) - zero.astype(np.float16))


def staged_matmul(kind: str, m: int, n: int, k: int) -> hk.Built:
    """x @ w.T in float32: tiles of 16 x 16 whose operands pass through shared memory."""
    x, w = te.placeholder((m, k), "float32", name="x"), te.placeholder((n, k), "float32", name="w")
    kk = te.reduce_axis((0, k), "kk")
    y = te.compute((m, n), lambda i, j: te.sum(x[i, kk] * w[j, kk], axis=kk), name="y")
    schedule = tvm.s_tir.Schedule(tvm.IRModule({"matmul": named([x, w, y], "matmul")}))
    schedule.work_on("matmul")
    block = schedule.get_sblock("y")
    i, j, r = schedule.get_loops(block)
    (bi, ti), (bj, tj), (ro, ri) = (schedule.split(loop, [None, 16]) for loop in (i, j, r))
    schedule.reorder(bi, bj, ti, tj, ro, ri)
    for loop, tag in ((bi, "blockIdx.y"), (bj, "blockIdx.x"), (ti, "threadIdx.y"), (tj, "threadIdx.x")):
        schedule.bind(loop, tag)
    for operand in (0, 1):
        staged = schedule.cache_read(block, operand, "shared")
        schedule.compute_at(staged, ro)
        rows, columns = schedule.get_loops(staged)[-2:]
        schedule.bind(rows, "threadIdx.y")
        schedule.bind(columns, "threadIdx.x")
    return hk.build(schedule.mod["matmul"].with_attr("tirx.is_scheduled", True), kind)


def test_a_matmul_staged_in_shared_memory(device: tuple[str, Executor]) -> None:
    kind, executor = device
    built = staged_matmul(kind, 32, 48, 64)
    x, w, out = normal(32, 64), normal(48, 64), empty(32, 48)
    hk.run(built, executor, "matmul", [x, w, out])
    np.testing.assert_allclose(out, x.astype(np.float64) @ w.astype(np.float64).T, rtol=1e-5, atol=1e-5)


def test_swapped_operands_do_not_pass(device: tuple[str, Executor]) -> None:
    """The check compares numbers: with both operands of a subtraction exchanged, they differ."""
    kind, executor = device
    a, b = te.placeholder((64,), "float32", name="a"), te.placeholder((64,), "float32", name="b")
    built = hk.build(named([a, b, te.compute((64,), lambda i: a[i] - b[i], name="c")], "sub"), kind, "fallback")
    x, y, out = normal(64), normal(64), empty(64)
    hk.run(built, executor, "sub", [y, x, out])
    assert not np.allclose(out, x - y)


def test_the_race_in_tvms_cumulative_sum_is_reported() -> None:
    """Its scan reads a neighbour's words and writes its own without a barrier: right only in lockstep."""
    from tvm.relax.backend.gpu_generic.cumsum import gpu_2d_continuous_cumsum

    function = gpu_2d_continuous_cumsum(in_dtype="int32", out_dtype="int32")
    built = hk.build(function.with_attrs({"global_symbol": "cumsum", "tirx.is_scheduled": True}), "cuda")
    x, out = RNG.integers(-9, 9, (2, 700)).astype(np.int32), empty(2, 700, dtype="int32")
    with pytest.raises(KernelError, match="cumsum_kernel races"):
        hk.run(built, SimtExecutor(), "cumsum", [x, out])


@pytest.mark.parametrize("length", [3, 300])
def test_a_scan_in_several_launches_with_a_workspace(device: tuple[str, Executor], length: int) -> None:
    """Host code with a workspace, a loop and a branch: the table runs all of it."""
    kind, executor = device

    @T.prim_func(s_tir=True)
    def scan(a: T.handle, b: T.handle) -> None:
        T.func_attr({"global_symbol": "scan", "tirx.is_scheduled": True})
        n = T.int64()
        x, y = T.match_buffer(a, (n,), "int32"), T.match_buffer(b, (n,), "int32")
        work = T.alloc_buffer((n,), "int32")
        for block in T.thread_binding((n + 63) // 64, thread="blockIdx.x"):
            for thread in T.thread_binding(64, thread="threadIdx.x"):
                if block * 64 + thread < n:
                    y[block * 64 + thread] = x[block * 64 + thread]
        for step in T.serial(9):
            if T.shift_left(T.int64(1), T.Cast("int64", step)) < n:
                for block in T.thread_binding((n + 63) // 64, thread="blockIdx.x"):
                    for thread in T.thread_binding(64, thread="threadIdx.x"):
                        if block * 64 + thread < n:
                            work[block * 64 + thread] = y[block * 64 + thread]
                for block in T.thread_binding((n + 63) // 64, thread="blockIdx.x"):
                    for thread in T.thread_binding(64, thread="threadIdx.x"):
                        at = T.meta_var(block * 64 + thread)
                        if at < n and at >= T.shift_left(T.int64(1), T.Cast("int64", step)):
                            y[block * 64 + thread] = (
                                work[block * 64 + thread]
                                + work[block * 64 + thread - T.shift_left(T.int64(1), T.Cast("int64", step))]
                            )

    built = hk.build(scan, kind)
    x, out = RNG.integers(-9, 9, length).astype(np.int32), empty(length, dtype="int32")
    launched = hk.run(built, executor, "scan", [x, out])
    assert len(launched) == 1 + 2 * int(np.ceil(np.log2(length)))
    np.testing.assert_array_equal(out, np.cumsum(x))
