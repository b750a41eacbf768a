// One vocabulary of vectors for every instruction set. A kernel is written once against it and compiled once per set:
// the including file (avx512.cpp, avx2.cpp, portable.cpp) is built with the flags of its set and nothing here has
// external linkage, so that no code of one set can be called on a machine that lacks it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));

struct bf16 {
  uint16_t bits;
};

inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float widen(float x) { return x; }

template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {  // to nearest, ties to even, as torch
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class V>
inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
inline Floats splat(float x) { return Floats{} + x; }
inline Floats pick(Ints condition, Floats yes, Floats no) {
  return (Floats)((condition & (Ints)yes) | (~condition & (Ints)no));
}
constexpr float kNaN = __builtin_nanf(""), kInfinity = __builtin_inff();

inline Floats larger(Floats a, Floats b) {  // b where one of them is NaN
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return pick(a > b, a, b);
#endif
}

inline Floats lesser(Floats a, Floats b) {  // b where one of them is NaN
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return pick(a < b, a, b);
#endif
}

inline Floats root(Floats v) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
inline float largest(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

inline bool any(Words v) {  // whether one is not 0
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= v[i];
  return bits != 0;
#endif
}

// The sums of four vectors, to four places in memory: a third of the work of four calls of `sum`.
inline void sum4(Floats a, Floats b, Floats c, Floats d, float* to) {
#if defined(__AVX512F__)
  __m512 x = (__m512)a, y = (__m512)b, z = (__m512)c, w = (__m512)d;
  __m512 xy = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  __m512 zw = _mm512_add_ps(_mm512_unpacklo_ps(z, w), _mm512_unpackhi_ps(z, w));
  __m512 all = _mm512_add_ps(_mm512_shuffle_ps(xy, zw, 0x44), _mm512_shuffle_ps(xy, zw, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  __m256 all = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#endif
}

// e^x to within two units in the last place, NaN of NaN. Below -87 it ends as 0, above 88 as infinity.
inline Floats exp(Floats x) {
#if defined(__AVX512F__)
  Floats clipped = larger(splat(-150.0f), (Floats)_mm512_min_ps(_mm512_set1_ps(150.0f), (__m512)x));
  Floats n = (Floats)_mm512_roundscale_ps((__m512)(clipped * 1.44269504f), 0);
#else
  const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  Floats clipped = pick(x < splat(-87.0f), splat(-87.0f), pick(x > splat(88.0f), splat(88.0f), x));
  Floats shifted = clipped * 1.44269504f + shift;
  Floats n = shifted - shift;
#endif
  Floats r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  Ints power = ((Ints)shifted - 0x4b400000) << 23;
  Floats result = pick(x < splat(-87.0f), Floats{}, (Floats)((Ints)p + power));
  return pick(x <= splat(88.0f), result, x + kInfinity);
#endif
}

inline Floats rounded_to_bf16(Floats x) {
  Words bits = (Words)x;
  Floats rounded = (Floats)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
  return pick(x == x, rounded, splat(kNaN));  // rounding up a NaN's bits may give any number
}

// W numbers in the order they lie, and back; of the last vector only the first n.
inline Floats read(const float* p) { return load<Floats>(p); }
inline Floats read(const bf16* p) {
  typedef uint16_t Halves __attribute__((vector_size(2 * W)));
  return (Floats)(__builtin_convertvector(load<Halves>(p), Words) << 16);
}
inline void write(float* p, Floats v) { store(p, v); }
// Of numbers too small for a normal bf16 it may make zeros.
inline void write(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
  store(p, _mm512_cvtneps_pbh((__m512)v));
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * W)));
  store(p, __builtin_convertvector((Words)rounded_to_bf16(v) >> 16, Halves));
#endif
}
template <class T>
inline Floats read(const T* p, int64_t n) {
  if (n >= W) return read(p);
  T some[W] = {};
  memcpy(some, p, n * sizeof(T));
  return read(some);
}
template <class T>
inline void write(T* p, Floats v, int64_t n) {
  if (n >= W) return write(p, v);
  T some[W];
  write(some, v);
  memcpy(p, some, n * sizeof(T));
}

// A Line<T> is the vector of T that one step of a dot product reads. `dot` adds the products of two lines to W sums;
// which products meet in which sum is up to the line, the total is all that counts. `widen` gives its numbers as `parts`
// vectors; lane `lane` of vector `part` is number `place(part, lane)` of the line.
template <class T>
struct Line;

template <>
struct Line<float> {
  static constexpr int size = W, parts = 1;
  Floats v;
  static Line read(const float* p) { return {load<Floats>(p)}; }
  static Line read(const float* p, int n) {  // the first n, then zeros
    Floats v{};
    memcpy(&v, p, 4 * n);
    return {v};
  }
  Floats dot(Line b, Floats sums) const { return v * b.v + sums; }
  void widen(Floats* to) const { to[0] = v; }
  static int place(int, int lane) { return lane; }
};

template <>
struct Line<bf16> {
  static constexpr int size = 2 * W, parts = 2;
  Words v;  // two numbers a word, the lower address in the lower half
  static Line read(const bf16* p) { return {load<Words>(p)}; }
  static Line read(const bf16* p, int n) {
    Words v{};
    memcpy(&v, p, 2 * n);
    return {v};
  }
  Floats even() const { return (Floats)(v << 16); }
  Floats odd() const { return (Floats)(v & 0xffff0000u); }
  Floats dot(Line b, Floats sums) const {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)v, (__m512bh)b.v);
#else
    return odd() * b.odd() + (even() * b.even() + sums);
#endif
  }
  void widen(Floats* to) const { to[0] = even(), to[1] = odd(); }
  static int place(int part, int lane) { return 2 * lane + part; }
};

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
// Asks for what will be read once: past the caches, so that it pushes nothing out of them that will be read again, or
// like anything else on CPUs that are slow at that.
inline void prefetch_once(const void* p, bool past_caches) {
  past_caches ? __builtin_prefetch(p, 0, 0) : __builtin_prefetch(p, 0, 3);
}

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace
