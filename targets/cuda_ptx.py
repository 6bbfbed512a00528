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


def _ldmatrix(count: int, *, transposed: bool = False) -> str:
    """`awq_ldmatrix_xN(registers, row)`: N matrices of 8 x 8 halves from shared memory; with `_trans` transposed."""
    places = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"=r"(d[{i}])' for i in range(count))
    name, kind = ("_trans", ".trans") if transposed else ("", "")
    return f"""
__device__ __forceinline__ void awq_ldmatrix_x{count}{name}(unsigned* d, const void* row) {{
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{kind}.shared.b16 {{{places}}}, [%{count}];"
               : {outputs} : "r"(at) : "memory");
}}"""


_DECODE: Final = """
__device__ __forceinline__ void awq_decode_u4(unsigned* d, unsigned word, unsigned zero) {
  unsigned low = 0x64006400u | zero * 0x10001u, high, sixteenth = 0x2c002c00u;  // 1024 + z; 1/16
  unsigned magic = 0x64006400u;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(high) : "r"(0x63806380u), "r"(low));  // 960 - (1024 + z) = -(64 + z)
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    unsigned even, odd;  // (word & mask) | magic in one instruction, of which only one operand can be a constant
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(even) : "r"(word), "n"(0x000f000f), "r"(magic));
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(odd) : "r"(word), "n"(0x00f000f0), "r"(magic));
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
}
__device__ __forceinline__ void awq_words_f16(unsigned* d, const void* x) {
  const unsigned* u = static_cast<const unsigned*>(x);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = u[i];
}
__device__ __forceinline__ void awq_load_16(unsigned* d, const void* from) {  // of what is read once
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "l"(from));
}
__device__ __forceinline__ void awq_load_2(void* d, const void* from) {
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(*static_cast<unsigned short*>(d)) : "l"(from));
}
__device__ __forceinline__ void awq_scale_f16(unsigned* d, const void* scale) {
  unsigned both = *static_cast<const unsigned short*>(scale) * 0x10001u;
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(d[i]) : "r"(both));
}"""

# Reads that are to stand before the wait do without `.nc`, which ptxas would put behind it. The pointers that earlier
# kernels may have written to pass through the wait: to the compiler, what only a `__restrict__` pointer reaches is no
# concern of an instruction that does not get it, and reads of x could move up.
MOST_BUFFERS: Final = 16  # that `awq_grid_wait` takes
_GRID: Final = """
template <int Blocks>
__device__ __forceinline__ void awq_resident() {}
#if __CUDA_ARCH__ >= 900
#define AWQ_LOAD_EARLY "ld.global"
#else
#define AWQ_LOAD_EARLY "ld.global.nc"
#endif
__device__ __forceinline__ void awq_load_early_16(unsigned* d, const void* from) {
  asm volatile(AWQ_LOAD_EARLY ".L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "l"(from));
}
__device__ __forceinline__ void awq_load_early_2(void* d, const void* from) {
  asm volatile(AWQ_LOAD_EARLY ".u16 %0, [%1];" : "=h"(*static_cast<unsigned short*>(d)) : "l"(from));
}
__device__ __forceinline__ void awq_grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}
__device__ __forceinline__ void awq_grid_wait(@buffers@) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : @operands@ : "memory");
#endif
}""".replace("@buffers@", ", ".join(f"const void* b{i} = nullptr" for i in range(MOST_BUFFERS))).replace(
    "@operands@", ", ".join(f'"l"(b{i})' for i in range(MOST_BUFFERS))
)

_SOFTMAX: Final = """
__device__ __forceinline__ float awq_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Eight numbers as float16, and from d[4] on what that leaves out of them.
__device__ __forceinline__ void awq_two_halves_f16(unsigned* d, const float* from) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float low, high;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d[i]) : "f"(from[i * 2 + 1]), "f"(from[i * 2]));
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high) : "r"(d[i]));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d[i + 4]) : "f"(from[i * 2 + 1] - high), "f"(from[i * 2] - low));
  }
}"""

_ASYNC: Final = """
__device__ __forceinline__ void awq_cp_async_16(void* to, const void* from) {
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" : : "r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ void awq_cp_async_commit() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}
""" + "".join(
    f"""__device__ __forceinline__ void awq_cp_async_wait_{n}() {{
  asm volatile("cp.async.wait_group {n};" : : : "memory");
}}
"""
    for n in range(4)
)


def _wgmma(columns: int) -> str:
    """`awq_wgmma_m64nNk16_f16f32(d, a, stage, step)`: d += a b, 16 of K from `step` on; sums are there after a wait.

    b is a stage of N rows of 128 bytes, swizzled, 1024 bytes aligned: PTX ISA, "Matrix descriptor format" of wgmma.
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{i}" for i in range(count, count + 4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void awq_wgmma_m64n{columns}k16_f16f32(
    float* d, const unsigned* a, const void* stage, int step) {{
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(stage));
  unsigned long long b = ((at + step * 32) & 0x3ffffu) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 5}, 0; "
               "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 "
               "{{{sums}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0;}}"
               : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}}"""


_WARPGROUP: Final = """
// A word's 8 halves of four lanes, from a row of x to a row that wgmma reads: four pieces of a pair from each lane.
__device__ __forceinline__ void awq_arrange_f16(void* row, const void* x, int word, int number) {
  const uint4* from = static_cast<const uint4*>(x);
  uint4 *to = static_cast<uint4*>(row), u[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) u[t] = from[t * 4];
  to[(word * 4) ^ number] = make_uint4(__byte_perm(u[0].x, u[0].z, 0x5410), __byte_perm(u[1].x, u[1].z, 0x5410),
                                       __byte_perm(u[2].x, u[2].z, 0x5410), __byte_perm(u[3].x, u[3].z, 0x5410));
  to[(word * 4 + 1) ^ number] = make_uint4(__byte_perm(u[0].x, u[0].z, 0x7632), __byte_perm(u[1].x, u[1].z, 0x7632),
                                           __byte_perm(u[2].x, u[2].z, 0x7632), __byte_perm(u[3].x, u[3].z, 0x7632));
  to[(word * 4 + 2) ^ number] = make_uint4(__byte_perm(u[0].y, u[0].w, 0x5410), __byte_perm(u[1].y, u[1].w, 0x5410),
                                           __byte_perm(u[2].y, u[2].w, 0x5410), __byte_perm(u[3].y, u[3].w, 0x5410));
  to[(word * 4 + 3) ^ number] = make_uint4(__byte_perm(u[0].y, u[0].w, 0x7632), __byte_perm(u[1].y, u[1].w, 0x7632),
                                           __byte_perm(u[2].y, u[2].w, 0x7632), __byte_perm(u[3].y, u[3].w, 0x7632));
}
// A stage has a barrier of 8 bytes, whose phase ends when all bytes of a load are there.
template <int Count>
__device__ __forceinline__ void awq_stages_init(void* barriers) {
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(barriers));
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(at + i * 8) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}
__device__ __forceinline__ void awq_fence_loads() {  // bulk copies see what ordinary stores have written
  asm volatile("fence.proxy.async.global;" : : : "memory");
}
template <int Bytes>
__device__ __forceinline__ void awq_stage_load(void* barrier, void* stage, const void* from) {
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
  unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(stage));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(at), "n"(Bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               : : "r"(to), "l"(from), "n"(Bytes), "r"(at) : "memory");
}
__device__ __forceinline__ void awq_stage_wait(const void* barrier, int parity) {
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(barrier)), done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(at), "r"(parity) : "memory");
  } while (!done);
}
template <int Threads>
__device__ __forceinline__ void awq_barrier_of(int slice) {  // of one slice's threads; barrier 0 is the whole block's
  asm volatile("barrier.sync %0, %1;" : : "r"(slice + 1), "n"(Threads) : "memory");
}
template <int Count>
__device__ __forceinline__ void awq_wgmma_ready(unsigned* a) {  // decoded before the fence, not behind it
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(a[i]) : : "memory");
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}
template <int Count>
__device__ __forceinline__ void awq_wgmma_end(float* d) {  // nothing reads a sum before the wait
  asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory");
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i]) : : "memory");
}
__device__ __forceinline__ void awq_wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}
__device__ __forceinline__ void awq_wgmma_wait_1() {
  asm volatile("wgmma.wait_group.sync.aligned 1;" : : : "memory");
}
template <int Count, int Threads>
__device__ __forceinline__ void awq_leave_sums(void* to, const float* d, int thread) {
#pragma unroll
  for (int i = 0; i < Count; ++i) static_cast<float*>(to)[i * Threads + thread] = d[i];
}
template <int Count, int Threads>
__device__ __forceinline__ void awq_add_sums(float* d, const void* from, int thread) {
#pragma unroll
  for (int i = 0; i < Count; ++i) d[i] += static_cast<const float*>(from)[i * Threads + thread];
}"""


def device_functions(newest_k: int, *, warpgroups: bool = False) -> str:
    """All of them; `newest_k` is 16 from sm_80 on, 8 before. `warpgroups`: also those of sm_90a."""
    sizes = (8, 16) if newest_k == 16 else (8,)
    pieces = [*(_mma(k) for k in sizes), *(_ldmatrix(count) for count in (1, 2, 4))]
    pieces += [_ldmatrix(4, transposed=True), _DECODE, _GRID]
    pieces += [_SOFTMAX, _ASYNC] if newest_k == 16 else []
    pieces += [*(_wgmma(columns) for columns in (16, 32, 64, 128, 256)), _WARPGROUP] if warpgroups else []
    return "\n".join(pieces) + "\n"


MARK: Final = "awq_"  # of sources that call one of them
WARPGROUP_MARK: Final = "awq_wgmma_"
