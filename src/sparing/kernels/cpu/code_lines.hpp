// Products of codes with vectors: 16 lanes of codes [16, depth] times x [depth], for several x at once.
//
// Lanes are tokens and depth a head's dimensions (keys), or lanes are dimensions and depth 64 tokens (values); the bytes
// are laid out alike (kernels/code_layout.py), so that no sum ever goes across lanes. `bytes` are the codes of 16 lanes: the
// plane of 4 bits, or of 2 bits and then, for 3 bits, one word of 64 signs for each four depths.
#pragma once

#include "simd.hpp"

namespace {

constexpr int kLanes = 16;
// Runs of 16 lanes that products of bytes take at a time: with 4 rows as many sums as registers hold.
#if defined(__AVX512F__)
constexpr int kRunsAtOnce = 4, kGroupsAtOnce = 2;
#else
constexpr int kRunsAtOnce = 1, kGroupsAtOnce = 1;
#endif

template <int bits>
struct Planes {
  static constexpr int width = bits == 4 ? 4 : 2;  // of the first plane
  static constexpr int fields = 8 / width;         // of it in a byte
  static constexpr bool has_signs = bits == 3;
  static constexpr int64_t lines(int64_t depth) { return depth / (4 * fields); }  // of the first plane of 16 lanes
  static constexpr int64_t bytes(int64_t depth) { return depth * kLanes * bits / 8; }  // of 16 lanes
  static const uint8_t* signs(const uint8_t* bytes, int64_t depth) { return bytes + depth * kLanes * width / 8; }
  // What the first plane indexes, repeated up to 16 entries: a lookup reads four bits, whatever they hold.
  static void table(const float* centroids, float* to) {
    for (int i = 0; i < 16; ++i) to[i] = centroids[(has_signs ? 4 : 0) + i % (1 << width)];
  }
  // The centroid that the first plane's field and, above it, the sign say together.
  static int centroid(int index) {
    int i = index % (1 << bits);
    return !has_signs ? i : i < 4 ? 4 + i : 7 - i;
  }
};

// W numbers of float16 as floats.
inline Floats from_halves(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps(load<__m128i>(p));
#else
  Floats v;
  for (int i = 0; i < W; ++i) {
    uint32_t sign = uint32_t(p[i] & 0x8000) << 16, rest = p[i] & 0x7fff;
    uint32_t bits = (rest << 13) + ((rest < 0x7c00 ? 112u : 224u) << 23);  // infinity and NaN keep the largest exponent
    float size;
    memcpy(&size, &bits, 4);
    if (rest < 0x400) size = float(rest) * 5.9604645e-8f;  // below the normal numbers
    v[i] = sign ? -size : size;
  }
  return v;
#endif
}

// `count` scales, a multiple of 16, from number `at` on.
inline void read_scales(const void* from, bool are_halves, int64_t at, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += W)
    store(to + i, are_halves ? from_halves(static_cast<const uint16_t*>(from) + at + i)
                             : load<Floats>(static_cast<const float*>(from) + at + i));
}

// table[index % period] for each lane; a table of less than 16 entries repeats them up to 16.
template <int period>
inline Floats lookup(const float* table, Words index) {
#if defined(__AVX512F__)
  if (period <= 16) return (Floats)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
  __m512 of_32[period / 32 + 1];  // what each stretch of 32 entries says
  for (int i = 0; i < period / 32; ++i)
    of_32[i] = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32 * i), (__m512i)index, _mm512_loadu_ps(table + 32 * i + 16));
  for (int n = period / 32, bit = 5; n > 1; n /= 2, ++bit) {
    __mmask16 is_set = _mm512_test_epi32_mask((__m512i)index, _mm512_set1_epi32(1 << bit));
    for (int i = 0; i < n / 2; ++i) of_32[i] = _mm512_mask_blend_ps(is_set, of_32[2 * i], of_32[2 * i + 1]);
  }
  return (Floats)of_32[0];
#elif defined(__AVX2__)
  if (period > 16) return (Floats)_mm256_i32gather_ps(table, (__m256i)(index & (period - 1)), 4);
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  if (period <= 8) return (Floats)low;
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
  return (Floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps((__m256i)(index << 28)));
#else
  Floats v;
  for (int i = 0; i < W; ++i) v[i] = table[index[i] & (period < 16 ? 15 : period - 1)];
  return v;
#endif
}

// The signs of W lanes, from lane `first` of 16 on, in the plane of one bit.
class LaneSigns {
 public:
  explicit LaneSigns(int first) {
    for (int i = 0; i < W; ++i) up[i] = 28 - 4 * ((first + i) % 8), is_late[i] = first + i < 8 ? 0 : -1;
  }
  // Of four depths, in the four highest bits of each lane.
  Words four(const uint8_t* signs) const {
    uint32_t halves[2];
    memcpy(halves, signs, 8);
    return (Words)pick(is_late, (Floats)(Words{} + halves[1]), (Floats)(Words{} + halves[0])) << up;
  }
  // x with the sign of depth j of `four`.
  static Floats give(Floats x, Words four, int j) { return (Floats)((Words)x ^ ((four << (3 - j)) & 0x80000000u)); }

 private:
  Words up{};      // brings the four bits to the top
  Ints is_late{};  // lanes whose bits are in the upper half of their word
};

// Lines that are needed soon, asked for evenly during some number of steps.
class Ask {
 public:
  Ask(const uint8_t* at, int64_t bytes, int64_t steps)
      : at(at), end(at + bytes), step(round_up((bytes + steps - 1) / steps, 64)) {}
  void some() {
    for (const uint8_t* until = at + step < end ? at + step : end; at < until; at += 64) prefetch(at);
  }

 private:
  const uint8_t *at, *end;
  int64_t step;
};

// out[r * out_row + lane] = sum_i table[code[lane, i]] * x[r * x_row + i] in float, for R rows of x, over `blocks` blocks,
// each of `depth` and `block_step` bytes after the one before.
template <int bits, int R>
void dot_lines(const uint8_t* bytes, int64_t block_step, int64_t blocks, int64_t depth, const float* table,
               const float* x, int64_t x_row, Ask& ask, float* out, int64_t out_row) {
  using P = Planes<bits>;
  for (int first = 0; first < kLanes; first += W) {
    Floats sums[R][2] = {};
    const LaneSigns lane_signs(first);
    const uint8_t* codes = bytes;
    const float* numbers = x;
    for (int64_t block = 0; block < blocks; ++block, codes += block_step) {
      const uint8_t* signs = P::signs(codes, depth);
      for (int64_t g = 0; g < P::lines(depth); ++g) {
        if (first == 0) ask.some();
        Words line = load<Words>(codes + g * 64 + first * 4);
        for (int f = 0; f < P::fields; ++f, numbers += 4) {
          Words four = P::has_signs ? lane_signs.four(signs + (g * P::fields + f) * 8) : Words{};
          for (int j = 0; j < 4; ++j) {
            Floats values = lookup<1 << P::width>(table, line >> (8 * j + P::width * f));
            if (P::has_signs) values = LaneSigns::give(values, four, j);
            for (int r = 0; r < R; ++r) sums[r][j % 2] += values * numbers[r * x_row + j];
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) store(out + r * out_row + first, sums[r][0] + sums[r][1]);
  }
}

}  // namespace
