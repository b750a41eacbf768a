// Attention over codes of any width and layout: a block of 64 tokens at a time is written out as floats, which all query
// heads of the kv head then meet. The streams of a vector lie one behind the other, as if it were one vector.
//
// Keys are written as rows of tokens, values as rows of dimensions, so that no sum goes across lanes. Tied keys follow
// from values. Most of their channels do not turn with the position: these the query meets in the frame of the codes.
// Those that turn are taken out of the frame, weighted and turned, and lie behind the value as more of its dimensions.
#pragma once

#include "attention.hpp"
#include "code_rows.hpp"

namespace {

constexpr int64_t kCodeStretches = 16;     // of a head at most
constexpr int64_t kCodeShareTokens = 256;  // times kv heads; below it one thread is faster

// to[r, c] = sum_i x[r, i] * m[i, c] for R rows.
template <int R>
void multiply_rows(const float* x, int64_t x_row, int64_t inner, const float* m, int64_t columns, float* to) {
  for (int64_t c = 0; c < columns; c += 2 * W) {
    const int64_t n = smaller(2 * W, columns - c);
    Floats sums[R][2] = {};
    for (int64_t i = 0; i < inner; ++i) {
      const float* row = m + i * columns + c;
      Floats a = read(row, n), b = n > W ? read(row + W, n - W) : Floats{};
      for (int r = 0; r < R; ++r) sums[r][0] += x[r * x_row + i] * a, sums[r][1] += x[r * x_row + i] * b;
    }
    for (int r = 0; r < R; ++r) {
      write(to + r * columns + c, sums[r][0], n);
      if (n > W) write(to + r * columns + c + W, sums[r][1], n - W);
    }
  }
}

inline void multiply(const float* x, int64_t x_row, int64_t rows, int64_t inner, const float* m, int64_t columns, float* to) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) multiply_rows<8>(x + r * x_row, x_row, inner, m, columns, to + r * columns);
  for (; r + 2 <= rows; r += 2) multiply_rows<2>(x + r * x_row, x_row, inner, m, columns, to + r * columns);
  if (r < rows) multiply_rows<1>(x + r * x_row, x_row, inner, m, columns, to + r * columns);
}

// scores[r][token] = sum_i q[r][i] * k[i][token] for R queries.
template <int R>
void score_columns(const float* q, int64_t q_row, const float* k, int64_t depth, float (*scores)[kTile]) {
  constexpr int B = W == 16 ? 4 : 2;  // vectors of tokens at a time
  for (int first = 0; first < kTile; first += B * W) {
    Floats sums[R][B] = {};
    for (int64_t i = 0; i < depth; ++i)
      for (int b = 0; b < B; ++b) {
        Floats keys = load<Floats>(k + i * kTile + first + b * W);
        for (int r = 0; r < R; ++r) sums[r][b] += keys * q[r * q_row + i];
      }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) store(scores[r] + first + b * W, sums[r][b]);
  }
}

class StreamsRun {
 public:
  explicit StreamsRun(const sparing::StreamsAttention& a)
      : a(a), group(a.heads / a.kv_heads), is_tied(a.tied.q), turned(is_tied ? a.tied.a_out * a.tied.b_out : 0),
        depth(total(a.keys, a.key_streams) + round_up(turned, kLanes)), size(total(a.values, a.value_streams)),
        row(is_tied ? depth : size) {
    const int64_t queries = a.tokens * group <= kRows ? a.tokens : greater(1, kRows / group);
    const int64_t blocks = (a.tokens + queries - 1) / queries, most = blocks == 1 ? kCodeStretches : 1;
    const int64_t step = round_up((a.n + most - 1) / most, 2 * kTile), stretches = (a.n + step - 1) / step;
    Parts parts(a.kv_heads * blocks, stretches, queries * group, size);
    // Heads in turn over the same stretch: they read the same rows of a table of rotations.
    sparing::share(a.kv_heads * blocks * stretches, a.kv_heads * a.n > kCodeShareTokens ? a.threads : 1, [&](int64_t i) {
      const int64_t part = i % (a.kv_heads * blocks), stretch = i / (a.kv_heads * blocks), first = part / a.kv_heads * queries;
      run(part % a.kv_heads, first, smaller(queries, a.tokens - first), stretch * step, smaller(a.n, (stretch + 1) * step),
          parts, part, stretch);
    });
    for (int64_t part = 0; part < a.kv_heads * blocks; ++part) {
      const int64_t first = part / a.kv_heads * queries, rows = smaller(queries, a.tokens - first) * group;
      for (int64_t r = 0; r < rows; ++r) {
        const Running all = parts.merge(part, r);
        const int64_t query = number(part % a.kv_heads, first, r);
        const float* mixed = parts.sums(part, 0, r);
        for (int64_t s = 0; s < a.value_streams; mixed += round_up(a.values[s].dims, kLanes), ++s)
          memcpy(a.values[s].vectors + query * a.values[s].dims, mixed, a.values[s].dims * sizeof(float));
        a.lse[query] = all.top + __builtin_logf(all.total);
      }
    }
  }

 private:
  sparing::StreamsAttention a;
  int64_t group;
  bool is_tied;
  int64_t turned, depth, size, row;  // numbers of the channels that turn, a query, a mix, and a row of a block of values

  static int64_t total(const sparing::CodeStream* streams, int64_t count) {
    int64_t all = 0;
    for (int64_t s = 0; s < count; ++s) all += round_up(streams[s].dims, kLanes);
    return all;
  }

  // Which of the queries row `r` of a kv head is, counted from query `first` on.
  int64_t number(int64_t head, int64_t first, int64_t r) const {
    return (first + r / group) * a.heads + head * group + r % group;
  }

  // `tokens` queries from `first` on meet the tokens low..high - 1.
  void run(int64_t head, int64_t first, int64_t tokens, int64_t low, int64_t high, Parts& parts, int64_t part,
           int64_t stretch) {
    const int64_t rows = tokens * group;
    const int64_t sizes[4] = {rows * depth, kTile * row, is_tied ? kTile * turned : kTile * depth,
                              is_tied ? a.tied.a_out * kTile * a.tied.b : 0};
    int64_t all = 0;
    for (int64_t n : sizes) all += round_up(n, 16);
    float* q = static_cast<float*>(aligned_alloc(64, all * sizeof(float)));
    float* v = q + round_up(sizes[0], 16);
    float* k = v + round_up(sizes[1], 16);  // tied: the channels that turn, before they do
    float* between = k + round_up(sizes[2], 16);
    memset(q, 0, sizes[0] * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t query = number(head, first, r);
      float* to = q + r * depth;
      for (int64_t s = 0; s < a.key_streams; to += round_up(a.keys[s].dims, kLanes), ++s)
        memcpy(to, a.keys[s].vectors + query * a.keys[s].dims, a.keys[s].dims * sizeof(float));
      if (is_tied) memcpy(to, a.tied.q + query * turned, turned * sizeof(float));
      parts.clear(parts.sums(part, stretch, r));
    }
    const TiedKeys<float> tied(a.tied.keys, head, a.n, turned, turned);
    for (int64_t at = low; at < high; at += kTile) {
      const int count = int(smaller(kTile, high - at));
      float* to = v;
      for (int64_t s = 0; s < a.value_streams; to += round_up(a.values[s].dims, kLanes), ++s)
        write_block<false>(a.values[s], a.has_half_scales, head, at / kTile, to, row);
      if (is_tied) {
        take_out(head, v, count, between, k);
        tied.make(k, at, count, v + size, row, row - size);
      } else {
        float* keys = k;
        for (int64_t s = 0; s < a.key_streams; keys += round_up(a.keys[s].dims, kLanes) * kTile, ++s)
          write_block<true>(a.keys[s], a.has_half_scales, head, at / kTile, keys, kTile);
      }
      for (int64_t r = 0; r < rows; r += 4) {
        float* sums = parts.sums(part, stretch, r);
        switch (rows - r) {
          case 1: meet<1>(q + r * depth, k, v, at, count, head, first, r, parts, sums); break;
          case 2: meet<2>(q + r * depth, k, v, at, count, head, first, r, parts, sums); break;
          case 3: meet<3>(q + r * depth, k, v, at, count, head, first, r, parts, sums); break;
          default: meet<4>(q + r * depth, k, v, at, count, head, first, r, parts, sums);
        }
      }
    }
    free(q);
  }

  // The channels of `count` values that turn with the position, [count, turned].
  void take_out(int64_t head, const float* v, int count, float* between, float* to) const {
    const sparing::TiedCodes& t = a.tied;
    const float* right = t.right + head * t.right_head;
    if (t.a == 1) return multiply(v, row, count, t.b, right, t.b_out, to);
    for (int i = 0; i < count; ++i) multiply(t.left, t.a, t.a_out, t.a, v + i * row, t.b, between + i * t.a_out * t.b);
    multiply(between, t.b, count * t.a_out, t.b, right, t.b_out, to);
  }

  // R rows, from row `r` on, meet a block. Not inlined: see `AttentionRun::rows`.
  template <int R>
  __attribute__((noinline)) void meet(const float* q, const float* k, const float* v, int64_t at, int count, int64_t head,
                                      int64_t first, int64_t r, Parts& parts, float* sums) {
    alignas(64) float scores[R][kTile];
    float factors[R];
    if (is_tied)
      score<float, R>(q, depth, v, row, count, depth, scores, nullptr, 0, 0);
    else
      score_columns<R>(q, depth, k, depth, scores);
    for (int i = 0; i < R; ++i) {
      const float* bias = a.bias ? a.bias + number(head, first, r + i) * a.n + at : nullptr;
      for (int j = 0; j < kTile; ++j)
        scores[i][j] = j < count ? scores[i][j] * a.scale + (bias ? bias[j] : 0) : kNothing;
      factors[i] = parts.state(sums + i * parts.step()).template take<false>(scores[i]);
    }
    Mix<float>::run<R>(scores, factors, v, row, count, size, sums, parts.step(), nullptr, 0);
  }
};

void code_streams(const sparing::StreamsAttention& a) { StreamsRun run{a}; }

}  // namespace
