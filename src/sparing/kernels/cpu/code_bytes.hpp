// The products of code_lines.hpp in integers: centroids become bytes by one shuffle, and x is bytes too. With VNNI an
// instruction adds four products to each of 16 sums; with AVX2 three do, for 8 sums.
//
// Keys: centroids are shifted into unsigned bytes, x (a query) is signed. Values: x (weights) is unsigned, centroids are
// signed. AVX2 adds two products in 16 bits, so one side of each pair has 7 bits there.
#pragma once

#include "code_lines.hpp"

namespace {

#if defined(__AVX2__)

#if defined(__AVX512VNNI__)
typedef __m512i Bytes;
constexpr int kKeyLimit = 127, kKeyShift = 128;  // centroids of keys: their largest integer, and what is added to them
constexpr int kPlaneBits = 8;                    // of a weight's high part and of its low part
inline Bytes splat_word(uint32_t word) { return _mm512_set1_epi32(int(word)); }
inline Bytes splat_byte(int byte) { return _mm512_set1_epi8(char(byte)); }
inline Bytes repeat(const int8_t* sixteen) { return _mm512_broadcast_i32x4(load<__m128i>(sixteen)); }
inline Bytes shuffle(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
inline Bytes shift_right(Bytes v, int n) { return _mm512_srli_epi16(v, n); }
inline Bytes add_where(Bytes v, uint64_t where, int, Bytes more) { return _mm512_mask_add_epi8(v, where, v, more); }
inline Ints add_products(Ints sums, Bytes of_unsigned, Bytes of_signed) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, of_unsigned, of_signed);
}
// The lower 16 bits of 64 numbers below 2^16: their upper halves to `high`, their lower ones to `low`.
inline void store_planes(const Ints* v, uint8_t* high, uint8_t* low) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packus works by 128 bits
  __m512i a = _mm512_packus_epi32((__m512i)v[0], (__m512i)v[1]), b = _mm512_packus_epi32((__m512i)v[2], (__m512i)v[3]);
  __m512i upper = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
  __m512i lower = _mm512_packus_epi16(a & _mm512_set1_epi16(255), b & _mm512_set1_epi16(255));
  store(high, _mm512_permutexvar_epi32(order, upper));
  store(low, _mm512_permutexvar_epi32(order, lower));
}
#else
typedef __m256i Bytes;
constexpr int kKeyLimit = 63, kKeyShift = 64;
constexpr int kPlaneBits = 7;
inline Bytes splat_word(uint32_t word) { return _mm256_set1_epi32(int(word)); }
inline Bytes splat_byte(int byte) { return _mm256_set1_epi8(char(byte)); }
inline Bytes repeat(const int8_t* sixteen) { return _mm256_broadcastsi128_si256(load<__m128i>(sixteen)); }
inline Bytes shuffle(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
inline Bytes shift_right(Bytes v, int n) { return _mm256_srli_epi16(v, n); }
inline Bytes add_where(Bytes v, uint64_t where, int part, Bytes more) {  // of 64 bits the half of this vector's lanes
  const Bytes spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                        2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const Bytes bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  Bytes copies = _mm256_shuffle_epi8(_mm256_set1_epi32(int(uint32_t(where >> (32 * part)))), spread);
  return _mm256_add_epi8(v, _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(copies, bit), bit), more));
}
inline Ints add_products(Ints sums, Bytes of_unsigned, Bytes of_signed) {
  return sums + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(of_unsigned, of_signed), _mm256_set1_epi16(1));
}
// 32 numbers below 2^14: their upper 7 bits to `high`, their lower ones to `low`.
inline void store_planes(const Ints* v, uint8_t* high, uint8_t* low) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packus works by 128 bits
  __m256i a = _mm256_packus_epi32((__m256i)v[0], (__m256i)v[1]), b = _mm256_packus_epi32((__m256i)v[2], (__m256i)v[3]);
  __m256i upper = _mm256_packus_epi16(_mm256_srli_epi16(a, 7), _mm256_srli_epi16(b, 7));
  __m256i lower = _mm256_packus_epi16(a & _mm256_set1_epi16(127), b & _mm256_set1_epi16(127));
  store(high, _mm256_permutevar8x32_epi32(upper, order));
  store(low, _mm256_permutevar8x32_epi32(lower, order));
}
#endif

constexpr int kParts = kLanes / W;  // vectors in a line of 64 bytes
constexpr float kMostWeight = (1 << 2 * kPlaneBits) - 1;
#if defined(__AVX512F__)
constexpr int kWeightRows = 4;  // of weights, two planes each
inline Ints to_nearest(Floats x) { return (Ints)_mm512_cvtps_epi32((__m512)x); }
#else
constexpr int kWeightRows = 2;
inline Ints to_nearest(Floats x) { return (Ints)_mm256_cvtps_epi32((__m256)x); }
#endif

// Centroids as integers, in the order of `Planes::index`.
struct ByteTable {
  Bytes integers;
  float step;  // centroid = integer * step

  template <int bits>
  static ByteTable make(const float* centroids, bool are_keys) {
    const float largest = centroids[(1 << bits) - 1];
    const int limit = are_keys ? kKeyLimit : 127;
    float best = largest / float(limit);
    if (limit < 127) {  // few integers: of some steps the one that all centroids are nearest to multiples of
      float least = 0;
      for (int trial = 0; trial < 32; ++trial) {
        float step = largest / (float(limit) + 0.49f - 0.5f * float(trial)), error = 0;
        for (int i = 1 << (bits - 1); i < 1 << bits; ++i) {
          float off = centroids[i] - step * float(int(centroids[i] / step + 0.5f));
          error += off * off;
        }
        if (trial == 0 || error < least) best = step, least = error;
      }
    }
    int8_t table[16];
    for (int i = 0; i < 16; ++i) {
      float exact = centroids[Planes<bits>::centroid(i)] / best;
      table[i] = int8_t(int(exact < 0 ? exact - 0.5f : exact + 0.5f) + (are_keys ? kKeyShift : 0));
    }
    return {repeat(table), best};
  }
};

// sums[r][b] = start[r] (or 0) + sum_i integer[code[lane, i]] * x[r * x_row + i] for R rows of x and the lanes of B
// vectors, of which there are kParts in a run of 16 lanes; over `blocks` blocks, each of `depth` and `block_step` bytes
// after the one before. x holds four depths a word.
template <int bits, int R, int B, bool are_keys>
inline void dot_bytes(const uint8_t* bytes, int64_t block_step, int64_t blocks, int64_t depth, const ByteTable& table,
                      const uint32_t* x, int64_t x_row, const int32_t* start, Ask& ask, Ints (*sums)[B]) {
  using P = Planes<bits>;
  static_assert(B % kParts == 0);
  const Bytes mask = splat_byte((1 << P::width) - 1), upper = splat_byte(1 << P::width);
  const int64_t run = P::bytes(depth);
  Ints s[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) s[r][b] = Ints{} + (start ? start[r] : 0);
  for (int64_t block = 0; block < blocks; ++block, bytes += block_step) {
    for (int64_t g = 0; g < P::lines(depth); ++g, x += P::fields) {
      ask.some();
      Bytes lines[B];
      for (int b = 0; b < B; ++b) lines[b] = load<Bytes>(bytes + b / kParts * run + g * 64 + b % kParts * sizeof(Bytes));
#pragma GCC unroll 4
      for (int f = 0; f < P::fields; ++f) {
        Bytes values[B];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
          Bytes index = (f ? shift_right(lines[b], f * P::width) : lines[b]) & mask;
          if (P::has_signs) {  // the top bit of a code has a plane of its own: it adds half of the table to the index
            uint64_t signs = load<uint64_t>(P::signs(bytes + b / kParts * run, depth) + (g * P::fields + f) * 8);
            index = add_where(index, signs, b % kParts, upper);
          }
          values[b] = shuffle(table.integers, index);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          Bytes four = splat_word(x[r * x_row + f]);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b)
            s[r][b] = are_keys ? add_products(s[r][b], values[b], four) : add_products(s[r][b], four, values[b]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) sums[r][b] = s[r][b];
}

// 2^x to within 1e-4 of itself, for x <= 0.
inline Floats exp2_roughly(Floats x) {
#if defined(__AVX512F__)
  Floats r = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // x - floor(x), 0 of an infinity
#else
  Floats clipped = larger(splat(-127.0f), x), floor = (Floats)_mm256_floor_ps((__m256)clipped), r = clipped - floor;
#endif
  Floats p = ((r * 0.07802452f + 0.22606716f) * r + 0.69583354f) * r + 0.99992522f;
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  Ints power = (Ints)_mm256_cvtps_epi32((__m256)floor) << 23;
  return pick(x < splat(-126.0f), Floats{}, (Floats)((Ints)p + power));
#endif
}

#endif

}  // namespace
