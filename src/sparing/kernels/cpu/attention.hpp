// Attention over cached keys and values, which are read once for all query heads of a kv head.
//
// A task is one kv head and one stretch of keys or, where there are many queries, one block of them and all its keys. It
// works in tiles of keys: scores, online softmax, weighted values. The parts of the stretches are merged by their largest
// scores. Tied keys are made tile by tile from the values, which then still lie in the cache when they are added up.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "mix.hpp"
#include "softmax.hpp"
#include "threads.hpp"
#include "tied_keys.hpp"

namespace {

constexpr int64_t kStretch = 512;        // keys
constexpr int64_t kRows = 64;            // queries times group, of a block
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
  explicit AttentionRun(const sparing::Attention& a) : a(a), group(a.heads / a.kv_heads), q_row(round_up(a.d, N)) {
    // Few queries: all of them meet a tile of keys while it is in cache, and threads share the keys in stretches, whose
    // partial softmaxes are merged. Many: threads share blocks of queries, and nothing needs merging.
    int64_t queries = a.tokens * group <= kRows ? a.tokens : greater(1, kRows / group);
    int64_t blocks = (a.tokens + queries - 1) / queries;
    if (blocks == 1) {
      Block all = block(0, a.tokens);
      int64_t stretches = (all.high - all.low + kStretch - 1) / kStretch;
      Parts parts(a.kv_heads, stretches, all.rows, a.dv);
      bool many = a.kv_heads * (all.high - all.low) * (a.d + a.dv) * int64_t(sizeof(T)) >= kShareBytes;
      sparing::share(a.kv_heads * stretches, many ? a.threads : 1, [&](int64_t i) {
        int64_t low = all.low + i % stretches * kStretch, high = smaller(low + kStretch, all.high);
        run({all.first, all.rows, low, high}, i / stretches, parts, i / stretches, i % stretches);
      });
      for (int64_t head = 0; head < a.kv_heads; ++head) write_out(all, head, parts, head);
    } else {
      sparing::share(a.kv_heads * blocks, a.threads, [&](int64_t i) {
        Block some = block(i % blocks * queries, smaller((i % blocks + 1) * queries, a.tokens));
        Parts parts(1, 1, some.rows, a.dv);
        run(some, i / blocks, parts, 0, 0);
        write_out(some, i / blocks, parts, 0);
      });
    }
  }

 private:
  static constexpr int N = Line<T>::size;
  sparing::Attention a;
  int64_t group, q_row;

  // Queries from the `first` on, `rows` of them times group, and the keys low..high - 1 that at least one of them sees.
  struct Block {
    int64_t first, rows, low, high;
  };

  Block block(int64_t first, int64_t last) const {
    int64_t past = a.keys - a.tokens;
    int64_t low = a.causal && a.window ? greater(0, past + first + 1 - a.window) : 0;
    return {first, (last - first) * group, low, a.causal ? past + last : a.keys};
  }

  void run(const Block& b, int64_t head, Parts& parts, int64_t part, int64_t stretch) {
    // Queries of this kv head, row t * group + g, padded with zeros to whole lines; after them the keys of a tile.
    int64_t tied_rows = a.k ? 0 : kTile;
    T* q = static_cast<T*>(aligned_alloc(64, round_up((b.rows + tied_rows) * q_row * sizeof(T), 64)));
    T* made = q + b.rows * q_row;
    TiedKeys<T> tied(a.tied, head, a.keys, a.d, a.v_key);
    for (int64_t r = 0; r < b.rows; ++r) {
      T* to = q + r * q_row;
      memcpy(to, static_cast<const T*>(a.q) + (b.first + r / group) * a.q_token + (head * group + r % group) * a.q_head,
             a.d * sizeof(T));
      memset(to + a.d, 0, (q_row - a.d) * sizeof(T));
      if (!a.k) tied.fold(to);
      parts.clear(parts.sums(part, stretch, r));
    }
    const T* v = static_cast<const T*>(a.v) + head * a.v_head;
    const T* keys = a.k ? static_cast<const T*>(a.k) + head * a.k_head : v;
    int64_t k_key = a.k ? a.k_key : a.v_key;
    for (int64_t at = b.low; at < b.high; at += kTile) {
      Tile t{at, int(smaller(kTile, b.high - at)), keys + at * k_key, k_key, v + at * a.v_key, keys + (at + kTile) * k_key,
             k_key};
      if (!a.k) {
        tied.make(t.v, at, t.count, made, q_row, q_row);
        t.k = made, t.k_key = q_row;
      }
      for (int64_t r = 0; r < b.rows; r += 4) switch (b.rows - r) {
#define ROWS(R) \
  rows<R>(q + r * q_row, t, parts, parts.sums(part, stretch, r), b.first * group + r, r == 0); \
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

  struct Tile {
    int64_t at;
    int count;
    const T* k;
    int64_t k_key;
    const T* v;
    const T* next;  // what the next tile starts with
    int64_t next_key;
  };

  // R rows from `row` on of all tokens' rows. is_first: what is needed next is asked for. Not inlined: compilers keep the
  // sums of a single R in registers, but not those of four in one function.
  template <int R>
  __attribute__((noinline)) void rows(const T* q, const Tile t, Parts& parts, float* sums, int64_t row, bool is_first) {
    alignas(64) float scores[R][kTile];
    float factors[R];
    int64_t first = 0, last = t.count;  // of the tile, what all rows see
    score<T, R>(q, q_row, t.k, t.k_key, t.count, a.d, scores, is_first && a.k ? t.v : nullptr, a.v_key, a.dv);
    for (int r = 0; r < R; ++r) {
      int64_t from = 0, to = t.count;  // of the tile, what the row sees
      if (a.causal) {
        int64_t position = a.keys - a.tokens + (row + r) / group;
        to = smaller(to, position + 1 - t.at);
        if (a.window) from = greater(0, position + 1 - a.window - t.at);
        first = greater(first, from), last = smaller(last, to);
      }
      for (int i = 0; i < kTile; ++i) scores[r][i] = i >= from && i < to ? scores[r][i] * a.scale : kNothing;
      factors[r] = parts.state(sums + r * parts.step()).template take<Mix<T>::is_narrow>(scores[r]);
    }
    const bool all_finite = are_finite(t, 0, first) && are_finite(t, greater(first, last), t.count);
    if (__builtin_expect(!all_finite, false)) return mix_seen<R>(scores, factors, t, sums, parts.step(), row);
    Mix<T>::template run<R>(scores, factors, t.v, a.v_key, t.count, a.dv, sums, parts.step(), is_first ? t.next : nullptr,
                            t.next_key);
  }

  // Whether the values first..last - 1 of a tile are: what some rows do not see, a weight of 0 keeps out if it is.
  bool are_finite(const Tile& t, int64_t first, int64_t last) const {
    Floats zeros{};
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = 0; j < a.dv; j += W) zeros += read(t.v + i * a.v_key + j, a.dv - j) * 0.0f;
    return first >= last || sum(zeros) == 0;
  }

  // The mix of each row with the values it sees, and zeros in place of the others.
  template <int R>
  __attribute__((noinline)) void mix_seen(float (*scores)[kTile], const float* factors, const Tile& t, float* sums,
                                          int64_t step, int64_t row) const {
    std::vector<T> seen(size_t(t.count * a.dv));
    for (int r = 0; r < R; ++r) {
      int64_t position = a.keys - a.tokens + (row + r) / group, to = smaller(t.count, position + 1 - t.at);
      int64_t from = a.window ? greater(0, position + 1 - a.window - t.at) : 0;
      seen.assign(seen.size(), T{});
      for (int64_t i = from; i < to; ++i) memcpy(&seen[i * a.dv], t.v + i * a.v_key, a.dv * sizeof(T));
      Mix<T>::template run<1>(scores + r, factors + r, seen.data(), a.dv, t.count, a.dv, sums + r * step, step, nullptr, 0);
    }
  }

  void write_out(const Block& b, int64_t head, Parts& parts, int64_t part) {
    for (int64_t r = 0; r < b.rows; ++r) {
      parts.merge(part, r);
      const float* sums = parts.sums(part, 0, r);
      T* out = static_cast<T*>(a.out) + ((b.first + r / group) * a.heads + head * group + r % group) * a.dv;
      for (int64_t j = 0; j < a.dv; j += N)
        for (int p = 0; p < Line<T>::parts; ++p)
          for (int lane = 0; lane < W; ++lane) {
            int64_t place = j + Mix<T>::place(p, lane);
            if (place < a.dv) out[place] = narrow<T>(sums[j + p * W + lane]);
          }
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
