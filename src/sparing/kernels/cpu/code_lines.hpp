// Products of packed codes with vectors: 16 lanes of codes [16, depth] times x [depth], for several x at once.
//
// Lanes are tokens and depth a head's dimensions (keys), or lanes are dimensions and depth 64 tokens (values); the bytes
// are laid out alike (quantize/packing.py), so that no sum ever goes across lanes. `bytes` are the codes of 16 lanes: the
// plane of 4 bits, or of 2 bits and then, for 3 bits, one word of 64 signs for each four depths.
#pragma once

#include "simd.hpp"

namespace {

constexpr int kLanes = 16;

template <int bits>
struct Planes {
  static constexpr int width = bits == 4 ? 4 : 2;  // of the first plane
  static constexpr int fields = 8 / width;         // of it in a byte
  static constexpr bool has_signs = bits == 3;
  static constexpr int64_t bytes(int64_t depth) { return depth * kLanes * bits / 8; }  // of 16 lanes
  static const uint8_t* signs(const uint8_t* bytes, int64_t depth) { return bytes + depth * kLanes * width / 8; }
  // What the first plane indexes, repeated up to 16 entries: a lookup reads four bits, whatever they hold.
  static void table(const float* centroids, float* to) {
    for (int i = 0; i < 16; ++i) to[i] = centroids[(has_signs ? 4 : 0) + i % (1 << width)];
  }
};

// table[index % 16] for each lane; entries repeat after `period`.
template <int period>
inline Floats lookup(const float* table, Words index) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  if (period <= 8) return (Floats)low;
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
  return (Floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps((__m256i)(index << 28)));
#else
  Floats v;
  for (int i = 0; i < W; ++i) v[i] = table[index[i] & 15];
  return v;
#endif
}

// out[r * out_row + lane] = sum_i table[code[lane, i]] * x[r * x_row + i], in float, for R rows of x. Asks for what lies
// `ahead` bytes further.
template <int bits, int R>
void dot_lines(const uint8_t* bytes, int64_t depth, const float* table, const float* x, int64_t x_row, float* out,
               int64_t out_row, int64_t ahead) {
  using P = Planes<bits>;
  const uint8_t* signs = P::signs(bytes, depth);
  for (int first = 0; first < kLanes; first += W) {
    Floats sums[R][2] = {};
    Words up{};  // brings the four sign bits of each lane to the top
    for (int i = 0; i < W; ++i) up[i] = 28 - 4 * ((first + i) % 8);
    for (int64_t g = 0; g < depth / (4 * P::fields); ++g) {
      if (first == 0) prefetch(bytes + g * 64 + ahead);
      Words line = load<Words>(bytes + g * 64 + first * 4);
      for (int f = 0; f < P::fields; ++f) {
        Words lane_signs{};
        if (P::has_signs) {
          uint32_t halves[2];
          memcpy(halves, signs + (g * P::fields + f) * 8, 8);
          for (int i = 0; i < W; ++i) lane_signs[i] = halves[(first + i) / 8];
          lane_signs <<= up;
        }
        for (int j = 0; j < 4; ++j) {
          Floats values = lookup<1 << P::width>(table, line >> (8 * j + P::width * f));
          if (P::has_signs) values = (Floats)((Words)values ^ ((lane_signs << (3 - j)) & 0x80000000u));
          int64_t i = (g * P::fields + f) * 4 + j;
          for (int r = 0; r < R; ++r) sums[r][j % 2] += values * x[r * x_row + i];
        }
      }
    }
    for (int r = 0; r < R; ++r) store(out + r * out_row + first, sums[r][0] + sums[r][1]);
  }
}

#if defined(__AVX512VNNI__)
// The tables of `dot_bytes`: centroids as integers, for keys shifted by 128 into unsigned bytes.
struct ByteTables {
  __m512i plain, negative;
  float step;  // of the integers

  template <int bits>
  static ByteTables make(const float* centroids, bool are_keys) {
    float table[16], largest = centroids[(1 << bits) - 1];
    Planes<bits>::table(centroids, table);
    int8_t plain[16], negative[16];
    for (int i = 0; i < 16; ++i) {
      float exact = table[i] / largest * 127;
      int c = int(exact < 0 ? exact - 0.5f : exact + 0.5f);
      plain[i] = int8_t(are_keys ? c + 128 : c), negative[i] = int8_t(are_keys ? 128 - c : -c);
    }
    return {_mm512_broadcast_i32x4(load<__m128i>(plain)), _mm512_broadcast_i32x4(load<__m128i>(negative)),
            largest / 127};
  }
};

// out[r * out_row + b * 16 + lane] = sum_i integer[code[lane, i]] * x[r * x_row + i] in integers, for R rows of x and B
// runs of 16 lanes one after another. x holds four depths a word: signed bytes against keys (shifted by 128), unsigned
// ones against values. Asks for what lies `ahead` bytes further.
template <int bits, int R, int B, bool are_keys>
void dot_bytes(const uint8_t* bytes, int64_t depth, const ByteTables& tables, const uint32_t* x, int64_t x_row,
               int32_t* out, int64_t out_row, int64_t ahead) {
  using P = Planes<bits>;
  const __m512i mask = _mm512_set1_epi8((1 << P::width) - 1);
  __m512i sums[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) sums[r][b] = _mm512_setzero_si512();
  for (int64_t g = 0; g < depth / (4 * P::fields); ++g) {
    __m512i lines[B];
    for (int b = 0; b < B; ++b) {
      prefetch(bytes + b * P::bytes(depth) + g * 64 + ahead);
      lines[b] = _mm512_loadu_si512(bytes + b * P::bytes(depth) + g * 64);
    }
#pragma GCC unroll 4
    for (int f = 0; f < P::fields; ++f)
      for (int b = 0; b < B; ++b) {
        __m512i index = _mm512_and_si512(f ? _mm512_srli_epi16(lines[b], f * P::width) : lines[b], mask);
        __m512i values = _mm512_shuffle_epi8(tables.plain, index);
        if (P::has_signs) {
          uint64_t signs = load<uint64_t>(P::signs(bytes + b * P::bytes(depth), depth) + (g * P::fields + f) * 8);
          values = _mm512_mask_shuffle_epi8(values, signs, tables.negative, index);
        }
        for (int r = 0; r < R; ++r) {
          __m512i four = _mm512_set1_epi32(int(x[r * x_row + g * P::fields + f]));
          sums[r][b] = are_keys ? _mm512_dpbusd_epi32(sums[r][b], values, four)
                                : _mm512_dpbusd_epi32(sums[r][b], four, values);
        }
      }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) _mm512_storeu_si512(out + r * out_row + b * kLanes, sums[r][b]);
}
#endif

}  // namespace
