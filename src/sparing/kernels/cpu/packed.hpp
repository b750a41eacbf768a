// Products of few rows with weights in few bits: codes are read once, in the order of the file, decoded in registers
// and meet all rows. x stays exact; sums are float32.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

typedef uint8_t Byte;

constexpr int64_t kAhead = 4096;  // bytes of codes that are fetched early
constexpr int64_t kNarrow = 4096;  // inputs: four such rows of four bits are fetched and used within the first cache

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Scales are rare that the fast arithmetic does not carry through as `dequantize()` does: NaN, infinities, those with
// which a weight overflows or whose bits a vector reads otherwise. They are looked for once a row, after its products;
// a row that has some is multiplied again. (A test beside the products of a chunk costs them a twentieth.)
constexpr uint32_t kOrdinary = 0x38383838;  // of which scales of any format are not rare
constexpr float kLargeWhole = 0x1p116f, kLargeScale = 0x1p119f;  // weights of four and eight bits overflow from them on

// Four bits. A chunk is 8 W weights: W words of eight codes, the first in the lowest bits, so that lane l of the k-th
// vector of values is weight 8 l + k, and x is laid out alike. A scale belongs to 16 weights (2 lanes) or 32 (4 lanes).
constexpr int kChunk = 8 * W;

struct Int4 {
  static constexpr int lanes = 4, scale_bytes = 2;
  static constexpr float values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  static constexpr uint16_t halves[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                          0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  static float scale(const Byte* p) { return float_of(uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24); }
  static float exact_scale(const Byte* p) { return scale(p); }
  typedef uint16_t ScaleBits;
  template <class V>
  static V rare(V scales) {  // the highest bit of each that is 2^125 or more
    return (scales & 0x7fff) + 0x0200;
  }
  static constexpr int place[2] = {2, 3};  // of each byte of a scale within a word, before the shift
  static constexpr int shift = 0;
  static constexpr float factor = 1.0f;
};

struct E2M1 {
  static constexpr float values[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
  static constexpr uint16_t halves[16] = {0,      0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                          0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
};

// The value of every float8_e4m3fn.
constexpr auto kE4M3 = [] {
  struct { float of[256]; } all{};
  for (int i = 0; i < 256; ++i) {
    int exponent = i >> 3 & 15;
    float size = (exponent ? 8 + i % 8 : i % 8) * 0x1p-9f;  // 2^(exponent - 1) times that
    for (; exponent > 1; --exponent) size *= 2;
    all.of[i] = (i & 0x7f) == 0x7f ? kNaN : i < 128 ? size : -size;
  }
  return all;
}();

struct NVFP4 : E2M1 {  // a positive float8_e4m3fn: its bits, moved to a float's, are 2^-120 of its value
  static constexpr int lanes = 2, scale_bytes = 1;
  static float scale(const Byte* p) { return float_of(uint32_t(p[0]) << 20) * factor; }
  static float exact_scale(const Byte* p) { return kE4M3.of[p[0]]; }
  typedef uint8_t ScaleBits;
  template <class V>
  static V rare(V scales) {  // the highest bit of each that is NaN or negative
    return (scales + 1) | scales;
  }
  static constexpr int place[1] = {2};
  static constexpr int shift = 4;
  static constexpr float factor = 0x1p120f;
};

struct MXFP4 : E2M1 {
  static constexpr int lanes = 4, scale_bytes = 1;
  static float scale(const Byte* p) { return float_of(uint32_t(p[0]) << 23); }
  static float exact_scale(const Byte* p) { return p[0] == 255 ? kNaN : p[0] ? scale(p) : 0x1p-127f; }
  typedef uint8_t ScaleBits;
  template <class V>
  static V rare(V scales) {  // the highest bit of each that is 2^126 or more, NaN, or 2^-127, which is no normal float
    return (((scales & 0x7f) + 3) & scales) | ((scales - 1) & ~scales);
  }
  static constexpr int place[1] = {2};
  static constexpr int shift = 7;
  static constexpr float factor = 1.0f;
};

// The first n bytes of a vector, then those of `w`.
inline Words load_some(const Byte* p, int64_t n, Words w = Words{}) {
#if defined(__AVX512F__)
  return (Words)_mm512_mask_loadu_epi8((__m512i)w, n < 64 ? (uint64_t(1) << n) - 1 : ~uint64_t(0), p);
#else
  memcpy(&w, p, size_t(n));
  return w;
#endif
}

// The scale of each lane's weights, for a chunk.
template <class F>
inline Floats scales(const Byte* p) {
#if defined(__AVX512F__)
  // All of a chunk's scales are 8 bytes, or 4; each lane picks its own, puts it where a float has its exponent.
  constexpr int bytes = W / F::lanes * F::scale_bytes;
  alignas(64) static constexpr auto pattern = [] {
    struct { signed char at[64]; } p{};
    for (int l = 0; l < 16; ++l)
      for (int b = 0; b < 4; ++b) {
        p.at[4 * l + b] = -1;
        for (int s = 0; s < F::scale_bytes; ++s)
          if (F::place[s] == b) p.at[4 * l + b] = static_cast<signed char>(l / F::lanes * F::scale_bytes + s);
      }
    return p;
  }();
  int64_t raw = 0;
  memcpy(&raw, p, bytes);
  __m512i all = _mm512_shuffle_epi8(_mm512_set1_epi64(raw), _mm512_load_si512(pattern.at));
  if (F::shift) all = _mm512_slli_epi32(all, F::shift);
  Floats result = (Floats)_mm512_castsi512_ps(all);
  return F::factor == 1.0f ? result : result * F::factor;
#else
  float each[W];
  for (int l = 0; l < W; l += F::lanes) {
    float s = F::scale(p + l / F::lanes * F::scale_bytes);
    for (int i = 0; i < F::lanes; ++i) each[l + i] = s;
  }
  return load<Floats>(each);
#endif
}

// Whether one of the scales in some bytes is rare.
template <class F>
inline bool has_rare(const Byte* p, int64_t bytes) {
  typedef typename F::ScaleBits Bits;
  typedef Bits Some __attribute__((vector_size(4 * W)));
  Some seen{};
  for (; bytes >= 4 * W; bytes -= 4 * W, p += 4 * W) seen |= F::rare(load<Some>(p));
  if (bytes > 0) seen |= F::rare((Some)load_some(p, bytes, Words{} + kOrdinary));
  return any((Words)(seen >> (8 * sizeof(Bits) - 1)));
}

// The value of the lowest four bits of each word.
template <class F>
inline Floats values(Words codes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(F::values));
#elif defined(__AVX2__)
  __m256i c = (__m256i)codes;  // eight values to look up at once: those of the lower half of the codes, and the upper
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(F::values), c);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(F::values + 8), c);
  return (Floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)));
#else
  Floats v;
  for (int l = 0; l < W; ++l) v[l] = F::values[codes[l] & 15];
  return v;
#endif
}

// x as a chunk meets it: for chunk c, vectors k = 0..7 of W floats, lane l of which is x[c][8 l + k].
// `chunks` multiplies G chunks of codes, of several rows or of one, with R rows of x: chunk g meets x + g step.
// `number`: vector k of a chunk.
struct FloatX {
  typedef float Number;
  template <class T>
  static void lay(const T* x, int64_t in, Number* to) {
    for (int64_t i = 0; i < in; i += 8)  // in is a multiple of 8
      for (int k = 0; k < 8; ++k) to[i / kChunk * kChunk + k * W + i % kChunk / 8] = widen(x[i + k]);
  }
  template <class F, int R, int G>
  static void chunks(const Words* codes, const Number* x, int64_t step, int64_t stride, Floats (*sums)[R]) {
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r) sums[g][r] = Floats{};
    for (int k = 0; k < 8; ++k)
      for (int g = 0; g < G; ++g) {
        Floats w = values<F>(codes[g] >> (4 * k));
        for (int r = 0; r < R; ++r) sums[g][r] += w * number(x + g * step + r * stride, k);
      }
  }
  static Floats number(const Number* x, int k) { return load<Floats>(x + k * W); }
};

#if defined(__AVX512BF16__)
// Both are bfloat16, exactly: half as many vectors k = 0..3 of 2 W numbers, place i of which is x[c][4 i + k].
struct HalfX {
  typedef uint16_t Number;
  static void lay(const bf16* x, int64_t in, Number* to) {
    for (int64_t i = 0; i + 4 <= in; i += 32) {
      // Eight groups of four at a time; in is a multiple of 16.
      int n = in - i < 32 ? int(in - i) : 32;
      __m512i four = _mm512_maskz_loadu_epi16(n == 32 ? ~0u : (1u << n) - 1, x + i);
      Number* at = to + i / kChunk * kChunk + i % kChunk / 4;
      for (int k = 0; k < 4; ++k) {
        __m128i part = _mm512_cvtepi64_epi16(_mm512_srli_epi64(four, 16 * k));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + k * 2 * W), part);
      }
    }
  }
  template <class F, int R, int G>
  static void chunks(const Words* codes, const Number* x, int64_t step, int64_t stride, Floats (*sums)[R]) {
    const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(F::halves)));
    __m512 s[G][R];
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r) s[g][r] = _mm512_setzero_ps();
    for (int k = 0; k < 4; ++k)
      for (int g = 0; g < G; ++g) {
        // Five bits choose of 32 values, which are the sixteen twice.
        __m512bh w = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)codes[g], 4 * k), values);
        for (int r = 0; r < R; ++r)
          s[g][r] = _mm512_dpbf16_ps(s[g][r], w, (__m512bh)_mm512_loadu_si512(x + g * step + r * stride + k * 2 * W));
      }
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r) sums[g][r] = (Floats)s[g][r];
  }
  static Floats number(const Number* x, int k) {
    Words pair = load<Words>(x + k % 4 * 2 * W);
    return (Floats)(k < 4 ? pair << 16 : pair & 0xffff0000u);
  }
};
#endif

// What the first n weights of a chunk, each made as `dequantize()` makes it, add to the sums of R rows of x.
template <class F, class X, int R>
__attribute__((noinline)) void careful_chunk(Words codes, const Byte* scale, int64_t n, float whole,
                                             const typename X::Number* x, int64_t stride, Floats* sums) {
  float each[W] = {};
  Ints is_there{};
  for (int l = 0; l < n / 8; ++l) each[l] = F::exact_scale(scale + l / F::lanes * F::scale_bytes) * whole, is_there[l] = -1;
  for (int k = 0; k < 8; ++k) {
    Floats w = pick(is_there, values<F>(codes >> uint32_t(4 * k)) * load<Floats>(each), Floats{});
    for (int r = 0; r < R; ++r) sums[r] += w * X::number(x + r * stride, k);
  }
}

// y[r * width] of R rows of x with row `o` of the weight, which has rare scales or a large scale_2.
template <class F, class X, int R>
__attribute__((noinline)) void careful_row(const sparing::Packed& p, const typename X::Number* x, int64_t stride,
                                           int64_t o, float* y, int64_t width) {
  auto codes = static_cast<const Byte*>(p.codes) + o * p.inputs / 2;
  auto scale = static_cast<const Byte*>(p.scale) + o * (p.inputs / (8 * F::lanes)) * F::scale_bytes;
  const float whole = p.scale_2 ? *static_cast<const float*>(p.scale_2) : 1.0f;
  const bool is_large = !(__builtin_fabsf(whole) < kLargeWhole);  // it belongs to each scale then, not to the sum
  Floats sums[R] = {};
  for (int64_t i = 0; i < p.inputs; i += kChunk, codes += kChunk / 2, scale += W / F::lanes * F::scale_bytes) {
    int64_t n = smaller(kChunk, p.inputs - i), n_scales = n / (8 * F::lanes) * F::scale_bytes;
    Words word = load_some(codes, n / 2), some = load_some(scale, n_scales);
    auto at = reinterpret_cast<const Byte*>(&some);
    if (is_large || has_rare<F>(at, n_scales)) {
      careful_chunk<F, X, R>(word, at, n, is_large ? whole : 1, x + i, stride, sums);
    } else {
      Floats part[1][R], s = scales<F>(at);
      X::template chunks<F, R, 1>(&word, x + i, 0, stride, part);
      for (int r = 0; r < R; ++r) sums[r] += part[0][r] * s;
    }
  }
  for (int r = 0; r < R; ++r) y[r * width] = sum(is_large ? sums[r] : sums[r] * whole);
}

// y[r * width + b] of R rows of x with B rows of the weight, from `o` on, each in U chains of sums: its chunk c belongs
// to chain c % U, whatever R is. G of the B U chunks are decoded at a time, so that none waits for another. What will be
// needed is asked for in the order of the file: the rows themselves are read side by side, which no hardware foresees.
template <class F, class X, int R, int B, int U, int G>
void four_bit_rows(const sparing::Packed& p, const typename X::Number* x, int64_t stride, int64_t o, float* y,
                   int64_t width) {
  constexpr int64_t line = kChunk / 2, chunk_scales = W / F::lanes * F::scale_bytes;
  int64_t code_width = p.inputs / 2, scale_width = p.inputs / (8 * F::lanes) * F::scale_bytes;
  auto codes = static_cast<const Byte*>(p.codes) + o * code_width;
  const auto row_scales = static_cast<const Byte*>(p.scale) + o * scale_width;
  const Byte* scale = row_scales;
  const Byte* ahead = codes + greater(kAhead, B > 1 ? B * code_width : 0);
  auto fetch = [&](int n) {
    if (n * line % 64 == 0) prefetch_once(ahead + n * line, p.past_caches);
  };
  Floats sums[B * U][R] = {};
  // Chunk n of the B U that are in flight is chunk n % U of weight row n / U.
  int64_t i = 0;
  for (; i + U * kChunk <= p.inputs;
       i += U * kChunk, codes += U * line, scale += U * chunk_scales, ahead += B * U * line)
    for (int first = 0; first < B * U; first += G) {
      Words words[G];
      Floats part[G][R];
      for (int g = 0; g < G; ++g) {
        int n = first + g;
        fetch(n);
        words[g] = load<Words>(codes + n / U * code_width + n % U * line);
      }
      X::template chunks<F, R, G>(words, x + i + first % U * kChunk, U > 1 ? kChunk : 0, stride, part);
      for (int g = 0; g < G; ++g) {
        int n = first + g;
        Floats s = scales<F>(scale + n / U * scale_width + n % U * chunk_scales);
        for (int r = 0; r < R; ++r) sums[n][r] += part[g][r] * s;
      }
    }
  // The rest, of fewer than U chunks and a last one that may be short, goes to the first chain of each row.
  for (; i < p.inputs; i += kChunk, codes += line, scale += chunk_scales, ahead += B * line) {
    int64_t n = smaller(kChunk, p.inputs - i), n_scales = n / (8 * F::lanes) * F::scale_bytes;  // x is 0 past its end
    Words words[B];
    Floats part[B][R];
    for (int b = 0; b < B; ++b) {
      fetch(b);
      words[b] = load_some(codes + b * code_width, n / 2);
    }
    X::template chunks<F, R, B>(words, x + i, 0, stride, part);
    for (int b = 0; b < B; ++b) {
      Words some = load_some(scale + b * scale_width, n_scales);
      Floats s = scales<F>(reinterpret_cast<const Byte*>(&some));
      for (int r = 0; r < R; ++r) sums[b * U][r] += part[b][r] * s;
    }
  }
  const float whole = p.scale_2 ? *static_cast<const float*>(p.scale_2) : 1.0f;
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) {
      Floats total = sums[b * U][r];
      for (int u = 1; u < U; ++u) total += sums[b * U + u][r];
      y[r * width + b] = sum(total * whole);
    }
  const bool is_large = !(__builtin_fabsf(whole) < kLargeWhole);
  if (__builtin_expect(has_rare<F>(row_scales, B * scale_width) || is_large, false))
    for (int b = 0; b < B; ++b)
      if (is_large || has_rare<F>(row_scales + b * scale_width, scale_width))
        careful_row<F, X, R>(p, x, stride, o + b, y + b, width);
}

// How rows of x are laid out for a weight of four bits, and R of them multiplied with its rows first..last-1.
template <class F, class X>
struct FourBits {
  typedef typename X::Number Number;
  static int64_t code_bytes(int64_t in) { return in / 2; }
  template <class T>
  static void lay(const T* x, int64_t in, Number* to) {
    X::lay(x, in, to);
  }
  template <int R>
  static void rows(const sparing::Packed& p, const Number* x, int64_t stride, int64_t first, int64_t last, float* y,
                   int64_t width) {
    constexpr int U = W == 16 ? 4 : 2, B = R == 1 && W == 16 ? 4 : 2, G = R == 1 && W == 16 ? U : 1;
    int64_t o = first;
    if (p.inputs <= kNarrow)
      for (; o + B <= last; o += B) four_bit_rows<F, X, R, B, 1, B>(p, x, stride, o, y + o - first, width);
    for (; o < last; ++o)
      p.inputs <= kNarrow ? four_bit_rows<F, X, R, 1, 1, 1>(p, x, stride, o, y + o - first, width)
                      : four_bit_rows<F, X, R, 1, U, G>(p, x, stride, o, y + o - first, width);
  }
};

// Eight bits: a byte a weight, x as float32 in its own order.
struct Int8 {
  static constexpr float factor = 1.0f, unit = 1.0f;
  static constexpr bool has_nan = false;
  static Floats exact(const Byte* p) { return read(p); }
  typedef const Byte* Two;  // vectors of bytes, and one of them read
  static Two two(const Byte* p) { return p; }
  static Floats read(Two p, int which) { return read(p + which * W); }
  static Floats read(const Byte* p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    Floats v;
    for (int l = 0; l < W; ++l) v[l] = static_cast<int8_t>(p[l]);
    return v;
#endif
  }
};

// float8_e4m3fn: its bits, moved to a float16's, are 2^-8 of its value; half of that is given back to x. (Moved to a
// float's, they would make subnormal floats of its small values: each product with one takes Intel a hundred cycles.)
struct FP8 {
  static constexpr float factor = 0x1p4f, unit = 0x1p8f;
  static constexpr bool has_nan = true;
  static Floats exact(const Byte* p) { return pick(are_nan(p), splat(kNaN), read(p)); }
  static Floats read(const Byte* p) {  // of NaN 480 / unit
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(halves(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps(halves(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
    Floats v;
    for (int l = 0; l < W; ++l) v[l] = kE4M3.of[p[l]] / unit;
    return v;
#endif
  }
#if defined(__AVX512F__)
  typedef __m512i Two;
  static Two two(const Byte* p) {
    __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_and_si512(_mm512_slli_epi16(w, 7), _mm512_set1_epi16(short(0xbf80)));
  }
  static Floats read(Two w, int which) {
    return (Floats)_mm512_cvtph_ps(which ? _mm512_extracti64x4_epi64(w, 1) : _mm512_castsi512_si256(w));
  }
#else
  typedef const Byte* Two;
  static Two two(const Byte* p) { return p; }
  static Floats read(Two p, int which) { return read(p + which * W); }
#endif

 private:
#if defined(__AVX512F__)  // of bytes with their sign in the upper half
  static __m256i halves(__m256i w) {
    return _mm256_and_si256(_mm256_slli_epi16(w, 7), _mm256_set1_epi16(short(0xbf80)));
  }
#elif defined(__AVX2__)
  static __m128i halves(__m128i w) { return _mm_and_si128(_mm_slli_epi16(w, 7), _mm_set1_epi16(short(0xbf80))); }
#endif
  static Words words(const Byte* p) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    Words w;
    for (int l = 0; l < W; ++l) w[l] = p[l];
    return w;
#endif
  }
  static Ints are_nan(const Byte* p) { return (Ints)((words(p) & 0x7f) == 0x7f); }
};

// Whether a NaN was among bytes of FP8: all bits but the sign are set, and adding 1 changes that.
struct NaNWatch {
  typedef uint8_t Some __attribute__((vector_size(2 * W)));
  Some seen{};
  void look(const Byte* p) { seen |= (load<Some>(p) + 1) ^ load<Some>(p); }
  bool found() const {
    uint64_t words[W / 4], all = 0;
    memcpy(words, &seen, sizeof words);
    for (uint64_t word : words) all |= word;
    return (all & 0x8080808080808080) != 0;
  }
};

constexpr int64_t kScaleBlock = 128;  // rows and inputs that share a scale

// What the codes of row o are worth from input i on.
inline float scale_at(const sparing::Packed& p, int64_t o, int64_t i) {
  auto scale = static_cast<const float*>(p.scale);
  switch (p.scales) {
    case sparing::Scales::matrix: return scale[0];
    case sparing::Scales::row: return scale[o];
    default: return scale[o / kScaleBlock * ((p.inputs + kScaleBlock - 1) / kScaleBlock) + i / kScaleBlock];
  }
}

// How many consecutive inputs share a scale.
inline int64_t scaled_together(const sparing::Packed& p) {
  return p.scales == sparing::Scales::block ? kScaleBlock : greater(1, p.inputs);
}

// The product of a row of x with row `o` of a weight that has NaN or large scales, each weight made as `dequantize()`
// makes it.
template <class F>
__attribute__((noinline)) float careful_row(const sparing::Packed& p, const float* x, int64_t o) {
  auto codes = static_cast<const Byte*>(p.codes) + o * p.inputs;
  float total = 0;
  for (int64_t i = 0; i < p.inputs; ++i) {
    const Byte one[W] = {codes[i]};
    total += F::exact(one)[0] * F::unit * scale_at(p, o, i) * (x[i] / F::factor);
  }
  return total;
}

// y[r * width + b] of R rows of x with B rows of the weight, from `o` on; each has two chains of sums, whatever R is.
template <class F, int R, int B>
void eight_bit_rows(const sparing::Packed& p, const float* x, int64_t stride, int64_t o, float* y, int64_t width) {
  auto codes = static_cast<const Byte*>(p.codes) + o * p.inputs;
  const Byte* ahead = codes + greater(kAhead, B > 1 ? B * p.inputs : 0);
  Floats totals[B][R] = {};
  NaNWatch watch[B];
  bool has_large[B] = {};
  for (int64_t i = 0; i < p.inputs;) {
    int64_t start = i, end = smaller(i + scaled_together(p), p.inputs);
    Floats sums[B][2][R] = {};
    for (; i + 2 * W <= end; i += 2 * W) {
      if (B > 1 || i % 64 == 0) B > 1 ? prefetch_once(ahead + B * i, p.past_caches) : prefetch(ahead + i);
      for (int b = 0; b < B; ++b) {
        auto two = F::two(codes + b * p.inputs + i);
        if (F::has_nan) watch[b].look(codes + b * p.inputs + i);
        for (int half = 0; half < 2; ++half) {
          Floats w = F::read(two, half);
          for (int r = 0; r < R; ++r) sums[b][half][r] += w * load<Floats>(x + r * stride + i + half * W);
        }
      }
    }
    for (; i < end; i += W)  // x is 0 past its end
      for (int b = 0; b < B; ++b) {
        Byte rest[W] = {};
        memcpy(rest, codes + b * p.inputs + i, size_t(smaller(W, end - i)));
        Floats w = F::exact(rest);
        for (int r = 0; r < R; ++r) sums[b][0][r] += w * load<Floats>(x + r * stride + i);
      }
    for (int b = 0; b < B; ++b) {
      const float s = scale_at(p, o + b, start);
      has_large[b] |= !(__builtin_fabsf(s) < kLargeScale);
      for (int r = 0; r < R; ++r) totals[b][r] += (sums[b][0][r] + sums[b][1][r]) * (s * F::factor);
    }
  }
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) y[r * width + b] = sum(totals[b][r]);
  for (int b = 0; b < B; ++b)
    if (__builtin_expect(has_large[b] || (F::has_nan && watch[b].found()), false))
      for (int r = 0; r < R; ++r) y[r * width + b] = careful_row<F>(p, x + r * stride, o + b);
}

// As FourBits.
template <class F>
struct EightBits {
  typedef float Number;
  static int64_t code_bytes(int64_t in) { return in; }
  template <class T>
  static void lay(const T* x, int64_t in, float* to) {
    for (int64_t i = 0; i < in; ++i) to[i] = widen(x[i]) * F::factor;
  }
  template <int R>
  static void rows(const sparing::Packed& p, const float* x, int64_t stride, int64_t first, int64_t last, float* y,
                   int64_t width) {
    int64_t o = first;
    // Two rows at a time: one of x that is short leaves time to fetch them, and several long ones are read half as
    // often.
    if (R == 1 ? p.inputs <= kNarrow / 2 : p.inputs > kNarrow / 2)
      for (; o + 2 <= last; o += 2) eight_bit_rows<F, R, 2>(p, x, stride, o, y + o - first, width);
    for (; o < last; ++o) eight_bit_rows<F, R, 1>(p, x, stride, o, y + o - first, width);
  }
};

}  // namespace
