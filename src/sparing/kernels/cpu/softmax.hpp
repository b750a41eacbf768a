// Softmax over keys that come in tiles: what is added up is kept relative to the largest score so far.
#pragma once

#include "simd.hpp"

namespace {

constexpr int kTile = 64;  // keys

inline float exponential(float x) { return exp(splat(x))[0]; }
constexpr float kNothing = -__builtin_inff();  // the score of a key that is not seen

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
    if (top == kNothing) {
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

}  // namespace
