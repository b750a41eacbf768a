// A mixture of experts for few tokens: the two products of each chosen expert. Only what was chosen is read, each expert
// once for all of its tokens.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "products.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kExpertPieceBytes = 32 << 10;  // of weights, the share a thread takes at a time

inline Floats expert_activation(Floats gate, Floats up, sparing::ExpertActivation activation, float limit) {
  using sparing::Activation, sparing::ExpertActivation;
  if (activation == ExpertActivation::relu2) {
    Floats positive = larger(Floats{}, gate);  // NaN of NaN
    return positive * positive;
  }
  auto of_gate = activation == ExpertActivation::gated_gelu ? Activation::gelu : Activation::silu;
  return activate(below(gate, limit), of_gate) * within(up, limit);
}

// Pairs of a token and an expert it chose, sorted by expert.
struct Pairs {
  struct Used {
    int64_t expert, first, count;  // its pairs, in the order they lie in
  };
  int64_t k;
  std::vector<Used> used;
  std::vector<int64_t> place;  // where pair (token, choice) lies
  std::vector<int64_t> token;  // of the pair that lies there

  Pairs(const int64_t* ids, int64_t tokens, int64_t k) : k(k), place(size_t(tokens * k), -1) {
    int64_t count = tokens * k;
    auto chosen = [&](int64_t pair) { return ids ? ids[pair] : 0; };
    for (int64_t i = 0; i < count; ++i) {
      if (place[i] >= 0) continue;
      used.push_back({chosen(i), int64_t(token.size()), 0});
      for (int64_t j = i; j < count; ++j) {
        if (place[j] >= 0 || chosen(j) != used.back().expert) continue;
        place[j] = int64_t(token.size());
        token.push_back(j / k);
        ++used.back().count;
      }
    }
  }

  int64_t size() const { return int64_t(token.size()); }

  // n sums over the choices of token t, in their own order: products[place * stride ..] weighed; weights null: 1.
  Floats mix(int64_t t, const float* weights, const float* products, int64_t stride, int64_t n) const {
    Floats sums{};
    for (int64_t j = t * k; j < (t + 1) * k; ++j)
      sums += read(products + place[j] * stride, n) * (weights ? weights[j] : 1.0f);
    return sums;
  }
};

template <class T>
class ExpertsRun {
 public:
  explicit ExpertsRun(const sparing::Experts& e) : e(e), pairs(e.ids, e.tokens, e.k) {
    x.resize(size_t(pairs.size() * e.inputs));
    for (int64_t i = 0; i < pairs.size(); ++i)
      memcpy(&x[i * e.inputs], static_cast<const T*>(e.x) + pairs.token[i] * e.inputs, e.inputs * sizeof(T));
    bool is_gated = e.activation != sparing::ExpertActivation::relu2;
    int64_t step = stretch(e.inputs * (is_gated ? 2 : 1)), across = (e.width + step - 1) / step;
    hidden.resize(size_t(pairs.size() * e.width));
    sparing::share(int64_t(pairs.used.size()) * across, e.threads, [&](int64_t i) {
      int64_t first = i % across * step;
      up(pairs.used[i / across], first, smaller(e.width, first + step), is_gated);
    });
    step = stretch(pairs.size() * e.width / e.tokens);
    sparing::share((e.inputs + step - 1) / step, e.threads,
                   [&](int64_t i) { down(i * step, smaller(e.inputs, (i + 1) * step)); });
  }

 private:
  sparing::Experts e;
  Pairs pairs;
  std::vector<T> x, hidden;  // [pairs, in], [pairs, width]

  static int64_t stretch(int64_t numbers) {
    return round_up(greater(1, kExpertPieceBytes / int64_t(sizeof(T)) / greater(1, numbers)), W);
  }

  void up(const Pairs::Used& u, int64_t first, int64_t last, bool is_gated) {
    int64_t outs = e.width * (is_gated ? 2 : 1);
    const T* w = static_cast<const T*>(e.up) + u.expert * outs * e.inputs;
    for (int64_t p = 0; p < u.count; p += kRowsAtOnce) {
      int64_t rows = smaller(kRowsAtOnce, u.count - p), at = u.first + p;
      for (int64_t o = first; o < last; o += W) {
        float gates[kRowsAtOnce][W] = {}, ups[kRowsAtOnce][W] = {};
        int64_t n = smaller(W, last - o);
        for (int64_t c = 0; c < n; ++c)
          dot_some<T>(rows, &x[at * e.inputs], w + (o + c) * e.inputs, e.inputs, e.past_caches, &gates[0][c]);
        if (is_gated)
          for (int64_t c = 0; c < n; ++c)
            dot_some<T>(rows, &x[at * e.inputs], w + (e.width + o + c) * e.inputs, e.inputs, e.past_caches, &ups[0][c]);
        for (int64_t r = 0; r < rows; ++r)
          write(&hidden[(at + r) * e.width + o],
                expert_activation(load<Floats>(gates[r]), load<Floats>(ups[r]), e.activation, e.limit), n);
      }
    }
  }

  // y[first..last) of all tokens: each pair's product, then the sum over a token's choices in their own order.
  void down(int64_t first, int64_t last) const {
    static thread_local std::vector<float> room;
    room.assign(size_t(pairs.size() * W), 0.0f);
    for (int64_t o = first; o < last; o += W) {
      int64_t n = smaller(W, last - o);
      for (const Pairs::Used& u : pairs.used) {
        const T* w = static_cast<const T*>(e.down) + (u.expert * e.inputs + o) * e.width;
        for (int64_t p = 0; p < u.count; p += kRowsAtOnce)
          for (int64_t c = 0; c < n; ++c)
            dot_some<T>(smaller(kRowsAtOnce, u.count - p), &hidden[(u.first + p) * e.width], w + c * e.width, e.width,
                        e.past_caches, &room[(u.first + p) * W + c]);
      }
      for (int64_t t = 0; t < e.tokens; ++t)
        write(static_cast<T*>(e.y) + t * e.inputs + o, pairs.mix(t, e.weights, room.data(), W, n), n);
    }
  }
};

void experts(sparing::Type type, const sparing::Experts& e) {
  if (type == sparing::Type::float32)
    ExpertsRun<float>{e};
  else
    ExpertsRun<bf16>{e};
}

}  // namespace
