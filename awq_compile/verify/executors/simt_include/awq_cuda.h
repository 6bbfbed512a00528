// CUDA C++ as TVM emits it, for a CPU compiler. Included before the source.
#pragma once
#include "awq_simt.h"

#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ AWQ_NOINLINE
#define __restrict__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section(AWQ_SECTION)))
#define __constant__ static const

// Declared here, not by <math.h>: glibc's also names rsqrtf and its kin, which are CUDA's own.
#define AWQ_LIBM1(name) \
  extern "C" double name(double); \
  extern "C" float name##f(float);
#define AWQ_LIBM2(name) \
  extern "C" double name(double, double); \
  extern "C" float name##f(float, float);
AWQ_LIBM1(exp)
AWQ_LIBM1(exp2)
AWQ_LIBM1(exp10)
AWQ_LIBM1(log)
AWQ_LIBM1(log2)
AWQ_LIBM1(log10)
AWQ_LIBM1(log1p)
AWQ_LIBM1(expm1)
AWQ_LIBM1(sqrt)
AWQ_LIBM1(cbrt)
AWQ_LIBM1(sin)
AWQ_LIBM1(cos)
AWQ_LIBM1(tan)
AWQ_LIBM1(asin)
AWQ_LIBM1(acos)
AWQ_LIBM1(atan)
AWQ_LIBM1(sinh)
AWQ_LIBM1(cosh)
AWQ_LIBM1(tanh)
AWQ_LIBM1(asinh)
AWQ_LIBM1(acosh)
AWQ_LIBM1(atanh)
AWQ_LIBM1(erf)
AWQ_LIBM1(erfc)
AWQ_LIBM1(floor)
AWQ_LIBM1(ceil)
AWQ_LIBM1(trunc)
AWQ_LIBM1(round)
AWQ_LIBM1(rint)
AWQ_LIBM1(nearbyint)
AWQ_LIBM1(fabs)
AWQ_LIBM1(lgamma)
AWQ_LIBM1(tgamma)
AWQ_LIBM2(pow)
AWQ_LIBM2(fmod)
AWQ_LIBM2(fmax)
AWQ_LIBM2(fmin)
AWQ_LIBM2(atan2)
AWQ_LIBM2(hypot)
AWQ_LIBM2(copysign)
AWQ_LIBM2(remainder)
extern "C" double fma(double, double, double);
extern "C" float fmaf(float, float, float);
extern "C" double ldexp(double, int);
extern "C" float ldexpf(float, int);
static inline bool isnan(double x) { return x != x; }
static inline bool isinf(double x) { return __builtin_isinf(x); }
static inline bool isfinite(double x) { return __builtin_isfinite(x); }
extern "C" int abs(int);

#define threadIdx (awq_current->index)
#define blockIdx awq_block
#define blockDim awq_block_size
#define gridDim awq_grid_size
static const int warpSize = AWQ_WARP;

// ---- vector types: members only, as in CUDA ----
#define AWQ_VECTOR(T, name, a2, a4)                                                                     \
  struct name##1 { T x; };                                                                              \
  struct alignas(a2) name##2 { T x, y; };                                                               \
  struct name##3 { T x, y, z; };                                                                        \
  struct alignas(a4) name##4 { T x, y, z, w; };                                                         \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                     \
  static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                             \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
AWQ_VECTOR(signed char, char, 2, 4)
AWQ_VECTOR(unsigned char, uchar, 2, 4)
AWQ_VECTOR(short, short, 4, 8)
AWQ_VECTOR(unsigned short, ushort, 4, 8)
AWQ_VECTOR(int, int, 8, 16)
AWQ_VECTOR(unsigned, uint, 8, 16)
AWQ_VECTOR(long, long, 16, 16)
AWQ_VECTOR(unsigned long, ulong, 16, 16)
AWQ_VECTOR(long long, longlong, 16, 16)
AWQ_VECTOR(unsigned long long, ulonglong, 16, 16)
AWQ_VECTOR(float, float, 8, 16)
AWQ_VECTOR(double, double, 16, 16)
using dim3 = awq_index;

// ---- half precision: each operation rounds, as on the device ----
using half = _Float16;
using __half = _Float16;
struct alignas(4) half2 {
  half x, y;
};
using __half2 = half2;
static inline half2 make_half2(half x, half y) { return {x, y}; }
static inline half2 __halves2half2(half x, half y) { return {x, y}; }
static inline half2 __half2half2(half x) { return {x, x}; }
static inline half2 __float2half2_rn(float x) { return {(half)x, (half)x}; }
static inline half2 __floats2half2_rn(float x, float y) { return {(half)x, (half)y}; }
static inline float2 __half22float2(half2 v) { return {(float)v.x, (float)v.y}; }
static inline half __low2half(half2 v) { return v.x; }
static inline half __high2half(half2 v) { return v.y; }
static inline float __low2float(half2 v) { return (float)v.x; }
static inline float __high2float(half2 v) { return (float)v.y; }
static inline half __float2half(float x) { return (half)x; }
static inline half __float2half_rn(float x) { return (half)x; }
static inline half __double2half(double x) { return (half)x; }
static inline float __half2float(half x) { return (float)x; }
static inline half __int2half_rn(int x) { return (half)x; }
static inline int __half2int_rz(half x) { return (int)x; }
static inline half __ushort_as_half(unsigned short x) { return __builtin_bit_cast(half, x); }
static inline unsigned short __half_as_ushort(half x) { return __builtin_bit_cast(unsigned short, x); }
#define AWQ_HALF2(name, op)                                                     \
  static inline half __##name(half a, half b) { return a op b; }                \
  static inline half2 __##name##2(half2 a, half2 b) { return {(half)(a.x op b.x), (half)(a.y op b.y)}; }
AWQ_HALF2(hadd, +)
AWQ_HALF2(hsub, -)
AWQ_HALF2(hmul, *)
static inline half __hdiv(half a, half b) { return a / b; }
static inline half2 __h2div(half2 a, half2 b) { return {(half)(a.x / b.x), (half)(a.y / b.y)}; }
static inline half __hfma(half a, half b, half c) { return (half)fma((double)a, (double)b, (double)c); }
static inline half2 __hfma2(half2 a, half2 b, half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
static inline half __hneg(half a) { return -a; }
static inline bool __hgt(half a, half b) { return a > b; }
static inline bool __hlt(half a, half b) { return a < b; }
static inline bool __hge(half a, half b) { return a >= b; }
static inline bool __hle(half a, half b) { return a <= b; }
static inline bool __heq(half a, half b) { return a == b; }
static inline bool __hne(half a, half b) { return a != b; }
static inline bool __hisnan(half a) { return a != a; }
static inline half __hmax(half a, half b) { return (half)fmaxf(a, b); }
static inline half __hmin(half a, half b) { return (half)fminf(a, b); }
static inline half __habs(half a) { return (half)fabsf(a); }
#define AWQ_HALF_MATH(name, function) \
  static inline half name(half x) { return (half)function((float)x); }
AWQ_HALF_MATH(hexp, expf)
AWQ_HALF_MATH(hexp2, exp2f)
AWQ_HALF_MATH(hexp10, exp10f)
AWQ_HALF_MATH(hlog, logf)
AWQ_HALF_MATH(hlog2, log2f)
AWQ_HALF_MATH(hlog10, log10f)
AWQ_HALF_MATH(hsqrt, sqrtf)
AWQ_HALF_MATH(hrsqrt, 1.0f / sqrtf)
AWQ_HALF_MATH(hsin, sinf)
AWQ_HALF_MATH(hcos, cosf)
AWQ_HALF_MATH(htanh, tanhf)
AWQ_HALF_MATH(hfloor, floorf)
AWQ_HALF_MATH(hceil, ceilf)
AWQ_HALF_MATH(htrunc, truncf)
AWQ_HALF_MATH(hrint, rintf)
AWQ_HALF_MATH(hrcp, 1.0f /)

// ---- scalars ----
#define AWQ_MINMAX(T)                                      \
  static inline T max(T a, T b) { return a > b ? a : b; }  \
  static inline T min(T a, T b) { return a < b ? a : b; }
AWQ_MINMAX(int)
AWQ_MINMAX(unsigned)
AWQ_MINMAX(long)
AWQ_MINMAX(unsigned long)
AWQ_MINMAX(long long)
AWQ_MINMAX(unsigned long long)
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float __expf(float x) { return expf(x); }
static inline float __exp10f(float x) { return exp10f(x); }
static inline float __logf(float x) { return logf(x); }
static inline float __log2f(float x) { return log2f(x); }
static inline float __log10f(float x) { return log10f(x); }
static inline float __sinf(float x) { return sinf(x); }
static inline float __cosf(float x) { return cosf(x); }
static inline float __tanf(float x) { return tanf(x); }
static inline float __powf(float x, float y) { return powf(x, y); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
static inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
static inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
static inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += (int)(signed char)(a >> 8 * i) * (int)(signed char)(b >> 8 * i);
  return c;
}
template <class T>
static inline T __ldg(const T* p) { return *p; }

// ---- barriers, warps, atomics ----
#define __syncthreads() awq_barrier(__LINE__)
#define __syncwarp(...) awq_syncwarp(__LINE__, ##__VA_ARGS__)
#define __activemask() awq_meet(__LINE__, 0, nullptr, 0)
#define __shfl_sync(...) awq_shfl(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) awq_shfl_up(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) awq_shfl_down(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) awq_shfl_xor(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, predicate) awq_ballot(__LINE__, mask, (predicate) != 0)
#define __any_sync(mask, predicate) (awq_ballot(__LINE__, mask, (predicate) != 0) != 0)
#define __all_sync(mask, predicate) (awq_ballot(__LINE__, mask, !(predicate)) == 0)
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
static inline void awq_syncwarp(int line, unsigned mask = 0xFFFFFFFFu) { awq_meet(line, mask, nullptr, 0); }
static inline void awq_check_width(int width) {
  if (width < 1 || width > AWQ_WARP || (width & (width - 1))) __builtin_trap();  // the device's result is undefined
}
template <class T>
static inline T awq_shfl(int line, unsigned mask, T value, int from, int width = AWQ_WARP) {
  awq_check_width(width);
  unsigned base = awq_lane() / (unsigned)width * (unsigned)width;
  return awq_shuffle(line, mask, value, base + ((unsigned)from & (unsigned)(width - 1)));
}
template <class T>
static inline T awq_shfl_up(int line, unsigned mask, T value, unsigned delta, int width = AWQ_WARP) {
  awq_check_width(width);
  unsigned lane = awq_lane(), within = lane % (unsigned)width;
  return awq_shuffle(line, mask, value, within < delta ? lane : lane - delta);
}
template <class T>
static inline T awq_shfl_down(int line, unsigned mask, T value, unsigned delta, int width = AWQ_WARP) {
  awq_check_width(width);
  unsigned lane = awq_lane(), within = lane % (unsigned)width;
  return awq_shuffle(line, mask, value, within + delta >= (unsigned)width ? lane : lane + delta);
}
template <class T>
static inline T awq_shfl_xor(int line, unsigned mask, T value, int bits, int width = AWQ_WARP) {
  awq_check_width(width);
  unsigned lane = awq_lane(), other = lane ^ (unsigned)bits;
  return awq_shuffle(line, mask, value, other / (unsigned)width > lane / (unsigned)width ? lane : other);
}
static inline unsigned awq_ballot(int line, unsigned mask, bool predicate) {
  unsigned met = awq_meet(line, mask, &predicate, sizeof predicate), result = 0;
  for (unsigned lane = 0; lane < AWQ_WARP; ++lane)
    if ((met >> lane & 1) && awq_from_lane<bool>(lane)) result |= 1u << lane;
  return result;
}
#define AWQ_ATOMIC(name, expression)               \
  template <class T, class U>                      \
  static inline T name(T* p, U given) {            \
    T old = *p, value = (T)given;                  \
    *p = expression;                               \
    return old;                                    \
  }
AWQ_ATOMIC(atomicAdd, (T)(old + value))
AWQ_ATOMIC(atomicSub, (T)(old - value))
AWQ_ATOMIC(atomicMax, old > value ? old : value)
AWQ_ATOMIC(atomicMin, old < value ? old : value)
AWQ_ATOMIC(atomicExch, value)
AWQ_ATOMIC(atomicAnd, (T)(old & value))
AWQ_ATOMIC(atomicOr, (T)(old | value))
AWQ_ATOMIC(atomicXor, (T)(old ^ value))
template <class T>
static inline T atomicCAS(T* p, T expected, T value) {
  T old = *p;
  if (old == expected) *p = value;
  return old;
}

template <class>
struct awq_cuda_caller;
template <class... A>
struct awq_cuda_caller<void(A...)> {
  static constexpr char signature[] = {awq_code<A>::value..., 0};
  template <size_t... I>
  static void go(void (*f)(A...), void** arguments, awq_indices<I...>) {
    f(*(A*)arguments[I]...);
  }
  static void call(void (*f)(A...), void** arguments) {
    go(f, arguments, typename awq_make_indices<sizeof...(A)>::type());
  }
};

#include "awq_cuda_matrix.h"
