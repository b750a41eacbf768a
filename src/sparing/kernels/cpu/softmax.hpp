// Softmax over keys that come in tiles: what is added up is kept relative to the largest score so far.
#pragma once

#include <cstdlib>

#include "simd.hpp"

namespace {

constexpr int kTile = 64;  // keys

inline float exponential(float x) { return exp(splat(x))[0]; }
constexpr float kNothing = -kInfinity;  // the score of a key that is not seen

// NaN if one of n numbers is, else 0; n: a multiple of W.
inline float nan_of(const float* numbers, int64_t n) {
  Floats found{};
  for (int64_t i = 0; i < n; i += W) {
    Floats x = load<Floats>(numbers + i);
    found += pick(x == x, Floats{}, x);
  }
  return sum(found);
}

// A row's state after some keys: the largest score, and the sum of e^(score - largest).
struct Running {
  float top = kNothing, total = 0;

  // Turns kTile scores into weights e^(score - top) and returns the factor for all that was added up before.
  // is_narrow: the weights, and with them their sum, are rounded to what a bf16 holds.
  template <bool is_narrow>
  float take(float* scores) {
    Floats best = load<Floats>(scores);
    for (int i = W; i < kTile; i += W) best = larger(best, load<Floats>(scores + i));
    float highest = largest(best), before = top;
    top = highest > top ? highest : top;
    if (top == kNothing) {  // every score is that, or NaN, which no score is larger than
      total += nan_of(scores, kTile);
      for (int i = 0; i < kTile; i += W) store(scores + i, Floats{});
      return 1;
    }
    Floats sums{};
    for (int i = 0; i < kTile; i += W) {
      Floats weights = exp(load<Floats>(scores + i) - top);
      if (is_narrow) weights = rounded_to_bf16(weights);
      store(scores + i, weights);
      sums += weights;
    }
    float factor = before == top ? 1 : exponential(before - top);
    total = total * factor + sum(sums);
    return factor;
  }
};

// What the stretches of keys that threads share out gave, for each kv head, stretch and row: sums over values and their
// state. Stretches do not depend on the number of threads, so neither do results.
class Parts {
 public:
  Parts(int64_t heads, int64_t stretches, int64_t rows, int64_t size)
      : stretches(stretches), rows(rows), size(round_up(size, kTile)) {
    memory = static_cast<float*>(aligned_alloc(64, (this->size + 16) * heads * stretches * rows * sizeof(float)));
  }
  ~Parts() { free(memory); }
  Parts(const Parts&) = delete;

  float* sums(int64_t head, int64_t stretch, int64_t row) {
    return memory + ((head * stretches + stretch) * rows + row) * step();
  }
  int64_t step() const { return size + 16; }  // from a row to the next
  Running& state(float* sums) { return *reinterpret_cast<Running*>(sums + size); }

  void clear(float* sums) {
    memset(sums, 0, size * sizeof(float));
    state(sums) = Running{};
  }

  // Softmax over all stretches of a row: its mix of values, left in the sums of the first, and its state.
  Running merge(int64_t head, int64_t row) {
    Running all;
    for (int64_t s = 0; s < stretches; ++s) {
      float top = state(sums(head, s, row)).top;
      all.top = top > all.top ? top : all.top;
    }
    float* first = sums(head, 0, row);
    for (int64_t s = 0; s < stretches; ++s) {
      float* more = sums(head, s, row);
      float factor = exponential(state(more).top - all.top);
      all.total += state(more).total * factor;
      for (int64_t j = 0; j < size; j += W)
        store(first + j, load<Floats>(more + j) * factor + (s ? load<Floats>(first + j) : Floats{}));
    }
    for (int64_t j = 0; j < size; j += W) store(first + j, load<Floats>(first + j) / all.total);
    return all;
  }

 private:
  int64_t stretches, rows, size;
  float* memory;
};

}  // namespace
