// Attention over cached keys and values of many rows, read once for all query heads of a kv head.
//
// A task is one row, one kv head and one stretch of its keys or, where there are many queries, one block of them and all
// its keys. It works in tiles of keys: scores, online softmax, weighted values. The parts of the stretches are merged by
// their largest scores. Tied keys are made tile by tile from the values, which then still lie in the cache when they are
// added up. What is added up in which order depends on a row alone: not on its neighbours, nor on threads or spans.
#pragma once

#include <algorithm>
#include <deque>
#include <optional>
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
  if (i < count) {  // the same sums in the same order: a score does not depend on how many keys follow
    Floats sums[R][4] = {};
    for (int c = 0; c < count - i; ++c)
      for (int64_t j = 0; j < d; j += N) {
        const T* at = k + (i + c) * k_key + j;
        Line<T> line = j + N <= d ? Line<T>::read(at) : Line<T>::read(at, int(d - j));
        for (int r = 0; r < R; ++r) sums[r][c] = line.dot(Line<T>::read(q + r * q_row + j), sums[r][c]);
      }
    for (int r = 0; r < R; ++r) sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], scores[r] + i);
  }
}

template <class T>
class AttendedRow {
 public:
  // first_query: how many queries the rows before have.
  AttendedRow(const sparing::Attention& a, const sparing::AttendedRow& row, int64_t first_query)
      : a(a), row(row), first_query(first_query), queries(static_cast<const T*>(a.q) + first_query * a.q_token),
        out(static_cast<T*>(a.out) + first_query * a.heads * a.dv), group(a.heads / a.kv_heads), q_row(round_up(a.d, N)) {
    // Few queries: all of them meet a tile of keys while it is in cache, and threads share the keys in stretches, whose
    // partial softmaxes are merged. Many: threads share blocks of queries, and nothing needs merging.
    in_block = row.queries * group <= kRows ? row.queries : greater(1, kRows / group);
    blocks = (row.queries + in_block - 1) / in_block;
    if (blocks == 1) {
      all = block(0, row.queries);
      stretches = (all.high - all.start + kStretch - 1) / kStretch;
      parts.emplace(a.kv_heads, stretches, all.rows, a.dv);
    }
  }

  int64_t tasks() const { return a.kv_heads * (blocks == 1 ? stretches : blocks); }
  int64_t bytes() const { return blocks ? a.kv_heads * row.entries * (a.d + a.dv) * int64_t(sizeof(T)) : 0; }

  void run(int64_t i) {
    if (blocks == 1) {
      int64_t start = all.start + i % stretches * kStretch;
      Block some{all.first, all.rows, start, greater(start, all.low), smaller(start + kStretch, all.high)};
      return run(some, i / stretches, *parts, i / stretches, i % stretches);
    }
    Block some = block(i % blocks * in_block, smaller((i % blocks + 1) * in_block, row.queries));
    Parts own(1, 1, some.rows, a.dv);
    run(some, i / blocks, own, 0, 0);
    write_out(some, i / blocks, own, 0);
  }

  // What is left to do once all tasks are done.
  void merge() {
    if (blocks == 1)
      for (int64_t head = 0; head < a.kv_heads; ++head) write_out(all, head, *parts, head);
  }

 private:
  static constexpr int N = Line<T>::size;
  const sparing::Attention& a;
  const sparing::AttendedRow row;
  const int64_t first_query;
  const T* queries;
  T* out;
  int64_t group, q_row, in_block, blocks, stretches = 0;

  // Queries from the `first` on, `rows` of them times group, and the entries low..high - 1 that at least one of them sees,
  // in tiles from `start` on (which may lie before the first entry).
  struct Block {
    int64_t first, rows, start, low, high;
  } all;
  std::optional<Parts> parts;

  Block block(int64_t first, int64_t last) const {
    int64_t past = row.entries - row.queries;
    int64_t low = row.causal && row.window ? greater(0, past + first + 1 - row.window) : 0;
    int64_t start = low - (row.dropped + low) % kTile;
    return {first, (last - first) * group, start, low, row.causal ? past + last : row.entries};
  }

  // A walk through the spans of the row.
  class Walk {
   public:
    explicit Walk(const sparing::Span* span) : span(span) {}

    // Calls body(span, number in it, count, how many came before) for each run of the entries at..at + count - 1.
    template <class F>
    void over(int64_t at, int count, F body) {
      for (int done = 0; done < count;) {
        while (at + done >= begin + span->count) begin += span->count, ++span;
        int64_t inside = at + done - begin;
        int n = int(smaller(count - done, span->count - inside));
        body(*span, inside, n, done);
        done += n;
      }
    }

   private:
    const sparing::Span* span;
    int64_t begin = 0;  // number of the span's first entry
  };

  const T* entry(int64_t address, const sparing::Span& s, int64_t head, int64_t head_stride, int64_t i,
                 int64_t key) const {
    return reinterpret_cast<const T*>(address + a.layer * s.layer) + head * head_stride + i * key;
  }

  void run(const Block& b, int64_t head, Parts& parts, int64_t part, int64_t stretch) {
    // Queries of this kv head, row t * group + g, padded with zeros to whole lines; the keys of a tile that are made, or lie
    // in several spans; its values that do.
    bool is_tied = a.tied.weight;
    T* q = static_cast<T*>(
        aligned_alloc(64, round_up(((b.rows + kTile) * q_row + kTile * a.dv) * int64_t(sizeof(T)), 64)));
    T *keys = q + b.rows * q_row, *values = keys + kTile * q_row;
    TiedKeys<T> tied(a.tied, head, a.d);
    for (int64_t r = 0; r < b.rows; ++r) {
      T* to = q + r * q_row;
      memcpy(to, queries + (b.first + r / group) * a.q_token + (head * group + r % group) * a.q_head, a.d * sizeof(T));
      memset(to + a.d, 0, (q_row - a.d) * sizeof(T));
      if (is_tied) tied.fold(to);
      parts.clear(parts.sums(part, stretch, r));
    }
    Walk walk(a.spans + row.span);
    for (int64_t start = b.start; start < b.high; start += kTile) {
      int64_t at = greater(start, b.low);
      Tile t{at, int(smaller(start + kTile, b.high) - at)};
      walk.over(at, t.count, [&](const sparing::Span& s, int64_t i, int n, int before) {
        const T* k = is_tied ? nullptr : entry(s.k, s, head, s.k_head, i, s.k_key);
        const T* v = entry(s.v, s, head, s.v_head, i, s.v_key);
        if (is_tied) {
          auto positions = reinterpret_cast<const int32_t*>(s.positions ? s.positions + a.layer * s.positions_layer : 0);
          tied.make(v, s.v_key, {positions, s.positions_head, s.first}, i, n, keys + before * q_row, q_row, q_row);
          t.k = keys, t.k_key = q_row;
        }
        if (n == t.count) {
          t.v = v, t.v_key = s.v_key;
          if (!is_tied) t.k = k, t.k_key = s.k_key;
          if (i + n + kTile <= s.count) t.next = (is_tied ? v : k) + n * (is_tied ? s.v_key : s.k_key);
          t.next_key = is_tied ? s.v_key : s.k_key;
          return;
        }
        for (int j = 0; j < n; ++j) {
          if (!is_tied) memcpy(keys + (before + j) * q_row, k + j * s.k_key, a.d * sizeof(T));
          memcpy(values + (before + j) * a.dv, v + j * s.v_key, a.dv * sizeof(T));
        }
        t.k = keys, t.k_key = q_row, t.v = values, t.v_key = a.dv;
      });
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
    const T* k = nullptr;
    int64_t k_key = 0;
    const T* v = nullptr;
    int64_t v_key = 0;
    const T* next = nullptr;  // what the next tile starts with, where it follows
    int64_t next_key = 0;
  };

  // R rows from the `first_row` on of all queries' rows. is_first: what is needed next is asked for. Not inlined: compilers keep the
  // sums of a single R in registers, but not those of four in one function.
  template <int R>
  __attribute__((noinline)) void rows(const T* q, const Tile t, Parts& parts, float* sums, int64_t first_row, bool is_first) {
    alignas(64) float scores[R][kTile];
    float factors[R];
    int64_t first = 0, last = t.count;  // of the tile, what all rows see
    score<T, R>(q, q_row, t.k, t.k_key, t.count, a.d, scores, is_first && !a.tied.weight ? t.v : nullptr, t.v_key, a.dv);
    for (int r = 0; r < R; ++r) {
      int64_t from = 0, to = t.count;  // of the tile, what the row sees
      if (row.causal) {
        int64_t position = row.entries - row.queries + (first_row + r) / group;
        to = smaller(to, position + 1 - t.at);
        if (row.window) from = greater(0, position + 1 - row.window - t.at);
        first = greater(first, from), last = smaller(last, to);
      }
      for (int i = 0; i < kTile; ++i) scores[r][i] = i >= from && i < to ? scores[r][i] * a.scale : kNothing;
      factors[r] = parts.state(sums + r * parts.step()).template take<Mix<T>::is_narrow>(scores[r]);
    }
    const bool all_finite = are_finite(t, 0, first) && are_finite(t, greater(first, last), t.count);
    if (__builtin_expect(!all_finite, false)) return mix_seen<R>(scores, factors, t, sums, parts.step(), first_row);
    Mix<T>::template run<R>(scores, factors, t.v, t.v_key, t.count, a.dv, sums, parts.step(), is_first ? t.next : nullptr,
                            t.next_key);
  }

  // Whether the values first..last - 1 of a tile are: what some rows do not see, a weight of 0 keeps out if it is.
  bool are_finite(const Tile& t, int64_t first, int64_t last) const {
    Floats zeros{};
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = 0; j < a.dv; j += W) zeros += read(t.v + i * t.v_key + j, a.dv - j) * 0.0f;
    return first >= last || sum(zeros) == 0;
  }

  // The mix of each row with the values it sees, and zeros in place of the others.
  template <int R>
  __attribute__((noinline)) void mix_seen(float (*scores)[kTile], const float* factors, const Tile& t, float* sums,
                                          int64_t step, int64_t first_row) const {
    std::vector<T> seen(size_t(t.count * a.dv));
    for (int r = 0; r < R; ++r) {
      int64_t position = row.entries - row.queries + (first_row + r) / group, to = smaller(t.count, position + 1 - t.at);
      int64_t from = row.window ? greater(0, position + 1 - row.window - t.at) : 0;
      seen.assign(seen.size(), T{});
      for (int64_t i = from; i < to; ++i) memcpy(&seen[i * a.dv], t.v + i * t.v_key, a.dv * sizeof(T));
      Mix<T>::template run<1>(scores + r, factors + r, seen.data(), a.dv, t.count, a.dv, sums + r * step, step, nullptr, 0);
    }
  }

  void write_out(const Block& b, int64_t head, Parts& parts, int64_t part) {
    for (int64_t r = 0; r < b.rows; ++r) {
      Running all = parts.merge(part, r);
      const float* sums = parts.sums(part, 0, r);
      const int64_t query = (b.first + r / group) * a.heads + head * group + r % group;
      T* to = out + query * a.dv;
      // What other entries gave for the query, if any did, is added in proportion to what the two softmaxes divided by.
      const float* other = a.more ? a.more + (first_query * a.heads + query) * a.dv : nullptr;
      float add = 0;
      if (other) {
        float mine = all.top + __builtin_logf(all.total), theirs = a.more_lse[first_query * a.heads + query];
        add = 1 / (1 + __builtin_expf(mine - theirs));
      }
      for (int64_t j = 0; j < a.dv; j += N)
        for (int p = 0; p < Line<T>::parts; ++p)
          for (int lane = 0; lane < W; ++lane) {
            int64_t place = j + Mix<T>::place(p, lane);
            float mix = sums[j + p * W + lane];
            if (place < a.dv) to[place] = narrow<T>(other ? mix * (1 - add) + other[place] * add : mix);
          }
    }
  }
};

template <class T>
void attend(const sparing::Attention& a) {
  std::deque<AttendedRow<T>> rows;
  std::vector<int64_t> ends;  // of the tasks of each
  int64_t queries = 0, bytes = 0;
  for (int64_t i = 0; i < a.num_rows; queries += a.rows[i++].queries) {
    if (a.rows[i].queries == 0) continue;
    rows.emplace_back(a, a.rows[i], queries);
    ends.push_back((ends.empty() ? 0 : ends.back()) + rows.back().tasks());
    bytes += rows.back().bytes();
  }
  if (rows.empty()) return;
  sparing::share(ends.back(), bytes >= kShareBytes ? a.threads : 1, [&](int64_t i) {
    size_t r = size_t(std::upper_bound(ends.begin(), ends.end(), i) - ends.begin());
    rows[r].run(r ? i - ends[r - 1] : i);
  });
  for (auto& row : rows) row.merge();
}

void attention(sparing::Type type, const sparing::Attention& a) {
  type == sparing::Type::float32 ? attend<float>(a) : attend<bf16>(a);
}

}  // namespace
