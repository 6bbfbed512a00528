// Metal Shading Language as TVM emits it, for a CPU compiler. Included before the source.
#pragma once
#include "awq_simt.h"

#define kernel extern "C"
#define device
#define thread
#define constant const
#define threadgroup  // simt.py marks the declarations of threadgroup arrays
#define AWQ_THREADGROUP static __attribute__((section(AWQ_SECTION)))
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

using half = _Float16;
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
static constexpr half operator""h(long double x) { return (half)x; }

namespace metal {

// ---- vectors: arithmetic by element, vectors of 3 as large as those of 4 ----
template <class T, int N>
struct vec;
template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
};

template <class T, int N>
struct vector : vec<T, N> {
  vector() = default;
  vector(T all) {
    for (int i = 0; i < N; ++i) (*this)[i] = all;
  }
  vector(T a, T b) requires(N == 2) : vec<T, N>{a, b} {}
  vector(T a, T b, T c) requires(N == 3) : vec<T, N>{a, b, c} {}
  vector(T a, T b, T c, T d) requires(N == 4) : vec<T, N>{a, b, c, d} {}
  template <class U>
  explicit vector(const vector<U, N>& other) {
    for (int i = 0; i < N; ++i) (*this)[i] = (T)other[i];
  }
  T& operator[](int i) { return ((T*)this)[i]; }
  const T& operator[](int i) const { return ((const T*)this)[i]; }
  vector operator-() const {
    vector r;
    for (int i = 0; i < N; ++i) r[i] = (T)-(*this)[i];
    return r;
  }
};
#define AWQ_BY_ELEMENT(op)                                                            \
  template <class T, int N>                                                           \
  static inline vector<T, N> operator op(vector<T, N> a, vector<T, N> b) {            \
    vector<T, N> r;                                                                   \
    for (int i = 0; i < N; ++i) r[i] = (T)(a[i] op b[i]);                             \
    return r;                                                                         \
  }                                                                                   \
  template <class T, int N>                                                           \
  static inline vector<T, N> operator op(vector<T, N> a, T b) {                       \
    return a op vector<T, N>(b);                                                      \
  }                                                                                   \
  template <class T, int N>                                                           \
  static inline vector<T, N> operator op(T a, vector<T, N> b) {                       \
    return vector<T, N>(a) op b;                                                      \
  }                                                                                   \
  template <class T, int N>                                                           \
  static inline vector<T, N>& operator op##=(vector<T, N>& a, vector<T, N> b) {       \
    return a = a op b;                                                                \
  }
AWQ_BY_ELEMENT(+)
AWQ_BY_ELEMENT(-)
AWQ_BY_ELEMENT(*)
AWQ_BY_ELEMENT(/)
AWQ_BY_ELEMENT(%)
AWQ_BY_ELEMENT(&)
AWQ_BY_ELEMENT(|)
AWQ_BY_ELEMENT(^)
AWQ_BY_ELEMENT(<<)
AWQ_BY_ELEMENT(>>)
#define AWQ_COMPARE(op)                                                        \
  template <class T, int N>                                                    \
  static inline vector<bool, N> operator op(vector<T, N> a, vector<T, N> b) {  \
    vector<bool, N> r;                                                         \
    for (int i = 0; i < N; ++i) r[i] = a[i] op b[i];                           \
    return r;                                                                  \
  }
AWQ_COMPARE(==)
AWQ_COMPARE(!=)
AWQ_COMPARE(<)
AWQ_COMPARE(<=)
AWQ_COMPARE(>)
AWQ_COMPARE(>=)
AWQ_COMPARE(&&)
AWQ_COMPARE(||)

#define AWQ_VECTORS(T) \
  using T##2 = vector<T, 2>; \
  using T##3 = vector<T, 3>; \
  using T##4 = vector<T, 4>;
AWQ_VECTORS(bool)
AWQ_VECTORS(char)
AWQ_VECTORS(uchar)
AWQ_VECTORS(short)
AWQ_VECTORS(ushort)
AWQ_VECTORS(int)
AWQ_VECTORS(uint)
AWQ_VECTORS(long)
AWQ_VECTORS(ulong)
AWQ_VECTORS(half)
AWQ_VECTORS(float)
template <class T>
struct packed3 {
  T x, y, z;
  packed3() = default;
  packed3(T a, T b, T c) : x(a), y(b), z(c) {}
  packed3(vector<T, 3> v) : x(v.x), y(v.y), z(v.z) {}
  operator vector<T, 3>() const { return {x, y, z}; }
  T& operator[](int i) { return ((T*)this)[i]; }
  const T& operator[](int i) const { return ((const T*)this)[i]; }
};
using packed_half3 = packed3<half>;
using packed_float3 = packed3<float>;

template <class T, class U>
static inline T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type keeps the size");
  T result;
  memcpy((void*)&result, &value, sizeof(T));
  return result;
}

// ---- functions: of scalars and, by element, of vectors ----
template <class T>
struct awq_is_float {
  static constexpr bool value = false;
};
template <>
struct awq_is_float<half> {
  static constexpr bool value = true;
};
template <>
struct awq_is_float<float> {
  static constexpr bool value = true;
};
#define AWQ_MATH1(name, builtin)                                            \
  static inline float name(float x) { return builtin(x); }                  \
  static inline half name(half x) { return (half)builtin((float)x); }       \
  template <class T, int N>                                                 \
  static inline vector<T, N> name(vector<T, N> v) {                         \
    for (int i = 0; i < N; ++i) v[i] = name(v[i]);                          \
    return v;                                                               \
  }
#define AWQ_MATH2(name, builtin)                                                           \
  static inline float name(float x, float y) { return builtin(x, y); }                     \
  static inline half name(half x, half y) { return (half)builtin((float)x, (float)y); }    \
  template <class T, int N>                                                                \
  static inline vector<T, N> name(vector<T, N> v, vector<T, N> w) {                        \
    for (int i = 0; i < N; ++i) v[i] = name(v[i], w[i]);                                   \
    return v;                                                                              \
  }
static inline float awq_rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
AWQ_MATH1(exp, __builtin_expf)
AWQ_MATH1(exp2, __builtin_exp2f)
AWQ_MATH1(exp10, __builtin_exp10f)
AWQ_MATH1(log, __builtin_logf)
AWQ_MATH1(log2, __builtin_log2f)
AWQ_MATH1(log10, __builtin_log10f)
AWQ_MATH1(sqrt, __builtin_sqrtf)
AWQ_MATH1(rsqrt, awq_rsqrt)
AWQ_MATH1(sin, __builtin_sinf)
AWQ_MATH1(cos, __builtin_cosf)
AWQ_MATH1(tan, __builtin_tanf)
AWQ_MATH1(asin, __builtin_asinf)
AWQ_MATH1(acos, __builtin_acosf)
AWQ_MATH1(atan, __builtin_atanf)
AWQ_MATH1(sinh, __builtin_sinhf)
AWQ_MATH1(cosh, __builtin_coshf)
AWQ_MATH1(tanh, __builtin_tanhf)
AWQ_MATH1(floor, __builtin_floorf)
AWQ_MATH1(ceil, __builtin_ceilf)
AWQ_MATH1(trunc, __builtin_truncf)
AWQ_MATH1(round, __builtin_roundf)
AWQ_MATH1(rint, __builtin_rintf)
AWQ_MATH1(fabs, __builtin_fabsf)
AWQ_MATH2(pow, __builtin_powf)
AWQ_MATH2(fmod, __builtin_fmodf)
AWQ_MATH2(atan2, __builtin_atan2f)
AWQ_MATH2(fmax, __builtin_fmaxf)
AWQ_MATH2(fmin, __builtin_fminf)
template <class T>
static inline T max(T a, T b) {
  if constexpr (awq_is_float<T>::value) return fmax(a, b);
  else return a > b ? a : b;
}
template <class T>
static inline T min(T a, T b) {
  if constexpr (awq_is_float<T>::value) return fmin(a, b);
  else return a < b ? a : b;
}
template <class T, int N>
static inline vector<T, N> max(vector<T, N> a, vector<T, N> b) {
  for (int i = 0; i < N; ++i) a[i] = max(a[i], b[i]);
  return a;
}
template <class T, int N>
static inline vector<T, N> min(vector<T, N> a, vector<T, N> b) {
  for (int i = 0; i < N; ++i) a[i] = min(a[i], b[i]);
  return a;
}
template <class T>
static inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
static inline T abs(T x) {
  return x < 0 ? (T)-x : x;
}
static inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline half fma(half a, half b, half c) { return (half)__builtin_fma((double)a, (double)b, (double)c); }
template <class T, int N>
static inline vector<T, N> fma(vector<T, N> a, vector<T, N> b, vector<T, N> c) {
  for (int i = 0; i < N; ++i) a[i] = fma(a[i], b[i], c[i]);
  return a;
}
static inline bool isnan(float x) { return x != x; }
static inline bool isinf(float x) { return __builtin_isinf(x); }
static inline bool isfinite(float x) { return __builtin_isfinite(x); }
static inline int popcount(uint x) { return __builtin_popcount(x); }
template <class T>
static inline T select(T otherwise, T then, bool condition) {
  return condition ? then : otherwise;
}
template <class T, int N>
static inline vector<T, N> select(vector<T, N> otherwise, vector<T, N> then, vector<bool, N> condition) {
  for (int i = 0; i < N; ++i) otherwise[i] = condition[i] ? then[i] : otherwise[i];
  return otherwise;
}
namespace precise {
using metal::exp;
using metal::log;
using metal::sqrt;
}  // namespace precise
namespace fast {
using metal::exp;
using metal::log;
using metal::sqrt;
}  // namespace fast

// ---- barriers and simdgroups ----
enum class mem_flags { mem_none, mem_device, mem_threadgroup, mem_texture };
#define threadgroup_barrier(...) awq_barrier(__LINE__)
#define simdgroup_barrier(...) (void)awq_meet(__LINE__, 0, nullptr, 0)
// Lane numbers wrap, as on Apple's GPUs; TVM's reductions name the thread of the block.
#define simd_shuffle(value, lane) awq_shuffle(__LINE__, 0, value, (unsigned)(lane) % AWQ_WARP)
#define simd_shuffle_down(value, delta) awq_shuffle(__LINE__, 0, value, awq_lane() + (unsigned)(delta))
#define simd_shuffle_up(value, delta) awq_shuffle(__LINE__, 0, value, awq_lane() - (unsigned)(delta))
#define simd_shuffle_xor(value, bits) awq_shuffle(__LINE__, 0, value, awq_lane() ^ (unsigned)(bits))
#define simd_broadcast(value, lane) awq_shuffle(__LINE__, 0, value, (unsigned)(lane) % AWQ_WARP)
#define simd_sum(value) awq_simd_reduce(__LINE__, value, [](auto a, auto b) { return a + b; })
#define simd_product(value) awq_simd_reduce(__LINE__, value, [](auto a, auto b) { return a * b; })
#define simd_max(value) awq_simd_reduce(__LINE__, value, [](auto a, auto b) { return a > b ? a : b; })
#define simd_min(value) awq_simd_reduce(__LINE__, value, [](auto a, auto b) { return a < b ? a : b; })
template <class T, class F>
static inline T awq_simd_reduce(int line, T value, F combine) {
  uint32_t met = awq_meet(line, 0, &value, sizeof value);
  unsigned lane = (unsigned)__builtin_ctz(met);
  T result = awq_from_lane<T>(lane);
  while (++lane < AWQ_WARP)
    if (met >> lane & 1) result = (T)combine(result, awq_from_lane<T>(lane));
  return result;
}

// ---- simdgroup matrices: lane l owns the elements 2l and 2l + 1 of 8 x 8 ----
template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "Metal has 8 x 8 only");
  T elements[2];
};
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
template <class T, int Rows, int Columns, class U>
static inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(U value) {
  return {{(T)value, (T)value}};
}
#define simdgroup_load(...) awq_simdgroup_load(__LINE__, __VA_ARGS__)
#define simdgroup_store(...) awq_simdgroup_store(__LINE__, __VA_ARGS__)
#define simdgroup_multiply_accumulate(d, a, b, c) awq_simdgroup_mma(__LINE__, d, a, b, c)
template <class M, class T>
static inline void awq_simdgroup_load(int line, M& m, const T* p, ulong stride = 8, ulong origin = 0, bool transposed = false) {
  (void)origin;
  awq_meet(line, 0xFFFFFFFFu, nullptr, 0);
  for (unsigned i = 0; i < 2; ++i) {
    unsigned at = awq_lane() * 2 + i, r = at / 8, c = at % 8;
    m.elements[i] = p[transposed ? c * stride + r : r * stride + c];
  }
  awq_meet(-line, 0xFFFFFFFFu, nullptr, 0);
}
template <class M, class T>
static inline void awq_simdgroup_store(int line, const M& m, T* p, ulong stride = 8, ulong origin = 0, bool transposed = false) {
  (void)origin;
  awq_meet(line, 0xFFFFFFFFu, nullptr, 0);
  for (unsigned i = 0; i < 2; ++i) {
    unsigned at = awq_lane() * 2 + i, r = at / 8, c = at % 8;
    p[transposed ? c * stride + r : r * stride + c] = m.elements[i];
  }
  awq_meet(-line, 0xFFFFFFFFu, nullptr, 0);
}
template <class D, class A, class B, class C>
static inline void awq_simdgroup_mma(int line, D& d, const A& a, const B& b, const C& c) {
  struct Both {
    A a;
    B b;
  } mine = {a, b};
  awq_meet(line, 0xFFFFFFFFu, &mine, sizeof mine);
  for (int i = 0; i < 2; ++i) {
    int at = (int)awq_lane() * 2 + i, row = at / 8, column = at % 8;
    float sum = (float)c.elements[i];
    for (int k = 0; k < 8; ++k) {
      int in_a = row * 8 + k, in_b = k * 8 + column;
      sum += (float)awq_from_lane<Both>((unsigned)in_a / 2).a.elements[in_a % 2] *
             (float)awq_from_lane<Both>((unsigned)in_b / 2).b.elements[in_b % 2];
    }
    d.elements[i] = (decltype(d.elements[i] + d.elements[i]))sum;
  }
}
}  // namespace metal

// Buffers are pointers, scalars lie in one struct behind the last of them, and the position of the threadgroup
// in the grid comes before that of the thread in the threadgroup.
template <class T, bool Last>
struct awq_metal_position {
  static T get() {
    awq_index at = Last ? awq_current->index : awq_block;
    if constexpr (sizeof(T) == sizeof(unsigned)) {
      return at.x;
    } else {
      T result;
      unsigned all[3] = {at.x, at.y, at.z};
      for (int i = 0; i < (int)(sizeof(T) / sizeof(unsigned)) && i < 3; ++i) result[i] = all[i];
      return result;
    }
  }
};
template <class T, bool Last>
struct awq_metal_argument {
  static constexpr char code = Last ? 't' : 'g';
  static T get(void**) { return awq_metal_position<T, Last>::get(); }
};
template <class T, bool Last>
struct awq_metal_argument<T*, Last> {
  static constexpr char code = 'p';
  static T* get(void** at) { return *(T**)*at; }
};
template <class T, bool Last>
struct awq_metal_argument<T&, Last> {
  static constexpr char code = 's';
  static T& get(void** at) { return *(T*)*at; }
};
template <class>
struct awq_metal_caller;
template <class... A>
struct awq_metal_caller<void(A...)> {
  static constexpr size_t count = sizeof...(A);
  template <size_t... I>
  static void go(void (*f)(A...), void** arguments, awq_indices<I...>) {
    f(awq_metal_argument<A, I + 1 == count>::get(arguments + I)...);
  }
  static void call(void (*f)(A...), void** arguments) { go(f, arguments, typename awq_make_indices<count>::type()); }
  template <class>
  struct text;
  template <size_t... I>
  struct text<awq_indices<I...>> {
    static constexpr char value[] = {awq_metal_argument<A, I + 1 == count>::code..., 0};
  };
  static constexpr const char* signature = text<typename awq_make_indices<count>::type>::value;
};
