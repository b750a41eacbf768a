// Attention over codes: a span of some blocks of 64 tokens at a time, scores from the codes of keys, online
// softmax, and sums over the codes of values, all in the rotated frames. Nothing is decoded to memory.
//
// Two ways on the same bytes. Exact: centroids are looked up as floats. In bytes (AVX-512 VNNI, AVX2): queries become
// signed bytes, weights two planes of unsigned ones, centroids signed bytes; relative error of scores 0.7 %, of a mix
// 0.4 %. There arithmetic, not memory, is what a token costs, so each look-up serves all rows that read the kv head, and
// what is done once for a span (the largest score, one factor for all that was added up before) costs little.
#pragma once

#include "code_bytes.hpp"
#include "kernels.hpp"
#include "softmax.hpp"
#include "threads.hpp"

namespace {

constexpr int kSpan = 4 * kTile;       // tokens whose values are added up in one go
constexpr int64_t kStretches = 16;     // of a head at most; a whole number of pairs of spans each
constexpr int64_t kShareTokens = 256;  // times kv heads; below it one thread is faster

template <int k_bits, int v_bits, bool is_exact>
class CodesRun {
 public:
  explicit CodesRun(const sparing::CodesAttention& a)
      : a(a),
        group(a.heads / a.kv_heads),
        rows(a.tokens * group),
        depth(round_up(a.d, kLanes)),
        size(round_up(a.dv, kLanes)),
        k_block(Planes<k_bits>::bytes(depth) * (kTile / kLanes)),
        v_block(Planes<v_bits>::bytes(kTile) * (size / kLanes)),
        stretch_tokens(round_up((a.n + kStretches - 1) / kStretches, 2 * kSpan)),
        stretches((a.n + stretch_tokens - 1) / stretch_tokens),
        parts(a.kv_heads, stretches, rows, a.dv) {
    prepare();
    sparing::share(a.kv_heads * stretches, a.kv_heads * a.n > kShareTokens ? a.threads : 1,
                   [this](int64_t i) { stretch(i / stretches, i % stretches); });
    for (int64_t head = 0; head < a.kv_heads; ++head)
      for (int64_t r = 0; r < rows; ++r) {
        Running all = parts.merge(head, r);
        int64_t query = number(head, r);
        memcpy(a.out + query * a.dv, parts.sums(head, 0, r), a.dv * sizeof(float));
        a.lse[query] = all.top + __builtin_logf(all.total);
      }
    free(q);
    free(steps);
    free(start);
  }

 private:
  // A span: tokens that exist, whole blocks that hold them, and their scales, 0 after the last token.
  struct Span {
    int64_t head, stretch, first, count, blocks;
    alignas(64) float k_scale[kSpan], v_scale[kSpan];
    float v_step;  // in bytes: the unit of v_scale, times the step of centroids
  };

  sparing::CodesAttention a;
  int64_t group, rows, depth, size, k_block, v_block, stretch_tokens, stretches;
  Parts parts;
  float* q;        // [kv_heads, rows, depth], padded with zeros; in bytes the first quarter of each row
  float* steps;    // [kv_heads, rows]: factor on what the products of keys and queries, and scales of keys, give
  int32_t* start;  // [kv_heads, rows]: in bytes, what undoes the shift of centroids
  alignas(64) float k_table[16], v_table[16];
#if defined(__AVX2__)
  ByteTable k_bytes, v_bytes;
#endif

  // Which of the queries a row of a kv head is.
  int64_t number(int64_t head, int64_t row) const { return row / group * a.heads + head * group + row % group; }

  void prepare() {
    Planes<k_bits>::table(a.k_centroids, k_table);
    Planes<v_bits>::table(a.v_centroids, v_table);
#if defined(__AVX2__)
    if (!is_exact) {
      k_bytes = ByteTable::make<k_bits>(a.k_centroids, true);
      v_bytes = ByteTable::make<v_bits>(a.v_centroids, false);
    }
#endif
    q = static_cast<float*>(calloc(a.kv_heads * rows * depth, sizeof(float)));
    steps = static_cast<float*>(calloc(a.kv_heads * rows, sizeof(float)));
    start = static_cast<int32_t*>(calloc(a.kv_heads * rows, sizeof(int32_t)));
    for (int64_t head = 0; head < a.kv_heads; ++head)
      for (int64_t r = 0; r < rows; ++r) {
        float* to = q + (head * rows + r) * depth;
        memcpy(to, a.q + number(head, r) * a.d, a.d * sizeof(float));
        steps[head * rows + r] = a.scale;
#if defined(__AVX2__)
        if (!is_exact) to_bytes(to, steps + head * rows + r, start + head * rows + r);
#endif
      }
  }

  void stretch(int64_t head, int64_t s) {
    for (int64_t r = 0; r < rows; ++r) parts.clear(parts.sums(head, s, r));
    int64_t end = smaller(a.n, (s + 1) * stretch_tokens);
    Span span;
    span.head = head, span.stretch = s;
    for (span.first = s * stretch_tokens; span.first < end; span.first += kSpan) {
      span.count = smaller(kSpan, end - span.first);
      span.blocks = (span.count + kTile - 1) / kTile;
      scales(a.k_scale, head * a.k_scale_head, span, span.k_scale);
      scales(a.v_scale, head * a.v_scale_head, span, span.v_scale);
#if defined(__AVX2__)
      if (!is_exact) to_planes(span);
#endif
      for (int64_t r = 0; r < rows; r += 4) switch (rows - r) {
          case 1: meet<1>(span, r); break;
          case 2: meet<2>(span, r); break;
          case 3: meet<3>(span, r); break;
          default: meet<4>(span, r);
        }
    }
  }

  void scales(const void* from, int64_t head, const Span& span, float* to) {
    read_scales(from, a.has_half_scales, head + span.first, span.blocks * kTile, to);
    for (int64_t i = span.count; i < span.blocks * kTile; ++i) to[i] = 0;
  }

#if defined(__AVX2__)
  // Scales of values in units of which the largest is kMostWeight: a weight is at most 1, and a whole number of them.
  // One that is not finite gives a step that is not.
  void to_planes(Span& span) {
    Floats most{}, not_finite{};
    for (int64_t i = 0; i < span.blocks * kTile; i += W) {
      Floats scale = load<Floats>(span.v_scale + i);
      most = larger(scale, most);
      not_finite += 0 * scale;
    }
    float all = largest(most), up = all > 0 ? kMostWeight / all : 0;
    for (int64_t i = 0; i < span.blocks * kTile; i += W) store(span.v_scale + i, load<Floats>(span.v_scale + i) * up);
    span.v_step = all / kMostWeight * v_bytes.step + sum(not_finite);
  }

  // Replaces a query by signed bytes, in place. A query that is not finite gives a step that is not.
  void to_bytes(float* numbers, float* step, int32_t* start) {
    Floats most{}, not_finite{};
    for (int64_t i = 0; i < depth; i += W) {
      Floats x = load<Floats>(numbers + i);
      most = larger(larger(x, -x), most);
      not_finite += 0 * x;
    }
    float all = largest(most), up = all > 0 ? 127 / all : 0;
    *step *= all / 127 * k_bytes.step + sum(not_finite);
    for (int64_t i = 0; i < depth; i += W) {
      Ints whole = to_nearest(load<Floats>(numbers + i) * up);
      // Centroids are shifted by kKeyShift to be unsigned, which adds kKeyShift * sum(q) to every product: taken off here.
      for (int j = 0; j < W; ++j) {
        reinterpret_cast<int8_t*>(numbers)[i + j] = int8_t(whole[j]);
        *start -= kKeyShift * int8_t(whole[j]);
      }
    }
  }
#endif

  // R rows, from `row` on, meet a span. What is read next is asked for on the way, for the first rows: the span's values
  // while its keys are read, and the next span's keys while its values are.
  template <int R>
  void meet(const Span& span, int64_t row) {
    const int64_t block = span.first / kTile;
    const uint8_t* k = a.k + span.head * a.k_head + block * k_block;
    const uint8_t* v = a.v + span.head * a.v_head + block * v_block;
    alignas(64) float scores[R][kSpan];
    Ask values(v, row ? 0 : span.blocks * v_block,
               span.blocks * Planes<k_bits>::lines(depth) * (kTile / kLanes) / (is_exact ? 1 : kRunsAtOnce));
    for (int64_t b = 0; b < span.blocks; ++b) score<R>(span, row, k + b * k_block, b * kTile, values, scores);
    alignas(64) uint8_t planes[2 * R][kSpan];  // of weights in bytes: the high part of each, then the low one
    float* sums = parts.sums(span.head, span.stretch, row);
    float keep[R], add[R];  // factors of what was added up before, and of what this span adds
    for (int r = 0; r < R; ++r) {
      const float* bias = a.bias ? a.bias + number(span.head, row + r) * a.n + span.first : nullptr;
      float step = steps[span.head * rows + row + r], total = 0, top = finish(span, scores[r], &step, bias);
      if (top == kNothing) {
        total = nan_of(scores[r], span.blocks * kTile);
        memset(scores[r], 0, sizeof scores[r]), memset(planes[2 * r], 0, 2 * kSpan);
      } else {
        total = weigh(span, step, top, scores[r], planes[2 * r]);
      }
      // Two softmaxes over disjoint tokens become one: each is relative to its own maximum, and both are scaled to the
      // larger of the two.
      Running& state = parts.state(sums + r * parts.step());
      float both = top > state.top ? top : state.top;
      keep[r] = exponential(state.top == both ? 0 : state.top - both);
      add[r] = exponential(top == both ? 0 : top - both);
      state = {both, state.total * keep[r] + total * add[r]};
    }
    Ask keys(k + span.blocks * k_block, row ? 0 : span.blocks * k_block,
             span.blocks * Planes<v_bits>::lines(kTile) * (size / kLanes) / (is_exact ? 1 : kGroupsAtOnce));
    mix<R>(span, scores, planes[0], keep, add, v, keys, sums);
  }

  // The scores of a block, still without their factor and bias, to `scores` from `at` on.
  template <int R>
  void score(const Span& span, int64_t row, const uint8_t* k, int64_t at, Ask& ask, float (*scores)[kSpan]) {
    constexpr int64_t kRuns = kTile / kLanes;
    const int64_t run = k_block / kRuns;
    const float* x = q + (span.head * rows + row) * depth;
#if defined(__AVX2__)
    if (!is_exact) {
      constexpr int B = kRunsAtOnce * kParts;
      for (int64_t i = 0; i < kRuns; i += kRunsAtOnce) {
        Ints sums[R][B];
        dot_bytes<k_bits, R, B, true>(k + i * run, 0, 1, depth, k_bytes, reinterpret_cast<const uint32_t*>(x), depth,
                                      start + span.head * rows + row, ask, sums);
        for (int b = 0; b < B; ++b) {
          int64_t token = at + i * kLanes + b * W;
          Floats scale = load<Floats>(span.k_scale + token);
          for (int r = 0; r < R; ++r)
            store(scores[r] + token, __builtin_convertvector(sums[r][b], Floats) * scale);
        }
      }
      return;
    }
#endif
    for (int64_t i = 0; i < kRuns; ++i)
      dot_lines<k_bits, R>(k + i * run, 0, 1, depth, k_table, x, depth, ask, scores[0] + at + i * kLanes, kSpan);
    for (int r = 0; r < R; ++r)
      for (int64_t i = at; i < at + kTile; i += W)
        store(scores[r] + i, load<Floats>(scores[r] + i) * load<Floats>(span.k_scale + i));
  }

  // Completes a row's scores except for the factor left in `step` (above 0), and returns the largest with it.
  float finish(const Span& span, float* scores, float* step, const float* bias) {
    const int64_t width = span.blocks * kTile;
    if (bias || !(*step > 0)) {
      for (int64_t i = 0; i < span.count; ++i) scores[i] = scores[i] * *step + (bias ? bias[i] : 0);
      *step = 1;
    }
    for (int64_t i = span.count; i < width; ++i) scores[i] = kNothing;
    Floats best = load<Floats>(scores);
    for (int64_t i = W; i < width; i += W) best = larger(best, load<Floats>(scores + i));
    float top = largest(best);
    return top == kNothing ? top : top * *step;
  }

  // Turns a row's scores into weights e^(step score - top), times the scales of values; returns the sum without these.
  float weigh(const Span& span, float step, float top, float* scores, uint8_t* planes) {
    Floats sums{};
#if defined(__AVX2__)
    if (!is_exact) {
      constexpr int64_t N = 4 * W;
      const float factor = step * 1.44269504f, shift = top * 1.44269504f;
      for (int64_t i = 0; i < span.blocks * kTile; i += N) {
        Ints whole[4];
        for (int j = 0; j < 4; ++j) {
          Floats weight = exp2_roughly(load<Floats>(scores + i + j * W) * factor - shift);
          sums += weight;
          whole[j] = to_nearest(weight * load<Floats>(span.v_scale + i + j * W));
        }
        store_planes(whole, planes + i, planes + kSpan + i);
      }
      return sum(sums);
    }
#endif
    (void)planes;
    for (int64_t i = 0; i < span.blocks * kTile; i += W) {
      Floats weight = exp(load<Floats>(scores + i) * step - top);
      sums += weight;
      store(scores + i, weight * load<Floats>(span.v_scale + i));
    }
    return sum(sums);
  }

  // sums[r] = sums[r] * keep[r] + add[r] * what the weights of this span give.
  template <int R>
  void mix(const Span& span, const float (*weights)[kSpan], const uint8_t* planes, const float* keep, const float* add,
           const uint8_t* v, Ask& ask, float* sums) {
    const int64_t run = Planes<v_bits>::bytes(kTile), groups = size / kLanes;
#if defined(__AVX2__)
    if (!is_exact) {
      int64_t i = 0;
      for (; i + kGroupsAtOnce <= groups; i += kGroupsAtOnce)
        mix_bytes<R, kGroupsAtOnce>(span, planes, keep, add, v + i * run, ask, sums + i * kLanes);
      for (; i < groups; ++i) mix_bytes<R, 1>(span, planes, keep, add, v + i * run, ask, sums + i * kLanes);
      return;
    }
#endif
    (void)planes;
    for (int64_t i = 0; i < groups; ++i) {
      alignas(64) float more[R][kLanes];
      dot_lines<v_bits, R>(v + i * run, v_block, span.blocks, kTile, v_table, weights[0], kSpan, ask, more[0], kLanes);
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < kLanes; j += W) {
          float* to = sums + r * parts.step() + i * kLanes + j;
          store(to, load<Floats>(to) * keep[r] + load<Floats>(more[r] + j) * add[r]);
        }
    }
  }

#if defined(__AVX2__)
  // `mix` for G runs of 16 dimensions: at most 16 sums at a time, as many registers as there are.
  template <int R, int G>
  void mix_bytes(const Span& span, const uint8_t* planes, const float* keep, const float* add, const uint8_t* v,
                 Ask& ask, float* sums) {
    constexpr int B = G * kParts, N = R % kWeightRows == 0 ? kWeightRows : R < kWeightRows ? R : 1;
    for (int first = 0; first < R; first += N) {
      Ints whole[2 * N][B];
      dot_bytes<v_bits, 2 * N, B, false>(v, v_block, span.blocks, kTile, v_bytes,
                                         reinterpret_cast<const uint32_t*>(planes + 2 * first * kSpan), kSpan / 4, nullptr,
                                         ask, whole);
      for (int r = first; r < first + N; ++r) {
        float step = add[r] * span.v_step;
        for (int b = 0; b < B; ++b) {
          // A weight was split into a high and a low byte, each with sums of its own.
          Ints both = (whole[2 * (r - first)][b] << kPlaneBits) + whole[2 * (r - first) + 1][b];
          float* to = sums + r * parts.step() + b * W;
          store(to, load<Floats>(to) * keep[r] + __builtin_convertvector(both, Floats) * step);
        }
      }
    }
  }
#endif
};

template <int k_bits, int v_bits>
void codes_of(const sparing::CodesAttention& a) {
#if defined(__AVX2__)
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
