// Attention over tokens in a window and over compressed entries, all of them or those that are selected, with one softmax.
//
// The entries that a query sees are one list, tokens first, in tiles of 64. A task is one query and one tile, for all
// heads; then the tiles are merged by their largest scores, head by head. Tiles begin with what the query sees: what is
// added up in which order depends on nothing else. What is not seen is not read.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "gathered.hpp"
#include "kernels.hpp"
#include "softmax.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kPartNumbers = 4 << 20;     // of the tiles that are held at a time
constexpr int64_t kJointProducts = 64 << 10;  // below it one thread is faster

// Query `number` of all: `recent` tokens it sees, from number `low` of those that are held on, and compressed entries
// `chosen`, or the first `closed` of them (null).
struct Listed {
  int64_t number, low, recent, closed;
  const int32_t* chosen;
  const sparing::Span *window, *compressed;

  int64_t count() const { return recent + closed; }
  int64_t tiles() const { return (count() + kTile - 1) / kTile; }
};

template <class T>
class Joint {
 public:
  explicit Joint(const sparing::JointAttention& a)
      : a(a), padded(round_up(a.heads, W)), size(round_up(a.d, W)), part(a.heads * size + 2 * padded) {}

  // Whether all that is selected is seen; otherwise nothing is computed.
  bool run() {
    if (!list()) return false;
    for (size_t first = 0, last = 0; first < queries.size(); first = last) {
      for (int64_t held = 0; last < queries.size() && (last == first || held < kPartNumbers); ++last)
        held += padded * a.d + queries[last].tiles() * part;
      attend(&queries[first], int64_t(last - first));
    }
    return true;
  }

 private:
  const sparing::JointAttention& a;
  const int64_t padded, size, part;  // heads, numbers of a sum; numbers of a tile: sums, largest scores and totals
  std::vector<Listed> queries;
  std::vector<int32_t> chosen;

  bool list() {
    int64_t total = 0;
    for (int64_t r = 0; r < a.num_rows; ++r) total += a.window[r].queries;
    if (a.selected) chosen.resize(size_t(total * a.k));
    int32_t* to = chosen.data();
    for (int64_t r = 0; r < a.num_rows; ++r) {
      const sparing::AttendedRow& row = a.window[r];
      const sparing::AttendedRow* entries = a.compressed ? a.compressed + r : nullptr;
      for (int64_t t = row.end - row.queries; t < row.end; ++t) {
        int64_t high = t + 1 - (row.end - row.entries), low = greater(0, row.window ? high - row.window : 0);
        int64_t closed = entries ? smaller((t + 1) / a.m, entries->entries) : 0, number = int64_t(queries.size());
        Listed q{number, low, high - low, closed, nullptr, a.window_spans + row.span, nullptr};
        if (entries) q.compressed = a.compressed_spans + entries->span;
        if (a.selected) {
          q.chosen = to;
          for (const int32_t* i = a.selected + number * a.k; i < a.selected + (number + 1) * a.k; ++i) {
            if (*i < -1 || *i >= closed) return false;
            if (*i >= 0) *to++ = *i;
          }
          q.closed = to - q.chosen;
        }
        queries.push_back(q);
      }
    }
    return true;
  }

  void attend(const Listed* some, int64_t count) const {
    std::vector<int64_t> tiles(1, 0);  // before those of a query
    int64_t entries = 0;
    for (int64_t i = 0; i < count; ++i) tiles.push_back(tiles.back() + some[i].tiles()), entries += some[i].count();
    int64_t of_heads = padded * a.d;
    auto memory = static_cast<float*>(aligned_alloc(64, size_t(round_up(4 * (of_heads * count + part * tiles.back()), 64))));
    float* parts = memory + of_heads * count;
    int threads = entries * a.heads * a.d >= kJointProducts ? a.threads : 1;
    sparing::share(count, threads, [&](int64_t i) {
      const T* q = static_cast<const T*>(a.q) + some[i].number * a.q_token;
      lay_heads(q, a.heads, a.q_head, a.d, a.scale, memory + i * of_heads);
    });
    sparing::share(tiles.back(), threads, [&](int64_t task) {
      int64_t i = std::upper_bound(tiles.begin(), tiles.end(), task) - tiles.begin() - 1;
      tile(some[i], task - tiles[size_t(i)], memory + i * of_heads, parts + task * part);
    });
    sparing::share(count * a.heads, threads, [&](int64_t task) {
      int64_t i = task / a.heads, first = tiles[size_t(i)];
      merge(some[i].number, task % a.heads, parts + first * part, tiles[size_t(i) + 1] - first);
    });
    free(memory);
  }

  // Sums over the entries of one tile, weighted by e^(score - largest), [heads, size]; these largest scores; totals.
  void tile(const Listed& q, int64_t number, const float* heads, float* sums) const {
    static thread_local std::vector<float> room;
    room.resize(size_t(kTile * (size + padded) + W));
    auto scores = reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(room.data()), 4 * W));  // [kTile, padded]
    const float* entries[kTile];
    int64_t first = number * kTile;
    int n = int(smaller(kTile, q.count() - first));
    gather(q, first, n, scores + kTile * padded, entries);
    int64_t vectors = padded / W, v = 0;
    for (; v + kAcross <= vectors; v += kAcross) score<kAcross>(entries, n, heads + v * a.d * W, scores + v * W);
    for (; v < vectors; ++v) score<1>(entries, n, heads + v * a.d * W, scores + v * W);
    float *tops = sums + a.heads * size, *totals = tops + padded;
    for (v = 0; v < padded; v += W) weigh(scores + v, n, tops + v, totals + v);
    for (int64_t h = 0; h < a.heads; h += 4) switch (a.heads - h) {
#define ROWS(R) \
  mix<R>(entries, n, scores + h, sums + h * size); \
  break;
        case 1: ROWS(1)
        case 2: ROWS(2)
        case 3: ROWS(3)
        default: ROWS(4)
#undef ROWS
      }
  }

  void gather(const Listed& q, int64_t first, int n, float* room, const float** entries) const {
    Places window(q.window, a.layer, sizeof(T)), compressed(q.compressed, a.layer, sizeof(T));
    for (int i = 0; i < n; ++i) {
      int64_t at = first + i - q.recent;
      const char* entry = at < 0 ? window(q.low + first + i) : compressed(q.chosen ? q.chosen[at] : at);
      entries[i] = floats_of(reinterpret_cast<const T*>(entry), a.d, room + i * size);
    }
    for (int i = n; i % 4; ++i) entries[i] = entries[n - 1];
  }

  template <int B>
  void score(const float* const* entries, int n, const float* heads, float* scores) const {
    for (int i = 0; i < n; i += 4) {
      Floats sums[4][B];
      meet<B>(entries + i, heads, a.d, sums);
      for (int j = 0; j < 4; ++j)
        for (int b = 0; b < B; ++b) store(scores + (i + j) * padded + b * W, sums[j][b]);
    }
  }

  // Makes weights of the scores of W heads.
  void weigh(float* scores, int n, float* to_tops, float* to_totals) const {
    Floats top = splat(kNothing), total{};
    for (int i = 0; i < n; ++i) top = larger(top, load<Floats>(scores + i * padded));
    Floats shift = pick(top == splat(kNothing), Floats{}, top);
    for (int i = 0; i < n; ++i) {
      Floats weight = exp(load<Floats>(scores + i * padded) - shift);
      store(scores + i * padded, weight);
      total += weight;
    }
    store(to_tops, top), store(to_totals, total);
  }

  // sums[r] = sum_i weights[i][r] * entries[i] for R heads.
  template <int R>
  void mix(const float* const* entries, int n, const float* weights, float* sums) const {
    int64_t j = 0;
    for (; j + kAcross * W <= a.d; j += kAcross * W) columns<R, kAcross>(entries, n, weights, j, W, sums + j);
    for (; j < a.d; j += W) columns<R, 1>(entries, n, weights, j, smaller(W, a.d - j), sums + j);
  }

  template <int R, int B>
  void columns(const float* const* entries, int n, const float* weights, int64_t j, int64_t count, float* to) const {
    Floats sums[R][B] = {};
    for (int i = 0; i < n; ++i) {
      Floats values[B];
      for (int b = 0; b < B; ++b) {
        const float* at = entries[i] + j + b * W;
        values[b] = B > 1 || count == W ? read(at) : read(at, count);
      }
      for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) sums[r][b] += values[b] * weights[i * padded + r];
    }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) store(to + r * size + b * W, sums[r][b]);
  }

  // One head over all tiles of its query, and the sink.
  void merge(int64_t number, int64_t head, const float* parts, int64_t tiles) const {
    const int64_t tops = a.heads * size + head, totals = tops + padded;
    float top = a.sinks[head];
    for (int64_t i = 0; i < tiles; ++i) top = parts[i * part + tops] > top ? parts[i * part + tops] : top;
    if (top == kNothing) top = 0;
    static thread_local std::vector<float> sums;
    sums.assign(size_t(size), 0.0f);
    float total = exponential(a.sinks[head] - top);
    for (int64_t i = 0; i < tiles; ++i) {
      float factor = exponential(parts[i * part + tops] - top);
      total += parts[i * part + totals] * factor;
      const float* from = parts + i * part + head * size;
      for (int64_t j = 0; j < size; j += W) store(&sums[j], load<Floats>(&sums[j]) + load<Floats>(from + j) * factor);
    }
    T* to = static_cast<T*>(a.out) + (number * a.heads + head) * a.d;
    float divisor = total == 0 ? 1 : total;  // neither an entry nor a sink
    for (int64_t j = 0; j < a.d; j += W) write(to + j, load<Floats>(&sums[j]) / divisor, a.d - j);
  }
};

bool joint_attention(sparing::Type type, const sparing::JointAttention& a) {
  return type == sparing::Type::float32 ? Joint<float>(a).run() : Joint<bf16>(a).run();
}

}  // namespace
