// The lightning indexer: scores of all keys that a query sees, and the k largest of them.
//
// A task is one query and one stretch of its keys; then each query selects among its scores. A score depends on its query
// and key alone.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <vector>

#include "gathered.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kScoredKeys = 256;         // of a task
constexpr int64_t kHeldScores = 1 << 20;     // of the queries that are scored together
constexpr int64_t kScoringShare = 64 << 10;  // products; below it one thread is faster

// Query `number` of all, which sees the first `visible` keys of a row and chooses among them.
struct Choice {
  int64_t number, visible;
  const sparing::Span* spans;
};

// scores[i] of keys first..last - 1; heads: of `lay_heads`; weights: of the heads, zeros up to a whole vector.
template <class Key>
void score_keys(const sparing::Selection& s, Key key, const Choice& c, const float* heads, const float* weights,
                int64_t first, int64_t last, float* scores, float* room) {
  Places places(c.spans, s.layer, Key::unit);
  int64_t vectors = (s.heads + W - 1) / W;
  for (int64_t i = first; i < last; i += 4) {
    const float* keys[4];
    for (int64_t j = 0; j < 4; ++j)  // of the last key as many as are missing
      keys[j] = i + j < last ? key(places(i + j), room + j * s.d) : keys[j - 1];
    Floats totals[4] = {};
    for (int64_t v = 0; v < vectors; v += kAcross) {
      auto add = [&](auto& sums, int across) {
        for (int j = 0; j < 4; ++j)
          for (int b = 0; b < across; ++b)
            totals[j] += load<Floats>(weights + (v + b) * W) * larger(Floats{}, sums[j][b]);
      };
      if (v + kAcross <= vectors) {
        Floats sums[4][kAcross];
        meet<4, kAcross>(keys, heads + v * s.d * W, s.d, sums);
        add(sums, kAcross);
      } else {
        for (; v < vectors; ++v) {
          Floats sums[4][1];
          meet<4, 1>(keys, heads + v * s.d * W, s.d, sums);
          add(sums, 1);
        }
      }
    }
    alignas(16) float four[4];
    sum4(totals[0], totals[1], totals[2], totals[3], four);
    for (int64_t j = 0; j < smaller(4, last - i); ++j) scores[i + j] = four[j];
  }
}

// In the order of numbers, NaN above all; zeros of either sign are equal.
inline uint32_t rank(float score) {
  if (score != score) return ~0u;
  uint32_t bits;
  score += 0.0f;
  memcpy(&bits, &score, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The larger score first, of equal ones the lower number.
inline uint64_t place_of(float score, int64_t i) { return uint64_t(rank(score)) << 32 | uint32_t(~uint32_t(i)); }

// The k largest of n scores, k < n, of equal ones the first, as ascending numbers. `best` holds what may be among them;
// whenever it is full all but k go, and the least of these is a limit that most of what follows does not reach.
inline void select_largest(const float* scores, int64_t n, int64_t k, int32_t* to) {
  static thread_local std::vector<uint64_t> best;
  best.clear();
  uint64_t least = 0;  // place of the limit
  float limit = -kInfinity;
  auto cut = [&] {
    std::nth_element(best.begin(), best.begin() + k - 1, best.end(), std::greater<uint64_t>());
    best.resize(size_t(k));
    least = best.back(), limit = scores[uint32_t(~uint32_t(least))];
  };
  auto each = [&](auto&& take) {  // of those that are not below the limit, NaN among them
    for (int64_t i = 0; i < n; i += 2 * W) {
      int64_t last = smaller(n, i + 2 * W);
      if (last == i + 2 * W) {
        Ints below = (load<Floats>(scores + i) < splat(limit)) & (load<Floats>(scores + i + W) < splat(limit));
        if (!any((Words)~below)) continue;
      }
      for (int64_t j = i; j < last; ++j)
        if (!(scores[j] < limit)) take(j, place_of(scores[j], j));
    }
  };
  each([&](int64_t, uint64_t place) {
    if (place > least) best.push_back(place);
    if (int64_t(best.size()) == 4 * k) cut();
  });
  cut();
  each([&](int64_t i, uint64_t place) {
    if (place >= least) *to++ = int32_t(i);
  });
}

// Queries of one group: their scores lie one after the other.
template <class T, class Key>
void choose(const sparing::Selection& s, Key key, const Choice* choices, int64_t count) {
  int64_t padded = round_up(s.heads, W), of_query = padded * (s.d + 1);  // heads, and their weights
  std::vector<int64_t> tasks(1, 0), firsts(1, 0);                        // before those of a query; scores before its
  for (int64_t i = 0; i < count; ++i) {
    tasks.push_back(tasks.back() + (choices[i].visible + kScoredKeys - 1) / kScoredKeys);
    firsts.push_back(firsts.back() + choices[i].visible);
  }
  auto memory = static_cast<float*>(aligned_alloc(64, size_t(round_up(4 * (of_query * count + firsts.back()), 64))));
  float* scores = memory + of_query * count;
  int threads = firsts.back() * s.heads * s.d >= kScoringShare ? s.threads : 1;
  sparing::share(count, threads, [&](int64_t i) {
    float *heads = memory + i * of_query, *weights = heads + padded * s.d;
    lay_heads(static_cast<const T*>(s.q) + choices[i].number * s.q_token, s.heads, s.q_head, s.d, 1.0f, heads);
    for (int64_t h = 0; h < padded; ++h) weights[h] = h < s.heads ? s.w[choices[i].number * s.heads + h] : 0.0f;
  });
  sparing::share(tasks.back(), threads, [&](int64_t task) {
    static thread_local std::vector<float> room;
    room.resize(size_t(4 * s.d));
    int64_t i = std::upper_bound(tasks.begin(), tasks.end(), task) - tasks.begin() - 1;
    int64_t first = (task - tasks[size_t(i)]) * kScoredKeys, last = smaller(first + kScoredKeys, choices[i].visible);
    const float* heads = memory + i * of_query;
    score_keys(s, key, choices[i], heads, heads + padded * s.d, first, last, scores + firsts[size_t(i)], room.data());
  });
  sparing::share(count, threads, [&](int64_t i) {
    select_largest(scores + firsts[size_t(i)], choices[i].visible, s.k, s.selected + choices[i].number * s.width);
  });
  free(memory);
}

template <class T, class Key>
void select_of(const sparing::Selection& s, Key key) {
  std::vector<Choice> choices;
  int64_t number = 0;
  for (int64_t r = 0; r < s.num_rows; ++r) {
    const sparing::AttendedRow& row = s.rows[r];
    for (int64_t t = row.end - row.queries; t < row.end; ++t, ++number) {
      int64_t visible = smaller((t + 1) / s.m, row.entries);
      int32_t* to = s.selected + number * s.width;
      for (int64_t i = 0; i < s.width; ++i) to[i] = i < visible ? int32_t(i) : -1;
      if (visible > s.k) choices.push_back({number, visible, s.spans + row.span});
    }
  }
  for (size_t first = 0, last = 0; first < choices.size(); first = last) {
    for (int64_t held = 0; last < choices.size() && (last == first || held < kHeldScores); ++last)
      held += choices[last].visible + round_up(s.heads, W) * s.d;
    choose<T>(s, key, &choices[first], int64_t(last - first));
  }
}

void select_entries(sparing::Type type, const sparing::Selection& s) {
  bool is_float = type == sparing::Type::float32;
  if (s.is_released)
    is_float ? select_of<float>(s, ReleasedKey{s.d}) : select_of<bf16>(s, ReleasedKey{s.d});
  else
    is_float ? select_of<float>(s, Plain<float>{s.d}) : select_of<bf16>(s, Plain<bf16>{s.d});
}

}  // namespace
