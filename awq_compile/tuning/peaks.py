"""What this machine's devices reach at most: the rates of reading memory and of float32 multiply-adds, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from awq_compile.runtime.lean_tvm import tvm
from awq_compile.targets.cpu import CpuTarget
from awq_compile.targets.roofs import Roof

_SOURCE: Final = "measured"
_RUNS: Final = 7
_CHAINS: Final = 12  # sums that do not wait for each other: latency times throughput of every current CPU's units
_STEPS: Final = 60_000
_OPENCL: Final = """
__kernel void read(__global const uint4* source, __global uint4* out, uint count) {
  uint4 total = 0;
  for (uint i = get_global_id(0); i < count; i += get_global_size(0)) total += source[i];
  out[get_global_id(0)] = total;
}
__kernel void multiply_add(__global float* out, uint steps) {
  float8 a = out[get_global_id(0)], b = 0.5f, s0 = 1, s1 = 2, s2 = 3, s3 = 4;
  for (uint i = 0; i < steps; ++i) {
    s0 = fma(s0, a, b); s1 = fma(s1, a, b); s2 = fma(s2, a, b); s3 = fma(s3, a, b);
  }
  s0 += s1 + s2 + s3;
  out[get_global_id(0)] = s0.s0 + s0.s1 + s0.s2 + s0.s3 + s0.s4 + s0.s5 + s0.s6 + s0.s7;
}
"""


def cpu_roof(spec: CpuTarget, threads: int, cache_bytes: int) -> Roof:
    """Of this machine's CPU with `threads` threads."""

    def seconds(call: Callable[..., object], *arguments: Any) -> float:
        start = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - start

    words = 4 * cache_bytes // 4
    source, sink = tvm.runtime.tensor(np.ones(words, np.uint32)), tvm.runtime.tensor(np.zeros(threads * 16, np.uint32))
    read = _compiled(read_kernel(words, threads), spec)
    lanes = spec.unit.lanes
    sums = tvm.runtime.tensor(np.full(threads * lanes * _CHAINS, 0.5, np.float32))
    multiply = _compiled(_multiply_kernel(threads, lanes), spec)
    read_seconds = _least(lambda: seconds(read, source, sink))
    multiply_seconds = _least(lambda: seconds(multiply, sums))
    flops = 2.0 * threads * lanes * _CHAINS * _STEPS
    return Roof(4.0 * words / read_seconds, flops / multiply_seconds, 0.0, threads, _SOURCE)


def opencl_roof(context: Any, queue: Any, cache_bytes: int, units: int) -> Roof:
    """Of an OpenCL GPU; `queue` measures time."""
    import pyopencl as cl

    program = cl.Program(context, _OPENCL).build()
    items = units * 1024
    words = 4 * cache_bytes // 16
    source = cl.Buffer(context, cl.mem_flags.READ_WRITE, 16 * words)
    out = cl.Buffer(context, cl.mem_flags.READ_WRITE, 16 * items)
    cl.enqueue_fill_buffer(queue, source, np.uint32(1), 0, 16 * words)
    cl.enqueue_fill_buffer(queue, out, np.float32(0.5), 0, 16 * items)
    steps = 2000

    def seconds(name: str, *arguments: Any) -> float:
        event = getattr(program, name)(queue, (items,), (64,), *arguments)
        event.wait()
        return float(event.profile.end - event.profile.start) * 1e-9

    read_seconds = _least(lambda: seconds("read", source, out, np.uint32(words)))
    multiply_seconds = _least(lambda: seconds("multiply_add", out, np.uint32(steps)))
    return Roof(16.0 * words / read_seconds, 2.0 * items * 32 * steps / multiply_seconds, 0.0, units, _SOURCE)


def _least(run: Callable[[], float]) -> float:
    """Of several runs after one that warms up: a peak is what was reached, not what is usual."""
    run()
    return min(run() for _ in range(_RUNS))


def _compiled(function: Any, spec: CpuTarget) -> Any:
    module = tvm.IRModule({"peak": function.with_attr("global_symbol", "peak")})
    return tvm.tirx.build(module, target=tvm.target.Target(spec.tvm_target))["peak"]


def read_kernel(words: int, threads: int) -> Any:
    """PrimFunc that sums a buffer of uint32 words with `threads` parallel streams of vector loads."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    lanes, unroll = 16, 8
    per_thread = words // threads // (lanes * unroll) * (lanes * unroll)
    with IRBuilder() as builder, T.prim_func():
        T.func_name("read")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        source = T.arg("source", T.buffer((words,), "uint32"))
        out = T.arg("out", T.buffer((threads * lanes,), "uint32"))
        with T.parallel(0, threads) as thread:
            acc = T.alloc_buffer((lanes * unroll,), "uint32", scope="local")
            zero = tirx.Broadcast(tirx.const(0, "uint32"), lanes)
            for u in range(unroll):
                T.buffer_store(acc, zero, [T.ramp(u * lanes, 1, lanes)])
            with T.serial(0, per_thread // (lanes * unroll)) as i:
                for u in range(unroll):
                    at = T.ramp(thread * per_thread + (i * unroll + u) * lanes, 1, lanes)
                    here = T.ramp(u * lanes, 1, lanes)
                    T.buffer_store(acc, acc[here] + source[at], [here])
            total = acc[T.ramp(0, 1, lanes)]
            for u in range(1, unroll):
                total = total + acc[T.ramp(u * lanes, 1, lanes)]
            T.buffer_store(out, total, [T.ramp(thread * lanes, 1, lanes)])
    return builder.get()


def _multiply_kernel(threads: int, lanes: int) -> Any:
    """PrimFunc of `threads` times `_CHAINS` vectors s = s a + b, `_STEPS` times."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder, T.prim_func():
        T.func_name("multiply_add")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        sums = T.arg("sums", T.buffer((threads * _CHAINS * lanes,), "float32"))
        with T.parallel(0, threads) as thread:
            acc = T.alloc_buffer((_CHAINS * lanes,), "float32", scope="local")
            first = thread * _CHAINS * lanes
            here = [T.ramp(chain * lanes, 1, lanes) for chain in range(_CHAINS)]
            factor = T.bind(sums[T.ramp(first, 1, lanes)])
            for chain in range(_CHAINS):
                T.buffer_store(acc, sums[T.ramp(first + chain * lanes, 1, lanes)], [here[chain]])
            with T.serial(0, _STEPS):
                for chain in range(_CHAINS):
                    half = tirx.Broadcast(tirx.const(0.25, "float32"), lanes)
                    T.buffer_store(acc, acc[here[chain]] * factor + half, [here[chain]])
            for chain in range(_CHAINS):
                T.buffer_store(sums, acc[here[chain]], [T.ramp(first + chain * lanes, 1, lanes)])
    return builder.get()
