// Attention over codes of any width and layout: a block of 64 tokens at a time is written out as numbers, which all query
// heads of the kv head then meet. The parts of a vector lie one after the other, as if it were one vector.
//
// Keys are written as rows of tokens, values as rows of dimensions, so that no sum goes across lanes. Tied keys follow
// from values. Most of their channels do not turn with the position: these the query meets in the frame of the codes.
// Those that turn are taken out of the frame, weighted and turned, and follow the value as more of its dimensions.
#pragma once

#include "attention.hpp"
#include "code_rows.hpp"

namespace {

constexpr int64_t kCodeStretches = 16;     // of a head at most
constexpr int64_t kCodeShareTokens = 256;  // times kv heads; below it one thread is faster

// to[r, c] = sum_i x[r, i] * m[i, c] for R rows, and the columns of up to N vectors from m on: all of them if is_full.
template <int R, int N, bool is_full, class X, class M>
inline void multiply_columns(const X* x, int64_t x_row, int64_t inner, const M* m, int64_t m_row, int64_t columns,
                             float* to, int64_t to_row) {
  Floats sums[R][N] = {};
  for (int64_t i = 0; i < inner; ++i)
    for (int v = 0; v < N; ++v) {
      Floats row = is_full ? read(m + i * m_row + v * W) : read(m + i * m_row, columns);
      for (int r = 0; r < R; ++r) sums[r][v] += widen(x[r * x_row + i]) * row;
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) write(to + r * to_row + v * W, sums[r][v], is_full ? W : columns);
}

template <int R, class X, class M>
void multiply_rows(const X* x, int64_t x_row, int64_t inner, const M* m, int64_t columns, float* to) {
  int64_t c = 0;
  for (; c + 2 * W <= columns; c += 2 * W)
    multiply_columns<R, 2, true>(x, x_row, inner, m + c, columns, 0, to + c, columns);
  for (; c + W <= columns; c += W) multiply_columns<R, 1, true>(x, x_row, inner, m + c, columns, 0, to + c, columns);
  if (c < columns) multiply_columns<R, 1, false>(x, x_row, inner, m + c, columns, columns - c, to + c, columns);
}

// The same for any number of rows, 8 sums of two vectors at a time where there are as many registers.
template <class X, class M>
void multiply(const X* x, int64_t x_row, int64_t rows, int64_t inner, const M* m, int64_t columns, float* to) {
  constexpr int R = W == 16 ? 8 : 4;
  int64_t r = 0;
  for (; r + R <= rows; r += R) multiply_rows<R>(x + r * x_row, x_row, inner, m, columns, to + r * columns);
  for (; r + 4 <= rows; r += 4) multiply_rows<4>(x + r * x_row, x_row, inner, m, columns, to + r * columns);
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

// T: of values that are written out, and of the queries that meet them, if keys are tied.
template <class T, bool is_tied>
class PartsRun {
 public:
  explicit PartsRun(const sparing::PartsAttention& a)
      : a(a), group(a.heads / a.kv_heads), turned(is_tied ? a.tied.a_out * a.tied.b_out : 0),
        depth(total(a.keys) + round_up(turned, kLanes)), size(total(a.values)),
        q_row(round_up(depth, Line<T>::size)), row((is_tied ? depth : size) + 64 / int64_t(sizeof(T))) {
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
        int64_t before = 0;
        for (int64_t s = 0; s < a.values.count; before += round_up(a.values.data[s].dims, kLanes), ++s)
          write_out(mixed, before, a.values.data[s].dims, a.values.data[s].vectors + query * a.values.data[s].dims);
        a.lse[query] = all.top + __builtin_logf(all.total);
      }
    }
  }

 private:
  sparing::PartsAttention a;
  // group, and numbers of the channels that turn, a query, a mix, and between rows of queries and of a block of values.
  int64_t group, turned, depth, size, q_row, row;

  static int64_t total(const sparing::List<sparing::CodePart>& parts) {
    int64_t all = 0;
    for (int64_t s = 0; s < parts.count; ++s) all += round_up(parts.data[s].dims, kLanes);
    return all;
  }

  static void take_over(const float* from, int64_t n, T* to) {
    for (int64_t i = 0; i < n; i += W) write(to + i, read(from + i, n - i), n - i);
  }

  // Numbers `from` up to from + n of a mix, whose order is that of Mix<T>.
  static void write_out(const float* mixed, int64_t from, int64_t n, float* to) {
    for (int64_t j = from / Mix<T>::N * Mix<T>::N; j < from + n; j += Mix<T>::N)
      for (int p = 0; p < Line<T>::parts; ++p)
        for (int lane = 0; lane < W; ++lane) {
          int64_t place = j + Mix<T>::place(p, lane) - from;
          if (place >= 0 && place < n) to[place] = mixed[j + p * W + lane];
        }
  }

  // Which of the queries row `r` of a kv head is, counted from query `first` on.
  int64_t number(int64_t head, int64_t first, int64_t r) const {
    return (first + r / group) * a.heads + head * group + r % group;
  }

  // `tokens` queries from `first` on meet the tokens low..high - 1.
  void run(int64_t head, int64_t first, int64_t tokens, int64_t low, int64_t high, Parts& parts, int64_t part,
           int64_t stretch) {
    const int64_t rows = tokens * group;
    const int64_t sizes[4] = {rows * q_row, kTile * row, is_tied ? kTile * turned : kTile * depth,
                              is_tied ? a.tied.a_out * kTile * a.tied.b : 0};
    int64_t all = 0;
    for (int64_t n : sizes) all += round_up(n, 16);
    float* memory = static_cast<float*>(aligned_alloc(64, all * sizeof(float)));
    T *q = reinterpret_cast<T*>(memory), *v = reinterpret_cast<T*>(memory + round_up(sizes[0], 16));
    float* k = memory + round_up(sizes[0], 16) + round_up(sizes[1], 16);  // tied: the channels that turn, before they do
    float* between = k + round_up(sizes[2], 16);
    memset(q, 0, sizes[0] * sizeof(T));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t query = number(head, first, r);
      T* to = q + r * q_row;
      for (int64_t s = 0; s < a.keys.count; to += round_up(a.keys.data[s].dims, kLanes), ++s)
        take_over(a.keys.data[s].vectors + query * a.keys.data[s].dims, a.keys.data[s].dims, to);
      if (is_tied) take_over(a.tied.q + query * turned, turned, to);
      parts.clear(parts.sums(part, stretch, r));
    }
    const TiedKeys<float> tied(a.tied.keys, head, turned);
    for (int64_t at = low; at < high; at += kTile) {
      const int count = int(smaller(kTile, high - at));
      T* to = v;
      for (int64_t s = 0; s < a.values.count; to += round_up(a.values.data[s].dims, kLanes), ++s)
        write_block<false>(a.values.data[s], a.has_half_scales, head, at / kTile, to, row);
      if (is_tied) {
        take_out(head, v, count, between, k);
        tied.make(k, turned, a.tied.where, at, count, v + size, row, depth - size);
      } else {
        float* keys = k;
        for (int64_t s = 0; s < a.keys.count; keys += round_up(a.keys.data[s].dims, kLanes) * kTile, ++s)
          write_block<true>(a.keys.data[s], a.has_half_scales, head, at / kTile, keys, kTile);
      }
      for (int64_t r = 0; r < rows; r += 4) {
        float* sums = parts.sums(part, stretch, r);
        switch (rows - r) {
          case 1: meet<1>(q + r * q_row, k, v, at, count, head, first, r, parts, sums); break;
          case 2: meet<2>(q + r * q_row, k, v, at, count, head, first, r, parts, sums); break;
          case 3: meet<3>(q + r * q_row, k, v, at, count, head, first, r, parts, sums); break;
          default: meet<4>(q + r * q_row, k, v, at, count, head, first, r, parts, sums);
        }
      }
    }
    free(memory);
  }

  // The channels of `count` values that turn with the position, [count, turned].
  void take_out(int64_t head, const T* v, int count, float* between, float* to) const {
    const sparing::TiedCodes& t = a.tied;
    const float* right = t.right + head * t.right_head;
    // L X R for X [a, b], the value's parts: X R at once for all tokens where there is one part, else L X a token at a time,
    // and then all of it times R.
    if (t.a == 1) return multiply(v, row, count, t.b, right, t.b_out, to);
    for (int i = 0; i < count; ++i) multiply(t.left, t.a, t.a_out, t.a, v + i * row, t.b, between + i * t.a_out * t.b);
    multiply(between, t.b, count * t.a_out, t.b, right, t.b_out, to);
  }

  // R rows, from row `r` on, meet a block. Not inlined: see `AttentionRun::rows`.
  template <int R>
  __attribute__((noinline)) void meet(const T* q, const float* k, const T* v, int64_t at, int count, int64_t head,
                                      int64_t first, int64_t r, Parts& parts, float* sums) {
    alignas(64) float scores[R][kTile];
    float factors[R];
    if constexpr (is_tied)
      score<T, R>(q, q_row, v, row, count, depth, scores, nullptr, 0, 0);
    else
      score_columns<R>(q, q_row, k, depth, scores);
    for (int i = 0; i < R; ++i) {
      const float* bias = a.bias ? a.bias + number(head, first, r + i) * a.n + at : nullptr;
      for (int j = 0; j < kTile; ++j)
        scores[i][j] = j < count ? scores[i][j] * a.scale + (bias ? bias[j] : 0) : kNothing;
      factors[i] = parts.state(sums + i * parts.step()).template take<Mix<T>::is_narrow>(scores[i]);
    }
    Mix<T>::template run<R>(scores, factors, v, row, count, size, sums, parts.step(), nullptr, 0);
  }
};

void code_parts(const sparing::PartsAttention& a) {
#if defined(__AVX512BF16__)
  if (a.tied.q && !a.is_exact) return void(PartsRun<bf16, true>{a});
#endif
  a.tied.q ? void(PartsRun<float, true>{a}) : void(PartsRun<float, false>{a});
}

}  // namespace
