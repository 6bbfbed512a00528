"""The device functions with inline PTX that the CUDA kernels call, prepended to their source.

They stand apart from the kernels so that `verify` can run the same kernels on a CPU with functions of its
own under these names (`awq_cuda_matrix.h`). PTX ISA, "Warp-level matrix instructions".
"""

from typing import Final


def _mma(k: int) -> str:
    """`awq_mma_m16n8kK_f16f32(c, a, b)`: c += a b."""
    a_words, b_words = k // 4, k // 8

    def places(first: int, count: int) -> str:
        return ", ".join(f"%{i}" for i in range(first, first + count))

    operands = f"{{{places(0, 4)}}}, {{{places(4, a_words)}}}, {{{places(4 + a_words, b_words)}}}, {{{places(0, 4)}}}"
    inputs = ", ".join([f'"r"(a[{i}])' for i in range(a_words)] + [f'"r"(b[{i}])' for i in range(b_words)])
    outputs = ", ".join(f'"+f"(c[{i}])' for i in range(4))
    return f"""
__device__ __forceinline__ void awq_mma_m16n8k{k}_f16f32(float* c, const unsigned* a, const unsigned* b) {{
  asm volatile("mma.sync.aligned.m16n8k{k}.row.col.f32.f16.f16.f32 {operands};"
               : {outputs} : {inputs});
}}"""


def _ldmatrix(count: int) -> str:
    """`awq_ldmatrix_xN(registers, row)`: N matrices of 8 x 8 halves from shared memory."""
    places = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"=r"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void awq_ldmatrix_x{count}(unsigned* d, const void* row) {{
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{places}}}, [%{count}];"
               : {outputs} : "r"(at) : "memory");
}}"""


_DECODE: Final = """
__device__ __forceinline__ void awq_decode_u4(unsigned* d, unsigned word, unsigned zero) {
  unsigned low = 0x64006400u | zero * 0x10001u, high, sixteenth = 0x2c002c00u;  // 1024 + z; 1/16
  asm("sub.f16x2 %0, %1, %2;" : "=r"(high) : "r"(0x63806380u), "r"(low));  // 960 - (1024 + z) = -(64 + z)
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    unsigned even = (word & 0x000f000fu) | 0x64006400u, odd = (word & 0x00f000f0u) | 0x64006400u;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d[i]) : "r"(even), "r"(low));
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d[i + 1]) : "r"(odd), "r"(sixteenth), "r"(high));
    word >>= 8;
  }
}
__device__ __forceinline__ void awq_pairs_f16(unsigned* d, const void* x) {
  const unsigned* u = static_cast<const unsigned*>(x);
  d[0] = __byte_perm(u[0], u[2], 0x5410);
  d[1] = __byte_perm(u[0], u[2], 0x7632);
  d[2] = __byte_perm(u[1], u[3], 0x5410);
  d[3] = __byte_perm(u[1], u[3], 0x7632);
}"""


def device_functions(newest_k: int) -> str:
    """All of them; `newest_k` is 16 from sm_80 on, 8 before."""
    sizes = (8, 16) if newest_k == 16 else (8,)
    return "\n".join([*(_mma(k) for k in sizes), *(_ldmatrix(count) for count in (1, 2, 4)), _DECODE]) + "\n"


MARK: Final = "awq_"  # of sources that call one of them
