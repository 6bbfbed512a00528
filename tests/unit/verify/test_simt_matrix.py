"""Tensor cores and simdgroup matrices, emulated lane by lane, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from awq_compile.verify.executors.base import DeviceCode, KernelError
from awq_compile.verify.executors.simt import SimtExecutor

RNG = np.random.default_rng(8)

WMMA = """
#include <mma.h>
extern "C" __global__ void wmma_kernel(half* __restrict__ a, half* __restrict__ b, float* __restrict__ c) {
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, half, nvcuda::wmma::row_major> fa[1];
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, half, nvcuda::wmma::col_major> fb[1];
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> fc[1];
  nvcuda::wmma::fill_fragment(fc[0], 0.0f);
  for (int k = 0; k < 3; ++k) {
    nvcuda::wmma::load_matrix_sync(fa[0], (&(a[k * 16])), 48);
    nvcuda::wmma::load_matrix_sync(fb[0], (&(b[k * 16])), 48);
    nvcuda::wmma::mma_sync(fc[0], fa[0], fb[0], fc[0]);
  }
  nvcuda::wmma::store_matrix_sync((&(c[0])), fc[0], 16, nvcuda::wmma::mem_row_major);
}
"""
# One warp: A and B come through cp.async and ldmatrix, with the PTX in functions that the shim replaces.
MMA = """
#include <cuda_fp16.h>
static __device__ __forceinline__ void awq_mma_m16n8k16_f16f32(float* c, const unsigned* a, const unsigned* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ void awq_ldmatrix_x4(unsigned* d, const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(d[0]) : "r"(p));
}
static __device__ __forceinline__ void awq_ldmatrix_x2(unsigned* d, const void* p) { asm volatile("ldmatrix"); }
static __device__ __forceinline__ void awq_cp_async_16(void* to, const void* from) { asm volatile("cp.async"); }
static __device__ __forceinline__ void awq_cp_async_commit() { asm volatile("cp.async.commit_group;"); }
static __device__ __forceinline__ void awq_cp_async_wait_0() { asm volatile("cp.async.wait_group 0;"); }
extern "C" __global__ void __launch_bounds__(32) mma_kernel(half* a, half* b, float* c) {
  __shared__ alignas(16) half sa[256];
  __shared__ alignas(16) half sb[128];
  unsigned ra[4], rb[2];
  float rc[4] = {0, 0, 0, 0};
  int lane = threadIdx.x;
  awq_cp_async_16(sa + lane * 8, a + lane * 8);
  if (lane < 16) awq_cp_async_16(sb + lane * 8, b + lane * 8);
  awq_cp_async_commit();
  awq_cp_async_wait_0();
  __syncwarp();
  awq_ldmatrix_x4(ra, sa + (lane % 16) * 16 + lane / 16 * 8);
  awq_ldmatrix_x2(rb, sb + (lane % 8) * 16 + lane / 8 % 2 * 8);
  awq_mma_m16n8k16_f16f32(rc, ra, rb);
  int g = lane / 4, t = lane % 4;
  c[g * 8 + t * 2] = rc[0];
  c[g * 8 + t * 2 + 1] = rc[1];
  c[(g + 8) * 8 + t * 2] = rc[2];
  c[(g + 8) * 8 + t * 2 + 1] = rc[3];
}
"""
SIMDGROUP = """
#include <metal_stdlib>
using namespace metal;
kernel void simd_kernel(  device half* a [[ buffer(0) ]],
  device half* b [[ buffer(1) ]],
  device float* c [[ buffer(2) ]],
  uint blockIdx [[threadgroup_position_in_grid]],
  uint threadIdx [[thread_position_in_threadgroup]]
) {
  threadgroup half sa[64];
  threadgroup half sb[64];
  simdgroup_half8x8 ma[1];
  simdgroup_half8x8 mb[1];
  simdgroup_float8x8 mc[1];
  mc[0] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  sa[threadIdx * 2] = a[threadIdx * 2];
  sa[threadIdx * 2 + 1] = a[threadIdx * 2 + 1];
  *(threadgroup half2*)(sb + threadIdx * 2) = *(device half2*)(b + threadIdx * 2);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_load(ma[0], (&(sa[0])), 8, 0, (bool)0);
  simdgroup_load(mb[0], (&(sb[0])), 8, 0, (bool)1);
  simdgroup_multiply_accumulate(mc[0], ma[0], mb[0], mc[0]);
  simdgroup_store(mc[0], (&(c[0])), 8, 0, (bool)0);
}
"""


def multiply(language: str, source: str, m: int, n: int, k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(found, exact) of A (m, k) times the transpose of B (n, k)."""
    a, b = (RNG.standard_normal((rows, k)).astype(np.float16) for rows in (m, n))
    c = np.full((m, n), np.nan, np.float32)
    executor = SimtExecutor()
    executor.load(DeviceCode(language, source))
    executor.launch(executor.kernels[0], [a, b, c], (1, 1, 1), (32, 1, 1))
    return c, a.astype(np.float64) @ b.astype(np.float64).T


@pytest.mark.parametrize(
    ("language", "source", "shape"),
    [("cuda", WMMA, (16, 16, 48)), ("cuda", MMA, (16, 8, 16)), ("metal", SIMDGROUP, (8, 8, 8))],
    ids=["wmma", "mma", "simdgroup"],
)
def test_a_product_of_matrices_in_registers(language: str, source: str, shape: tuple[int, int, int]) -> None:
    found, exact = multiply(language, source, *shape)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("old", ["awq_cp_async_wait_0();\n  __syncwarp", "  __syncwarp();"])
def test_asynchronous_copies_arrive_at_the_wait_only(old: str) -> None:
    """Without the wait nothing has arrived; without the barrier other lanes have not waited yet."""
    new = "__syncwarp" if "wait" in old else ""
    try:
        found, exact = multiply("cuda", MMA.replace(old, new), 16, 8, 16)
    except KernelError as error:
        assert "races" in str(error)
    else:
        assert not np.allclose(found, exact) or "wait" not in old
