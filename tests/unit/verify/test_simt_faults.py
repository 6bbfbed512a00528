"""What the CPU shim must notice: each kernel is right until one thing is broken on purpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from awq_compile.errors import CompileError
from awq_compile.verify.executors.base import DeviceCode, KernelError
from awq_compile.verify.executors.simt import SimtExecutor

RNG = np.random.default_rng(5)

# out[block] = sum of 64 values, by a tree in shared memory
CUDA_SUM = """
extern "C" __global__ void __launch_bounds__(64) sum_kernel(float* __restrict__ x, float* __restrict__ out, int n) {
  __shared__ alignas(64) float part[64];
  part[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  __syncthreads();  // 1
  for (int width = 32; width > 0; width >>= 1) {
    if ((int)threadIdx.x < width) part[threadIdx.x] += part[threadIdx.x + width];
    __syncthreads();  // 2
  }
  if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}
"""
METAL_SUM = """
#include <metal_stdlib>
using namespace metal;
struct sum_kernel_args_t {
  int n[2];
};
kernel void sum_kernel(  device float* x [[ buffer(0) ]],
  device float* out [[ buffer(1) ]],
  constant sum_kernel_args_t& arg [[ buffer(2) ]],
  uint blockIdx [[threadgroup_position_in_grid]],
  uint threadIdx [[thread_position_in_threadgroup]]
) {
  threadgroup float part[64];
  part[threadIdx] = x[blockIdx * 64 + threadIdx];
  threadgroup_barrier(mem_flags::mem_threadgroup);  // 1
  for (int width = 32; width > 0; width >>= 1) {
    if ((int)threadIdx < width) part[threadIdx] += part[threadIdx + width];
    threadgroup_barrier(mem_flags::mem_threadgroup);  // 2
  }
  if (threadIdx == 0) out[blockIdx] = part[0];
}
"""
SUMS = {
    "cuda": (CUDA_SUM, "__syncthreads();"),
    "metal": (METAL_SUM, "threadgroup_barrier(mem_flags::mem_threadgroup);"),
}


def launch(language: str, source: str, args: list[Any], grid: int = 1, block: int = 32, **options: Any) -> None:
    executor = SimtExecutor(**options)
    executor.load(DeviceCode(language, source))
    (name,) = executor.kernels
    executor.launch(name, args, (grid, 1, 1), (block, 1, 1))


def run_sum(language: str, source: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    x, out = RNG.standard_normal((3, 64)).astype(np.float32), np.full(3, np.nan, np.float32)
    launch(language, source, [x, out, 192], grid=3, block=64)
    return out, x.astype(np.float64).sum(1)


@pytest.mark.parametrize("language", SUMS)
def test_the_reduction_is_right_as_long_as_nothing_is_broken(language: str) -> None:
    out, exact = run_sum(language, SUMS[language][0])
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("barrier", ["// 1", "// 2"])
@pytest.mark.parametrize("language", SUMS)
def test_a_missing_barrier_is_a_race_every_time(language: str, barrier: str) -> None:
    source, call = SUMS[language]
    broken = source.replace(f"{call}  {barrier}", "")
    assert broken != source
    for _ in range(3):
        with pytest.raises(KernelError, match="sum_kernel races: element 0 of buffer 1"):
            run_sum(language, broken)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("out[blockIdx.x] = part[0]", "out[blockIdx.x + 1] = part[0]", "behind"),
        ("out[blockIdx.x] = part[0]", "out[(int)blockIdx.x - 1] = part[0]", "before"),
        ("x[blockIdx.x * 64 + threadIdx.x]", "x[blockIdx.x * 4096 + threadIdx.x]", "outside its buffers, .* behind"),
        ("part[threadIdx.x + width]", "part[threadIdx.x + width + 16]", "array index out of bounds"),
    ],
)
def test_an_index_out_of_bounds_is_located(old: str, new: str, message: str) -> None:
    assert old in CUDA_SUM
    with pytest.raises(KernelError, match=message):
        run_sum("cuda", CUDA_SUM.replace(old, new))


def test_an_uninitialised_local_array_shows() -> None:
    source = """
extern "C" __global__ void local_kernel(float* __restrict__ out) {
  float sum[1];
  sum[0] += 1.0f;
  out[threadIdx.x] = sum[0];
}
"""
    out = np.zeros(32, np.float32)
    launch("cuda", source, [out])
    assert np.isnan(out).all()


def test_threads_that_part_at_a_barrier_are_named() -> None:
    source = CUDA_SUM.replace("__syncthreads();  // 1", "if (threadIdx.x < 40) __syncthreads();")
    with pytest.raises(
        KernelError, match=r"thread \(0, 0, 0\) .* waits in a barrier at line 5: if .*; thread \(40, 0, 0\)"
    ):
        run_sum("cuda", source)


def test_a_thread_that_leaves_before_the_barrier_is_named() -> None:
    source = CUDA_SUM.replace("__syncthreads();  // 1", "if (threadIdx.x == 63) return;\n__syncthreads();")
    with pytest.raises(KernelError, match=r"thread \(63, 0, 0\) has finished"):
        run_sum("cuda", source)


def test_a_shuffle_that_a_named_lane_does_not_reach() -> None:
    source = """
extern "C" __global__ void shuffle_kernel(float* __restrict__ x) {
  float v = x[threadIdx.x];
  if (threadIdx.x < 16) v += __shfl_down_sync(0xffffffff, v, 8);
  else v += __shfl_down_sync(0xffffffff, v, 4);
  x[threadIdx.x] = v;
}
"""
    with pytest.raises(KernelError, match="waits in a warp operation at line 4"):
        launch("cuda", source, [np.ones(32, np.float32)])


def test_a_kernel_that_never_ends_is_stopped() -> None:
    source = """
extern "C" __global__ void spin_kernel(int* __restrict__ x) {
  while (((volatile int*)x)[0] == 0) { }
}
"""
    with pytest.raises(KernelError, match=r"still running after 0\.3 s"):
        launch("cuda", source, [np.zeros(1, np.int32)], seconds=0.3)


def test_a_misaligned_vector_access_and_a_division_by_zero_are_faults() -> None:
    vector = """
extern "C" __global__ void vector_kernel(float* __restrict__ x) {
  float4 v = *(float4*)(x + 1);
  x[0] = v.x + v.y + v.z + v.w;
}
"""
    with pytest.raises(KernelError, match="misaligned vector access"):
        launch("cuda", vector, [np.ones(32, np.float32)], block=1)
    division = """
extern "C" __global__ void division_kernel(int* __restrict__ x) {
  x[0] = 7 / x[1];
}
"""
    with pytest.raises(KernelError, match="division by zero"):
        launch("cuda", division, [np.zeros(2, np.int32)], block=1)


def test_arguments_that_do_not_fit_the_signature_are_refused() -> None:
    with pytest.raises(KernelError, match="takes 2 buffers and 1 scalars, and was given 1 and 1"):
        launch("cuda", CUDA_SUM, [np.zeros(64, np.float32), 1], block=64)


def test_ptx_outside_the_functions_that_are_emulated_is_refused() -> None:
    stray = CUDA_SUM.replace("__syncthreads();  // 1", 'asm volatile("bar.sync 0;");')
    with pytest.raises(CompileError, match="line 5 of the CUDA source holds inline PTX"):
        launch("cuda", stray, [np.zeros(64, np.float32), np.zeros(1, np.float32), 1], block=64)
    unknown = '__device__ void mine(int* p) {\n  asm("mov.u32 %0, 1;" : "=r"(*p));\n}\n' + CUDA_SUM
    with pytest.raises(CompileError, match="device function mine holds inline PTX"):
        launch("cuda", unknown, [np.zeros(64, np.float32), np.zeros(1, np.float32), 1], block=64)


def test_overloads_of_the_source_stand_beside_those_of_the_device() -> None:
    """TVM's prelude adds min and max of half; those of integers must stay visible."""
    source = """
#include <cuda_fp16.h>
__device__ half min(half a, half b) { return __hlt(__half(a), __half(b)) ? a : b; }
extern "C" __global__ void min_kernel(half* __restrict__ x, int64_t n) {
  x[min((int64_t)threadIdx.x, n - (int64_t)1)] = min(x[threadIdx.x], __float2half_rn(0.5f));
}
"""
    x = np.linspace(0, 1, 32).astype(np.float16)
    expected = np.minimum(x, np.float16(0.5))
    launch("cuda", source, [x, 32])
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("barrier", ["__syncthreads();", ""])
def test_the_last_thread_does_not_hide_a_race_by_writing_what_all_wrote(barrier: str) -> None:
    """Every thread sums what all left in shared memory and writes the same element."""
    source = f"""
extern "C" __global__ void all_kernel(float* __restrict__ x, float* __restrict__ out) {{
  __shared__ alignas(64) float part[64];
  float sum = 0;
  part[threadIdx.x] = x[threadIdx.x];
  {barrier}
  for (int i = 0; i < 64; ++i) {{
    sum += part[i];
  }}
  out[0] = sum;
}}
"""
    x, out = np.ones(64, np.float32), np.zeros(1, np.float32)
    if barrier:
        launch("cuda", source, [x, out], block=64)
        assert out[0] == 64
    else:
        with pytest.raises(KernelError, match="all_kernel races"):
            launch("cuda", source, [x, out], block=64)
