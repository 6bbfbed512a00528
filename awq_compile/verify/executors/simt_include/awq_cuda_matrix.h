// Tensor cores: nvcuda::wmma, and the device functions that hold our inline PTX. The lanes of a warp leave
// their registers for each other, and each computes the elements it owns.
//
// Register layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix". With g = lane / 4, t = lane % 4:
//   A (16, 16) row-major: a[0] (g, 2t..), a[1] (g+8, 2t..), a[2] (g, 2t+8..), a[3] (g+8, 2t+8..)
//   B (16, 8): b[0] (2t.., g), b[1] (2t+8.., g)         C (16, 8): c[0..1] (g, 2t..), c[2..3] (g+8, 2t..)
#pragma once

// ---- mma.sync ----
template <int K, class T, class C, class A, class B>
static inline void awq_mma(int line, C* c, const A* a_registers, const B* b_registers) {
  constexpr int a_words = K / 4, b_words = K / 8;
  struct Registers {
    uint32_t a[a_words], b[b_words];
  } mine;
  memcpy(mine.a, a_registers, sizeof mine.a);
  memcpy(mine.b, b_registers, sizeof mine.b);
  awq_meet(line, 0xFFFFFFFFu, &mine, sizeof mine);
  int g = (int)awq_lane() / 4, t = (int)awq_lane() % 4;
  float sum[4] = {0, 0, 0, 0};
  for (int k = 0; k < K; ++k) {
    int word = k / 8, owner = k % 8 / 2, half_of = k % 2;
    Registers rows = awq_from_lane<Registers>((unsigned)(g * 4 + owner));
    T low[2], high[2];
    memcpy(low, &rows.a[word * 2], 4);
    memcpy(high, &rows.a[word * 2 + 1], 4);
    for (int j = 0; j < 2; ++j) {
      Registers columns = awq_from_lane<Registers>((unsigned)((2 * t + j) * 4 + owner));
      T b[2];
      memcpy(b, &columns.b[word], 4);
      sum[j] += (float)low[half_of] * (float)b[half_of];
      sum[2 + j] += (float)high[half_of] * (float)b[half_of];
    }
  }
  for (int i = 0; i < 4; ++i) c[i] = (C)((float)c[i] + sum[i]);
}
#define awq_mma_m16n8k16_f16f32(c, a, b) awq_mma<16, half>(__LINE__, c, a, b)
#define awq_mma_m16n8k8_f16f32(c, a, b) awq_mma<8, half>(__LINE__, c, a, b)

// ---- decoding: (1024 + q) - (1024 + z) and (1024 + 16 q) / 16 - (64 + z) are exact in half precision ----
static inline void awq_decode_u4(uint32_t* d, uint32_t word, uint32_t zero) {
  for (unsigned i = 0; i < 4; ++i) {
    half pair[2] = {(half)((int)(word >> 4 * i & 15) - (int)zero), (half)((int)(word >> (4 * i + 16) & 15) - (int)zero)};
    memcpy(d + i, pair, 4);
  }
}
static inline void awq_pairs_f16(uint32_t* d, const void* x) {
  half values[8];
  memcpy(values, x, 16);
  for (unsigned i = 0; i < 4; ++i) {
    half pair[2] = {values[i], values[i + 4]};
    memcpy(d + i, pair, 4);
  }
}
static inline float awq_exp2(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
static inline void awq_two_halves_f16(uint32_t* d, const float* from) {
  half halves[16];
  for (unsigned i = 0; i < 8; ++i) halves[i] = (half)from[i], halves[8 + i] = (half)(from[i] - (float)halves[i]);
  memcpy(d, halves, 32);
}
static inline void awq_load_16(uint32_t* d, const void* from) {
  if ((uintptr_t)from % 16) __builtin_trap();
  memcpy(d, from, 16);
}
static inline void awq_load_2(void* d, const void* from) { memcpy(d, from, 2); }
static inline void awq_words_f16(uint32_t* d, const void* x) { memcpy(d, x, 16); }
static inline void awq_load_early_16(uint32_t* d, const void* from) { awq_load_16(d, from); }
static inline void awq_load_early_2(void* d, const void* from) { awq_load_2(d, from); }
static inline void awq_scale_f16(uint32_t* d, const void* scale) {
  half factor, pair[2];
  memcpy(&factor, scale, 2);
  for (unsigned i = 0; i < 4; ++i) {
    memcpy(pair, d + i, 4);
    pair[0] = pair[0] * factor, pair[1] = pair[1] * factor;
    memcpy(d + i, pair, 4);
  }
}

// ---- programmatic dependent launch: here a grid ends before the next one starts ----
template <int>
static inline void awq_resident() {}
static inline void awq_grid_launch_dependents() {}
template <typename... Buffers>
static inline void awq_grid_wait(Buffers...) {}

// ---- wgmma: a warp's 16 rows need nothing of the others ----
static inline void awq_arrange_f16(void* row, const void* x, int word, int number) {
  if (((uintptr_t)row | (uintptr_t)x) % 16) __builtin_trap();
  const half* from = (const half*)x;
  half* to = (half*)row;
  for (int i = 0; i < 4; ++i)
    for (int t = 0; t < 4; ++t)
      for (int j = 0; j < 2; ++j) to[((word * 4 + i) ^ number) * 8 + t * 2 + j] = from[t * 32 + i + j * 4];
}
// A load arrives when a thread waits for it; until then its place holds NaN. A wait for a load that no thread has started
// yet lets the others run. What orders the two kinds of access to memory, and grids, cannot be seen here.
struct awq_bulk {
  void* to;
  const void* from;
};
static awq_bulk awq_bulk_loads[AWQ_SHARED_LIMIT / 8];
struct awq_stage_barrier {  // 8 bytes, as in PTX
  uint16_t phase, number, pending, live;
};
static_assert(sizeof(awq_stage_barrier) == 8);
static const uint16_t AWQ_LIVE = 0x5A5A;
static inline awq_stage_barrier* awq_barrier_at(const void* at) {
  if ((uintptr_t)at % 8 || (const char*)at < awq_shared_start || (const char*)at + 8 > awq_shared_end) __builtin_trap();
  return (awq_stage_barrier*)at;
}
template <int Count>
static inline void awq_stages_init(void* barriers) {
  for (int i = 0; i < Count; ++i) {
    awq_stage_barrier* b = awq_barrier_at((char*)barriers + 8 * i);
    *b = {0, (uint16_t)(((char*)b - awq_shared_start) / 8), 0, AWQ_LIVE};
  }
}
static inline void awq_fence_loads() {}
template <int Bytes>
static inline void awq_stage_load(void* barrier, void* stage, const void* from) {
  awq_stage_barrier* b = awq_barrier_at(barrier);
  if (b->live != AWQ_LIVE || b->pending || ((uintptr_t)stage | (uintptr_t)from | Bytes) % 16) __builtin_trap();
  memset(stage, 0xFF, Bytes);
  awq_bulk_loads[b->number] = {stage, from};
  b->pending = Bytes / 16;
}
static inline void awq_stage_wait(const void* barrier, int parity) {
  awq_stage_barrier* b = awq_barrier_at(barrier);
  if (b->live != AWQ_LIVE) __builtin_trap();
  while (b->phase == parity) {
    if (!b->pending) {
      awq_pause(AWQ_READY, 0);
      continue;
    }
    memcpy(awq_bulk_loads[b->number].to, awq_bulk_loads[b->number].from, b->pending * 16);
    b->pending = 0, b->phase ^= 1;
  }
}
// The whole block meets: slices pass as many barriers.
template <int Threads>
static inline void awq_barrier_of(int, int line = __builtin_LINE()) {
  awq_barrier(line);
}
template <int Count, int Threads>
static inline void awq_leave_sums(void* to, const float* d, int thread) {
  for (int i = 0; i < Count; ++i) ((float*)to)[i * Threads + thread] = d[i];
}
template <int Count, int Threads>
static inline void awq_add_sums(float* d, const void* from, int thread) {
  for (int i = 0; i < Count; ++i) d[i] += ((const float*)from)[i * Threads + thread];
}
// Products are made at the wait, with what the operands hold then.
struct awq_product {
  void (*multiply)(int line, float* d, const uint32_t* a, const void* stage, int step);
  int line;
  float* d;
  const uint32_t* a;
  const void* stage;
  int step;
  unsigned group;
};
struct awq_products {
  unsigned count, group;
  awq_product waiting[32];
};
static awq_products awq_all_products[AWQ_MAX_THREADS];
static inline void awq_wgmma_commit() { ++awq_all_products[awq_current->linear].group; }
static inline void awq_wgmma_wait(unsigned pending) {
  awq_products* p = &awq_all_products[awq_current->linear];
  unsigned kept = 0;
  for (unsigned i = 0; i < p->count; ++i) {
    awq_product product = p->waiting[i];
    if (product.group + pending >= p->group) {
      p->waiting[kept++] = product;
    } else {
      product.multiply(product.line, product.d, product.a, product.stage, product.step);
    }
  }
  p->count = kept;
}
static inline void awq_wgmma_wait_1() { awq_wgmma_wait(1); }
template <int Count>
static inline void awq_wgmma_ready(uint32_t*) {}
template <int Count>
static inline void awq_wgmma_end(float*) {
  awq_wgmma_wait(0);
  if (awq_all_products[awq_current->linear].count) __builtin_trap();  // of a group that was not committed
  awq_all_products[awq_current->linear].group = 0;
}
template <int N>
static void awq_multiply(int line, float* d, const uint32_t* a_registers, const void* stage, int step) {
  struct Registers {
    uint32_t a[4];
  } mine;
  memcpy(mine.a, a_registers, sizeof mine.a);
  awq_meet(line, 0xFFFFFFFFu, &mine, sizeof mine);
  int g = (int)awq_lane() / 4, t = (int)awq_lane() % 4;
  for (int k = 0; k < 16; ++k) {
    Registers rows = awq_from_lane<Registers>((unsigned)(g * 4 + k % 8 / 2));
    half low[2], high[2];
    memcpy(low, &rows.a[k / 8 * 2], 4);
    memcpy(high, &rows.a[k / 8 * 2 + 1], 4);
    for (int column = 0; column < N / 4; ++column) {
      int n = column / 2 * 8 + t * 2 + column % 2, piece = (step * 2 + k / 8) ^ (n % 8);
      float x = (float)((const half*)stage)[n * 64 + piece * 8 + k % 8];
      d[column / 2 * 4 + column % 2] += (float)low[k % 2] * x;
      d[column / 2 * 4 + 2 + column % 2] += (float)high[k % 2] * x;
    }
  }
}
template <int N>
static inline void awq_wgmma(int line, float* d, const uint32_t* a, const void* stage, int step) {
  awq_products* p = &awq_all_products[awq_current->linear];
  if (p->count == 32 || ((const char*)stage - awq_shared_start) % 1024) __builtin_trap();
  p->waiting[p->count++] = {awq_multiply<N>, line, d, a, stage, step, p->group};
}
#define awq_wgmma_m64n16k16_f16f32(d, a, stage, step) awq_wgmma<16>(__LINE__, d, a, stage, step)
#define awq_wgmma_m64n32k16_f16f32(d, a, stage, step) awq_wgmma<32>(__LINE__, d, a, stage, step)
#define awq_wgmma_m64n64k16_f16f32(d, a, stage, step) awq_wgmma<64>(__LINE__, d, a, stage, step)
#define awq_wgmma_m64n128k16_f16f32(d, a, stage, step) awq_wgmma<128>(__LINE__, d, a, stage, step)
#define awq_wgmma_m64n256k16_f16f32(d, a, stage, step) awq_wgmma<256>(__LINE__, d, a, stage, step)

// ---- ldmatrix: matrix i of 8 x 8 halves has its rows at the addresses of lanes 8i to 8i+7 ----
template <int Count, bool Transposed, class D>
static inline void awq_ldmatrix(int line, D* registers, const void* row) {
  if ((uintptr_t)row % 16) __builtin_trap();
  awq_meet(line, 0xFFFFFFFFu, &row, sizeof row);
  unsigned lane = awq_lane();
  for (unsigned i = 0; i < Count; ++i) {
    half pair[2];
    for (unsigned j = 0; j < 2; ++j) {
      unsigned r = Transposed ? lane % 4 * 2 + j : lane / 4, c = Transposed ? lane / 4 : lane % 4 * 2 + j;
      pair[j] = awq_from_lane<const half*>(8 * i + r)[c];
    }
    memcpy((char*)registers + 4 * i, pair, 4);
  }
  awq_meet(-line, 0xFFFFFFFFu, nullptr, 0);  // a lane may overwrite its row only after all have read it
}
#define awq_ldmatrix_x1(d, p) awq_ldmatrix<1, false>(__LINE__, d, p)
#define awq_ldmatrix_x2(d, p) awq_ldmatrix<2, false>(__LINE__, d, p)
#define awq_ldmatrix_x4(d, p) awq_ldmatrix<4, false>(__LINE__, d, p)
#define awq_ldmatrix_x1_trans(d, p) awq_ldmatrix<1, true>(__LINE__, d, p)
#define awq_ldmatrix_x2_trans(d, p) awq_ldmatrix<2, true>(__LINE__, d, p)
#define awq_ldmatrix_x4_trans(d, p) awq_ldmatrix<4, true>(__LINE__, d, p)

// ---- cp.async: nothing arrives before the wait ----
#define AWQ_CP_ASYNC(bytes)                                                                     \
  static inline void awq_cp_async_##bytes(void* to, const void* from) {                         \
    if (((uintptr_t)to | (uintptr_t)from) % bytes) __builtin_trap();                            \
    awq_async_copy_later(to, from, bytes);                                                      \
  }                                                                                             \
  static inline void awq_cp_async_##bytes##_if(void* to, const void* from, bool copy) {         \
    awq_async_copy_later(to, copy ? from : nullptr, bytes);                                     \
  }
AWQ_CP_ASYNC(4)
AWQ_CP_ASYNC(8)
AWQ_CP_ASYNC(16)
static inline void awq_cp_async_commit() { ++awq_current->async_group; }
static inline void awq_cp_async_wait_all() { awq_cp_async_commit(), awq_async_wait(0); }
static inline void awq_cp_async_wait_0() { awq_async_wait(0); }
static inline void awq_cp_async_wait_1() { awq_async_wait(1); }
static inline void awq_cp_async_wait_2() { awq_async_wait(2); }
static inline void awq_cp_async_wait_3() { awq_async_wait(3); }

// ---- wmma: the layout within a fragment is unspecified; here lane l owns elements l * n .. l * n + n - 1 ----
namespace nvcuda {
namespace wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
template <class Use, int M, int N, int K>
struct awq_shape {
  static constexpr int rows = M, columns = N;
};
template <int M, int N, int K>
struct awq_shape<matrix_a, M, N, K> {
  static constexpr int rows = M, columns = K;
};
template <int M, int N, int K>
struct awq_shape<matrix_b, M, N, K> {
  static constexpr int rows = K, columns = N;
};
template <class Layout>
struct awq_is_column_major {
  static constexpr bool value = false;
};
template <>
struct awq_is_column_major<col_major> {
  static constexpr bool value = true;
};

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  using shape = awq_shape<Use, M, N, K>;
  static constexpr int num_elements = shape::rows * shape::columns / AWQ_WARP;
  static constexpr bool column_major = awq_is_column_major<Layout>::value;
  T x[num_elements];
};

template <class F, class T>
static inline void awq_load(int line, F& f, const T* p, unsigned stride, bool column_major) {
  awq_meet(line, 0xFFFFFFFFu, nullptr, 0);
  for (int i = 0; i < F::num_elements; ++i) {
    unsigned at = awq_lane() * F::num_elements + (unsigned)i, r = at / F::shape::columns, c = at % F::shape::columns;
    f.x[i] = p[column_major ? c * stride + r : r * stride + c];
  }
  awq_meet(-line, 0xFFFFFFFFu, nullptr, 0);
}
template <class F, class T>
static inline void load_matrix_at(int line, F& f, const T* p, unsigned stride) {
  awq_load(line, f, p, stride, F::column_major);
}
template <class F, class T>
static inline void load_matrix_at(int line, F& f, const T* p, unsigned stride, layout_t layout) {
  awq_load(line, f, p, stride, layout == mem_col_major);
}
template <class T, class F>
static inline void store_matrix_at(int line, T* p, const F& f, unsigned stride, layout_t layout) {
  awq_meet(line, 0xFFFFFFFFu, nullptr, 0);
  for (int i = 0; i < F::num_elements; ++i) {
    unsigned at = awq_lane() * F::num_elements + (unsigned)i, r = at / F::shape::columns, c = at % F::shape::columns;
    p[layout == mem_col_major ? c * stride + r : r * stride + c] = f.x[i];
  }
  awq_meet(-line, 0xFFFFFFFFu, nullptr, 0);
}
template <class F, class T>
static inline void fill_fragment(F& f, T value) {
  for (int i = 0; i < F::num_elements; ++i) f.x[i] = value;
}
template <int M, int N, int K, class T, class S, class LA, class LB>
static inline void mma_at(int line, fragment<accumulator, M, N, K, T>& d, const fragment<matrix_a, M, N, K, S, LA>& a,
                          const fragment<matrix_b, M, N, K, S, LB>& b, const fragment<accumulator, M, N, K, T>& c) {
  using FA = fragment<matrix_a, M, N, K, S, LA>;
  using FB = fragment<matrix_b, M, N, K, S, LB>;
  struct Both {
    S a[FA::num_elements], b[FB::num_elements];
  } mine;
  memcpy(mine.a, a.x, sizeof mine.a);
  memcpy(mine.b, b.x, sizeof mine.b);
  awq_meet(line, 0xFFFFFFFFu, &mine, sizeof mine);
  auto slot = [](int lane) {
    awq_fiber& peer = awq_fibers[awq_current->linear / AWQ_WARP * AWQ_WARP + (unsigned)lane];
    return (const Both*)peer.slot[peer.released];
  };
  for (int i = 0; i < d.num_elements; ++i) {
    int at = (int)awq_lane() * d.num_elements + i, row = at / N, column = at % N;
    float sum = (float)c.x[i];
    for (int k = 0; k < K; ++k) {
      int in_a = row * K + k, in_b = k * N + column;
      sum += (float)slot(in_a / FA::num_elements)->a[in_a % FA::num_elements] *
             (float)slot(in_b / FB::num_elements)->b[in_b % FB::num_elements];
    }
    d.x[i] = (T)sum;
  }
}
}  // namespace wmma
}  // namespace nvcuda
#define load_matrix_sync(...) load_matrix_at(__LINE__, __VA_ARGS__)
#define store_matrix_sync(...) store_matrix_at(__LINE__, __VA_ARGS__)
#define mma_sync(...) mma_at(__LINE__, __VA_ARGS__)
