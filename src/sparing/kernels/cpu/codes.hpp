// Attention over packed codes: a block of 64 tokens at a time, scores from the codes of keys, online softmax, and sums
// over the codes of values, all in the rotated frames. Nothing is decoded to memory.
//
// Two ways on the same bytes. Exact: centroids are looked up as floats. In bytes (AVX-512 VNNI): queries become signed
// bytes, weights two planes of unsigned ones, centroids signed bytes; relative error of scores 0.7 %, of a mix 0.4 %.
#pragma once

#include "code_lines.hpp"
#include "kernels.hpp"
#include "softmax.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kStretchBlocks = 8;
constexpr int64_t kShareTokens = 256;  // times kv heads; below it one thread is faster

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

template <int k_bits, int v_bits, bool is_exact>
class CodesRun {
 public:
  explicit CodesRun(const sparing::CodesAttention& a)
      : a(a),
        group(a.heads / a.kv_heads),
        rows(a.tokens * group),
        depth(round_up(a.d, kLanes)),
        size(round_up(a.dv, kLanes)),
        blocks((a.n + kTile - 1) / kTile),
        stretches((blocks + kStretchBlocks - 1) / kStretchBlocks),
        parts(a.kv_heads, stretches, rows, a.dv) {
    Planes<k_bits>::table(a.k_centroids, k_table);
    Planes<v_bits>::table(a.v_centroids, v_table);
#if defined(__AVX512VNNI__)
    k_bytes = ByteTables::make<k_bits>(a.k_centroids, true);
    v_bytes = ByteTables::make<v_bits>(a.v_centroids, false);
#endif
    sparing::share(a.kv_heads * stretches, a.kv_heads * a.n > kShareTokens ? a.threads : 1,
                   [this](int64_t i) { stretch(i / stretches, i % stretches); });
    for (int64_t head = 0; head < a.kv_heads; ++head)
      for (int64_t r = 0; r < rows; ++r) {
        Running all = parts.merge(head, r);
        int64_t query = r / group * a.heads + head * group + r % group;
        memcpy(a.out + query * a.dv, parts.sums(head, 0, r), a.dv * sizeof(float));
        a.lse[query] = all.top + __builtin_logf(all.total);
      }
  }

 private:
  sparing::CodesAttention a;
  int64_t group, rows, depth, size, blocks, stretches;
  Parts parts;
  alignas(64) float k_table[16], v_table[16];
#if defined(__AVX512VNNI__)
  ByteTables k_bytes, v_bytes;
#endif

  // One row's query, padded with zeros to whole lines: floats, or bytes with their step and their sum.
  struct Query {
    float step;
    int32_t sum;
  };

  void stretch(int64_t head, int64_t s) {
    float* q = static_cast<float*>(calloc(rows * depth, sizeof(float)));
    Query* queries = static_cast<Query*>(calloc(rows, sizeof(Query)));
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(q + r * depth, a.q + (r / group * a.heads + head * group + r % group) * a.d, a.d * sizeof(float));
      if (!is_exact) queries[r] = to_bytes(q + r * depth);
      parts.clear(parts.sums(head, s, r));
    }
    for (int64_t block = s * kStretchBlocks; block < smaller(blocks, (s + 1) * kStretchBlocks); ++block) {
      alignas(64) float k_scale[kTile], v_scale[kTile];
      scales(a.k_scale, head * a.k_scale_head, block, k_scale);
      scales(a.v_scale, head * a.v_scale_head, block, v_scale);
      const uint8_t* k = a.k + head * a.k_head + block * Planes<k_bits>::bytes(depth) * (kTile / kLanes);
      const uint8_t* v = a.v + head * a.v_head + block * Planes<v_bits>::bytes(kTile) * (size / kLanes);
      for (int64_t r = 0; r < rows; r += 4) switch (rows - r) {
#define ROWS(R) \
  tile<R>(head, s, block, r, q + r * depth, queries + r, k, v, k_scale, v_scale); \
  break;
          case 1: ROWS(1)
          case 2: ROWS(2)
          case 3: ROWS(3)
          default: ROWS(4)
#undef ROWS
        }
    }
    free(queries);
    free(q);
  }

  // The scales of a block as floats, 0 for what lies behind the last token.
  void scales(const void* from, int64_t head, int64_t block, float* to) {
    int64_t at = head + block * kTile;
    for (int i = 0; i < kTile; i += W)
      store(to + i, a.has_half_scales ? from_halves(static_cast<const uint16_t*>(from) + at + i)
                                      : load<Floats>(static_cast<const float*>(from) + at + i));
    for (int64_t i = a.n - block * kTile; i < kTile; ++i) to[i] = 0;
  }

  // Replaces a query by signed bytes, in place.
  Query to_bytes(float* q) {
    float largest = 0;
    for (int64_t i = 0; i < depth; ++i) largest = __builtin_fabsf(q[i]) > largest ? __builtin_fabsf(q[i]) : largest;
    Query query{largest / 127, 0};
    auto bytes = reinterpret_cast<int8_t*>(q);
    for (int64_t i = 0; i < depth; ++i) {
      float exact = largest > 0 ? q[i] / largest * 127 : 0;
      int value = int(exact < 0 ? exact - 0.5f : exact + 0.5f);
      bytes[i] = int8_t(value);
      query.sum += value;
    }
    return query;
  }

  template <int R>
  void tile(int64_t head, int64_t s, int64_t block, int64_t first_row, const float* q, const Query* queries,
            const uint8_t* k, const uint8_t* v, const float* k_scale, const float* v_scale) {
    alignas(64) float scores[R][kTile];
    score<R>(q, queries, k, scores);
    float factors[R];
    for (int r = 0; r < R; ++r) {
      int64_t row = first_row + r, query = row / group * a.heads + head * group + row % group;
      int count = int(smaller(kTile, a.n - block * kTile));
      for (int i = 0; i < kTile; i += W)
        store(scores[r] + i, load<Floats>(scores[r] + i) * load<Floats>(k_scale + i) * a.scale);
      if (a.bias)
        for (int i = 0; i < count; ++i) scores[r][i] += a.bias[query * a.n + block * kTile + i];
      for (int i = count; i < kTile; ++i) scores[r][i] = kNothing;
      factors[r] = parts.state(parts.sums(head, s, row)).template take<false>(scores[r]);
      for (int i = 0; i < kTile; i += W) store(scores[r] + i, load<Floats>(scores[r] + i) * load<Floats>(v_scale + i));
    }
    mix<R>(scores, factors, v, parts.sums(head, s, first_row));
  }

  template <int R>
  void score(const float* q, const Query* queries, const uint8_t* k, float (*scores)[kTile]) {
    constexpr int64_t kRuns = kTile / kLanes;
    const int64_t run = Planes<k_bits>::bytes(depth);
#if defined(__AVX512VNNI__)
    if (!is_exact) {
      alignas(64) int32_t sums[R][kTile];
      constexpr int B = R == 1 ? 4 : 2;  // enough sums to hide the latency of adding to them
      for (int64_t i = 0; i < kRuns; i += B)
        dot_bytes<k_bits, R, B, true>(k + i * run, depth, k_bytes, reinterpret_cast<const uint32_t*>(q), depth,
                                      sums[0] + i * kLanes, kTile, kRuns * run);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kTile; i += W) {
          Ints centred = load<Ints>(sums[r] + i) - 128 * queries[r].sum;
          store(scores[r] + i, __builtin_convertvector(centred, Floats) * (queries[r].step * k_bytes.step));
        }
      return;
    }
#endif
    (void)queries;
    for (int64_t i = 0; i < kRuns; ++i)
      dot_lines<k_bits, R>(k + i * run, depth, k_table, q, depth, scores[0] + i * kLanes, kTile, kRuns * run);
  }

  // sums[r] = sums[r] * factors[r] + what the weights of this block give.
  template <int R>
  void mix(const float (*weights)[kTile], const float* factors, const uint8_t* v, float* sums) {
    const int64_t run = Planes<v_bits>::bytes(kTile);
#if defined(__AVX512VNNI__)
    if (!is_exact) {
      alignas(64) uint8_t planes[2 * R][kTile];  // of a weight's 16 bits the high byte, then the low one
      float steps[R];
      for (int r = 0; r < R; ++r) {
        Floats best = load<Floats>(weights[r]);
        for (int i = W; i < kTile; i += W) best = larger(best, load<Floats>(weights[r] + i));
        float most = largest(best), up = most > 0 ? 65535 / most : 0;
        steps[r] = most / 65535 * v_bytes.step;
        for (int i = 0; i < kTile; i += W) {
          Words whole = __builtin_convertvector(load<Floats>(weights[r] + i) * up + 0.5f, Words);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(planes[2 * r] + i), _mm512_cvtepi32_epi8((__m512i)(whole >> 8)));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(planes[2 * r + 1] + i), _mm512_cvtepi32_epi8((__m512i)whole));
        }
      }
      for (int64_t i = 0; i < size; i += kLanes) {
        alignas(64) int32_t whole[2 * R][kLanes];
        dot_bytes<v_bits, 2 * R, 1, false>(v + i / kLanes * run, kTile, v_bytes,
                                           reinterpret_cast<const uint32_t*>(planes[0]), kTile / 4, whole[0], kLanes,
                                           size / kLanes * run);
        for (int r = 0; r < R; ++r) {
          Floats more = __builtin_convertvector(load<Ints>(whole[2 * r]) * 256 + load<Ints>(whole[2 * r + 1]), Floats);
          float* to = sums + r * parts.step() + i;
          store(to, load<Floats>(to) * factors[r] + more * steps[r]);
        }
      }
      return;
    }
#endif
    for (int64_t i = 0; i < size; i += kLanes) {
      alignas(64) float more[R][kLanes];
      dot_lines<v_bits, R>(v + i / kLanes * run, kTile, v_table, weights[0], kTile, more[0], kLanes, size / kLanes * run);
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < kLanes; j += W) {
          float* to = sums + r * parts.step() + i + j;
          store(to, load<Floats>(to) * factors[r] + load<Floats>(more[r] + j));
        }
    }
  }
};

template <int k_bits, int v_bits>
void codes_of(const sparing::CodesAttention& a) {
#if defined(__AVX512VNNI__)
  if (!a.is_exact) {
    CodesRun<k_bits, v_bits, false>{a};
    return;
  }
#endif
  CodesRun<k_bits, v_bits, true>{a};
}

void codes(const sparing::CodesAttention& a) {
  switch (a.k_bits * 10 + a.v_bits) {
    case 22: return codes_of<2, 2>(a);
    case 23: return codes_of<2, 3>(a);
    case 24: return codes_of<2, 4>(a);
    case 32: return codes_of<3, 2>(a);
    case 33: return codes_of<3, 3>(a);
    case 34: return codes_of<3, 4>(a);
    case 42: return codes_of<4, 2>(a);
    case 43: return codes_of<4, 3>(a);
    case 44: return codes_of<4, 4>(a);
  }
}

}  // namespace
