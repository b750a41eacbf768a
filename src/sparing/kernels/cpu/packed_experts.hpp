// A mixture of experts in few bits for few tokens: experts.hpp with the products of packed.hpp.
#pragma once

#include "experts.hpp"
#include "packed_products.hpp"

namespace {

template <class M, class T>
class PackedExpertsRun {
 public:
  explicit PackedExpertsRun(const sparing::PackedExperts& e)
      : e(e), pairs(e.ids, e.tokens, e.k), x(x_room(), pairs.size(), e.up.inputs),
        hidden(hidden_room(), pairs.size(), e.down.inputs) {
    for (int64_t i = 0; i < pairs.size(); ++i)
      M::lay(static_cast<const T*>(e.x) + pairs.token[i] * e.up.inputs, e.up.inputs, x.row(i));
    int64_t width = e.down.inputs;
    activated.resize(size_t(pairs.size() * width));
    int64_t step = packed_stretch<M>(e.up.inputs), across = (width + step - 1) / step;
    sparing::share(int64_t(pairs.used.size()) * across, e.threads, [&](int64_t i) {
      int64_t first = i % across * step;
      up(pairs.used[i / across], first, smaller(width, first + step));
    });
    for (int64_t i = 0; i < pairs.size(); ++i) M::lay(&activated[i * width], width, hidden.row(i));
    step = greater(1, packed_stretch<M>(width) / int64_t(pairs.used.size()));
    step = round_up(step, W);
    sparing::share((e.down.outputs + step - 1) / step, e.threads,
                   [&](int64_t i) { down(i * step, smaller(e.down.outputs, (i + 1) * step)); });
  }

 private:
  sparing::PackedExperts e;
  Pairs pairs;
  Laid<M> x, hidden;         // [pairs, in], [pairs, width]
  std::vector<T> activated;  // [pairs, width]: hidden units, rounded once

  static std::vector<char>& x_room() {
    static thread_local std::vector<char> buffer;
    return buffer;
  }
  static std::vector<char>& hidden_room() {
    static thread_local std::vector<char> buffer;
    return buffer;
  }

  void up(const Pairs::Used& u, int64_t first, int64_t last) {
    static thread_local std::vector<float> gates, ups;
    int64_t n = last - first, below = e.gate.codes ? 0 : e.down.inputs;  // rows of the gate above those of `up`
    bool is_gated = e.activation != sparing::ExpertActivation::relu2;
    gates.resize(size_t(u.count * n));
    ups.resize(size_t(u.count * n));
    sparing::Packed p = matrix_of(e.up, u.expert), gate = e.gate.codes ? matrix_of(e.gate, u.expert) : p;
    multiply<M>(gate, x.row(u.first), x.stride, u.count, first, last, gates.data(), n);
    if (is_gated) multiply<M>(p, x.row(u.first), x.stride, u.count, below + first, below + last, ups.data(), n);
    for (int64_t r = 0; r < u.count; ++r)
      for (int64_t o = 0; o < n; o += W) {
        int64_t some = smaller(W, n - o);
        Floats gate = read(&gates[r * n + o], some), other = is_gated ? read(&ups[r * n + o], some) : Floats{};
        write(&activated[(u.first + r) * e.down.inputs + first + o],
              expert_activation(gate, other, e.activation, e.limit), some);
      }
  }

  // y[first..last) of all tokens.
  void down(int64_t first, int64_t last) const {
    static thread_local std::vector<float> products;
    int64_t n = last - first;
    products.resize(size_t(pairs.size() * n));
    for (const Pairs::Used& u : pairs.used)
      multiply<M>(matrix_of(e.down, u.expert), hidden.row(u.first), hidden.stride, u.count, first, last,
                  &products[u.first * n], n);
    for (int64_t t = 0; t < e.tokens; ++t)
      for (int64_t o = 0; o < n; o += W) {
        int64_t some = smaller(W, n - o);
        write(static_cast<T*>(e.y) + t * e.down.outputs + first + o,
              pairs.mix(t, e.weights, &products[o], n, some), some);
      }
  }
};

void packed_experts(sparing::Type type, const sparing::PackedExperts& e) {
  by_packing(type, e.up.packing,
             [&](auto m, auto number) { PackedExpertsRun<decltype(m), decltype(number)>{e}; });
}

}  // namespace
