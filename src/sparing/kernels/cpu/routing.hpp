// Which experts a token goes to, for few tokens: scores of all of them, and the best of these or those that are given.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "products.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

constexpr float kLeastLogit = -87.0f;          // of a softplus: the root of it is not 0
constexpr int64_t kGatePieceBytes = 32 << 10;  // of the gate, the share a thread takes at a time

// Whether a comes before b where the largest are chosen: NaN is the largest of all, as in torch.
inline bool is_better(float a, float b) { return a > b || (a != a && b == b); }

// Ids of the k largest of n numbers that are not taken, the lowest first among equals, and takes them.
inline void take_best(float* from, bool* taken, int64_t n, int64_t k, int64_t* ids) {
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i)
      if (!taken[i] && (best < 0 || is_better(from[i], from[best]))) best = i;
    taken[ids[j] = best] = true;
  }
}

// ln(1 + e^x): what x has above 0, and of the rest ln(1 + y) = 2 artanh(y / (2 + y)) with y = e^-|x|, as a series.
inline Floats softplus(Floats x) {
  Floats y = exp(pick(x > Floats{}, -x, x)), u = y / (2.0f + y), square = u * u;
  Floats p = square * (2.0f / 13) + 2.0f / 11;
  for (float next : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) p = p * square + next;
  return larger(Floats{}, x) + u * p;
}

// Makes scores of a token's logits s [padded], of which those beyond the experts are -infinity.
inline void make_scores(float* s, int64_t padded, sparing::Scoring scoring) {
  Floats most = splat(-kInfinity), total{};
  if (scoring == sparing::Scoring::softmax) {
    for (int64_t i = 0; i < padded; i += W) most = larger(most, read(s + i));
    most = splat(largest(most));
  }
  for (int64_t i = 0; i < padded; i += W) {
    Floats x = read(s + i);
    switch (scoring) {
      case sparing::Scoring::sigmoid: x = 1.0f / (1.0f + exp(-x)); break;
      case sparing::Scoring::sqrtsoftplus: x = root(softplus(larger(splat(kLeastLogit), x))); break;
      case sparing::Scoring::softmax: total += x = exp(x - most); break;
    }
    write(s + i, x);
  }
  const float whole = sum(total);
  if (scoring == sparing::Scoring::softmax)
    for (int64_t i = 0; i < padded; i += W) write(s + i, read(s + i) / whole);
}

template <class T>
void route_of(const sparing::Route& r) {
  int64_t padded = round_up(r.experts, W), size = r.experts / r.n_group;
  std::vector<float> scores(size_t(r.tokens * padded), -kInfinity), biased(size_t(padded), 0.0f);
  std::vector<float> strength(size_t(r.n_group));
  std::vector<char> wanted(size_t(r.experts), !r.given || r.scoring == sparing::Scoring::softmax);
  if (r.given)
    for (int64_t i = 0; i < r.tokens * r.k; ++i) wanted[r.given[i]] = true;
  int64_t step = round_up(greater(1, kGatePieceBytes / int64_t(sizeof(T)) / r.inputs), W);
  sparing::share((r.experts + step - 1) / step, r.threads, [&](int64_t i) {
    for (int64_t o = i * step; o < smaller(r.experts, (i + 1) * step); ++o)
      for (int64_t t = 0; wanted[o] && t < r.tokens; t += kRowsAtOnce) {
        float totals[kRowsAtOnce * W];
        int64_t rows = smaller(kRowsAtOnce, r.tokens - t);
        dot_some<T>(rows, static_cast<const T*>(r.x) + t * r.inputs, static_cast<const T*>(r.gate) + o * r.inputs,
                    r.inputs, r.past_caches, totals);
        for (int64_t m = 0; m < rows; ++m) scores[(t + m) * padded + o] = totals[m * W];
      }
  });
  for (int64_t t = 0; t < r.tokens; ++t) make_scores(&scores[t * padded], padded, r.scoring);
  std::vector<char> flags(size_t(r.experts + r.n_group));
  std::vector<int64_t> open(size_t(r.topk_group));
  auto taken = reinterpret_cast<bool*>(flags.data());
  auto choose = [&](const float* s, int64_t* ids) {
    for (int64_t i = 0; i < padded; i += W)
      write(&biased[i], r.bias ? read(s + i) + read(r.bias + i, greater(0, r.experts - i)) : read(s + i));
    bool some = r.topk_group < r.n_group;
    for (int64_t i = 0; i < r.experts; ++i) taken[i] = some;
    if (some) {
      for (int64_t g = 0; g < r.n_group; ++g) {
        float best[2] = {-__builtin_inff(), -__builtin_inff()};
        for (int64_t i = g * size; i < (g + 1) * size; ++i) {
          if (is_better(biased[i], best[0]))
            best[1] = best[0], best[0] = biased[i];
          else if (is_better(biased[i], best[1]))
            best[1] = biased[i];
        }
        strength[g] = size > 1 ? best[0] + best[1] : best[0];
        taken[r.experts + g] = false;
      }
      take_best(strength.data(), taken + r.experts, r.n_group, r.topk_group, open.data());
      for (int64_t g : open)
        for (int64_t i = g * size; i < (g + 1) * size; ++i) taken[i] = false;
    }
    take_best(biased.data(), taken, r.experts, r.k, ids);
  };
  for (int64_t t = 0; t < r.tokens; ++t) {
    const float* s = &scores[t * padded];
    if (!r.given) choose(s, r.ids + t * r.k);
    const int64_t* ids = (r.given ? r.given : r.ids) + t * r.k;
    float total = 0;
    for (int64_t j = 0; j < r.k; ++j) total += s[ids[j]];
    float factor = r.normalize ? 1 / (total + 1e-20f) : 1.0f;
    for (int64_t j = 0; j < r.k; ++j) r.weights[t * r.k + j] = s[ids[j]] * factor * r.scale;
  }
}

void route(sparing::Type type, const sparing::Route& r) {
  type == sparing::Type::float32 ? route_of<float>(r) : route_of<bf16>(r);
}

}  // namespace
