// Attention of few queries over cached keys and values, which are read once for all query heads of a kv head.
//
// A task is one kv head and one stretch of keys. It works in tiles of keys: scores, online softmax, weighted values.
// The parts of the stretches are merged by their largest scores.
#pragma once

#include "kernels.hpp"
#include "mix.hpp"
#include "softmax.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kStretch = 512;        // keys
constexpr int64_t kShareBytes = 128 << 10;  // of keys and values; below it one thread is faster

// Asks for 4 entries that are needed soon. The kernels read a tile of values across, and keys four at a time, which no
// hardware foresees; asking for a whole tile at once would stop the arithmetic instead of running beside it.
template <class T>
void ask(const T* entries, int64_t stride, int64_t size) {
  for (int i = 0; i < 4; ++i)
    for (int64_t j = 0; j < size; j += 64 / int64_t(sizeof(T))) prefetch(entries + i * stride + j);
}

// scores[r][i] = q[r] . k[i] for R queries (padded with zeros to whole lines) and `count` keys. Asks for values v.
template <class T, int R>
void score(const T* q, int64_t q_row, const T* k, int64_t k_key, int count, int64_t d, float (*scores)[kTile],
           const T* v, int64_t v_key, int64_t dv) {
  constexpr int N = Line<T>::size;
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    Floats sums[R][4] = {};
    const T* key = k + i * k_key;
    if (v) ask(v + i * v_key, v_key, dv);
    int64_t j = 0;
    for (; j + N <= d; j += N)
      for (int c = 0; c < 4; ++c) {
        Line<T> line = Line<T>::read(key + c * k_key + j);
        for (int r = 0; r < R; ++r) sums[r][c] = line.dot(Line<T>::read(q + r * q_row + j), sums[r][c]);
      }
    if (j < d)
      for (int c = 0; c < 4; ++c) {
        Line<T> line = Line<T>::read(key + c * k_key + j, int(d - j));
        for (int r = 0; r < R; ++r) sums[r][c] = line.dot(Line<T>::read(q + r * q_row + j), sums[r][c]);
      }
    for (int r = 0; r < R; ++r) sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], scores[r] + i);
  }
  for (; i < count; ++i) {
    Floats sums[R] = {};
    const T* key = k + i * k_key;
    for (int64_t j = 0; j < d; j += N) {
      Line<T> line = j + N <= d ? Line<T>::read(key + j) : Line<T>::read(key + j, int(d - j));
      for (int r = 0; r < R; ++r) sums[r] = line.dot(Line<T>::read(q + r * q_row + j), sums[r]);
    }
    for (int r = 0; r < R; ++r) scores[r][i] = sum(sums[r]);
  }
}

template <class T>
class AttentionRun {
 public:
  explicit AttentionRun(const sparing::Attention& a)
      : a(a),
        group(a.heads / a.kv_heads),
        rows(a.tokens * group),
        q_row(round_up(a.d, N)),
        low(a.causal && a.window ? greater(0, a.keys - a.tokens + 1 - a.window) : 0),
        stretches((a.keys - low + kStretch - 1) / kStretch),
        parts(a.kv_heads, stretches, rows, a.dv) {
    bool many = a.kv_heads * (a.keys - low) * (a.d + a.dv) * int64_t(sizeof(T)) >= kShareBytes;
    sparing::share(a.kv_heads * stretches, many ? a.threads : 1,
                   [this](int64_t i) { stretch(i / stretches, i % stretches); });
    for (int64_t head = 0; head < a.kv_heads; ++head)
      for (int64_t r = 0; r < rows; ++r) merge(head, r);
  }

 private:
  static constexpr int N = Line<T>::size;
  sparing::Attention a;
  int64_t group, rows, q_row, low, stretches;
  Parts parts;

  void stretch(int64_t head, int64_t s) {
    int64_t first = low + s * kStretch, last = smaller(first + kStretch, a.keys);
    // Queries of this kv head, row t * group + g, padded with zeros to whole lines.
    T* q = static_cast<T*>(calloc(rows * q_row, sizeof(T)));
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(q + r * q_row,
             static_cast<const T*>(a.q) + r / group * a.q_token + (head * group + r % group) * a.q_head,
             a.d * sizeof(T));
      parts.clear(parts.sums(head, s, r));
    }
    const T* k = static_cast<const T*>(a.k) + head * a.k_head;
    const T* v = static_cast<const T*>(a.v) + head * a.v_head;
    for (int64_t at = first; at < last; at += kTile) {
      int count = int(smaller(kTile, last - at));
      for (int64_t r = 0; r < rows; r += 4) switch (rows - r) {
#define ROWS(R) \
  tile<R>(q + r * q_row, k + at * a.k_key, v + at * a.v_key, at, count, parts.sums(head, s, r), r); \
  break;
          case 1: ROWS(1)
          case 2: ROWS(2)
          case 3: ROWS(3)
          default: ROWS(4)
#undef ROWS
        }
    }
    free(q);
  }

  template <int R>
  void tile(const T* q, const T* k, const T* v, int64_t at, int count, float* sums, int64_t first_row) {
    alignas(64) float scores[R][kTile];
    float factors[R];
    score<T, R>(q, q_row, k, a.k_key, count, a.d, scores, first_row ? nullptr : v, a.v_key, a.dv);
    for (int r = 0; r < R; ++r) {
      int64_t from = 0, to = count;  // of the tile, what the row sees
      if (a.causal) {
        int64_t position = a.keys - a.tokens + (first_row + r) / group;
        to = smaller(to, position + 1 - at);
        if (a.window) from = greater(0, position + 1 - a.window - at);
      }
      for (int i = 0; i < kTile; ++i) scores[r][i] = i >= from && i < to ? scores[r][i] * a.scale : kNothing;
      factors[r] = parts.state(sums + r * parts.step()).template take<Mix<T>::is_narrow>(scores[r]);
    }
    const T* next = first_row ? nullptr : k + kTile * a.k_key;
    Mix<T>::template run<R>(scores, factors, v, a.v_key, count, a.dv, sums, parts.step(), next, a.k_key);
  }

  void merge(int64_t head, int64_t r) {
    parts.merge(head, r);
    const float* sums = parts.sums(head, 0, r);
    T* out = static_cast<T*>(a.out) + (r / group * a.heads + head * group + r % group) * a.dv;
    for (int64_t j = 0; j < a.dv; j += N)
      for (int part = 0; part < Line<T>::parts; ++part)
        for (int lane = 0; lane < W; ++lane) {
          int64_t place = j + Mix<T>::place(part, lane);
          if (place < a.dv) out[place] = narrow<T>(sums[j + part * W + lane]);
        }
  }
};

void attention(sparing::Type type, const sparing::Attention& a) {
  if (type == sparing::Type::float32)
    AttentionRun<float>{a};
  else
    AttentionRun<bf16>{a};
}

}  // namespace
