// A residual stream of n copies: what a branch reads of them, and what they are after it. Weights are made in float32, for
// W tokens at a time where matrices are normalised.
#pragma once

#include <vector>

#include "elementwise.hpp"
#include "kernels.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kHyperTokens = 16;            // a piece: a multiple of W
constexpr int64_t kHyperColumns = 512;          // of X, widened at a time
constexpr int kFunctions = W == 16 ? 6 : 3;     // at a time, for four tokens: as many sums as there are registers for
constexpr int64_t kSharedFunctions = 64 << 10;  // numbers of fn from which a second thread is worth waking

// Row r of the sums of a block: x[r] times each of the rows of fn, `columns` of both. Tokens lie kHyperColumns apart and
// end in zeros; what a sum holds does not depend on R.
template <int R>
void add_functions(const float* x, const float* const* fn, int64_t columns, Floats* sums, int64_t stride) {
  Floats s[R][kFunctions];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < kFunctions; ++o) s[r][o] = sums[r * stride + o];
  auto step = [&](int64_t i, const Floats* w) {
    for (int r = 0; r < R; ++r) {
      Floats v = load<Floats>(x + r * kHyperColumns + i);
      for (int o = 0; o < kFunctions; ++o) s[r][o] += v * w[o];
    }
  };
  int64_t i = 0;
  Floats w[kFunctions];
  for (; i + W <= columns; i += W) {
    for (int o = 0; o < kFunctions; ++o) w[o] = read(fn[o] + i);
    step(i, w);
  }
  if (i < columns) {
    for (int o = 0; o < kFunctions; ++o) w[o] = read(fn[o] + i, columns - i);
    step(i, w);
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < kFunctions; ++o) sums[r * stride + o] = s[r][o];
}

// Rows, then columns, again and again, of W matrices: eps after the softmax of the rows and in every sum.
template <int N>
void sinkhorn(Floats (*c)[N], int64_t iters, float eps) {
  for (int j = 0; j < N; ++j) {
    Floats most = c[j][0], total{};
    for (int k = 1; k < N; ++k) most = larger(most, c[j][k]);
    for (int k = 0; k < N; ++k) total += c[j][k] = exp(c[j][k] - most);
    for (int k = 0; k < N; ++k) c[j][k] = c[j][k] / total + eps;
  }
  for (int64_t i = 0; i < iters; ++i) {
    for (int j = 0; j < N && i; ++j) {
      Floats total = c[j][0];
      for (int k = 1; k < N; ++k) total += c[j][k];
      for (int k = 0; k < N; ++k) c[j][k] /= total + eps;
    }
    for (int k = 0; k < N; ++k) {
      Floats total = c[0][k];
      for (int j = 1; j < N; ++j) total += c[j][k];
      for (int j = 0; j < N; ++j) c[j][k] /= total + eps;
    }
  }
}

template <class T, int N>
class HyperPreRun {
 public:
  explicit HyperPreRun(const sparing::HyperPre& p) : p(p) {
    functions = p.post ? (2 + N) * N : N;
    groups = (functions + kFunctions - 1) / kFunctions;
    width = N * p.size;
    stride = groups * kFunctions;
    totals.resize(size_t(p.tokens * (functions + 1)));
    int64_t pieces = (p.tokens + kHyperTokens - 1) / kHyperTokens, parts = 1;
    if (pieces < p.threads && functions * width >= kSharedFunctions) parts = smaller(groups, p.threads / pieces);
    sparing::share(pieces * parts, p.threads, [&](int64_t i) {
      int64_t first = i / parts * kHyperTokens, last = smaller(p.tokens, first + kHyperTokens), part = i % parts;
      project(first, last - first, part * groups / parts, (part + 1) * groups / parts);
      if (parts == 1) finish(first, last - first);
    });
    if (parts > 1)
      sparing::share(pieces, p.threads, [&](int64_t i) {
        finish(i * kHyperTokens, smaller(kHyperTokens, p.tokens - i * kHyperTokens));
      });
  }

 private:
  sparing::HyperPre p;
  int64_t functions, groups, width, stride;
  std::vector<float> totals;  // [tokens, functions + 1]: the products with X, and its squares, added up

  const T* streams(int64_t token) const { return static_cast<const T*>(p.x) + token * width; }

  // The products of tokens with the functions of some groups; with the first of them also the squares.
  void project(int64_t first, int64_t count, int64_t from, int64_t to) {
    alignas(64) float x[kHyperTokens * kHyperColumns];
    static thread_local std::vector<Floats> sums;  // [count, stride]
    Floats squares[kHyperTokens] = {};
    sums.assign(size_t(count * stride), Floats{});
    for (int64_t at = 0; at < width; at += kHyperColumns) {
      int64_t columns = smaller(kHyperColumns, width - at);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t i = 0; i < columns; i += W) {
          Floats v = read(streams(first + t) + at + i, columns - i);
          squares[t] += v * v;
          store(x + t * kHyperColumns + i, v);
        }
      for (int64_t g = from; g < to; ++g) {
        const float* fn[kFunctions];
        for (int o = 0; o < kFunctions; ++o) fn[o] = p.fn + smaller(functions - 1, g * kFunctions + o) * width + at;
        for (int64_t t = 0; t < count; t += 4) {
          const float* rows = x + t * kHyperColumns;
          Floats* block = &sums[size_t(t * stride + g * kFunctions)];
          switch (smaller(4, count - t)) {
            case 1: add_functions<1>(rows, fn, columns, block, stride); break;
            case 2: add_functions<2>(rows, fn, columns, block, stride); break;
            case 3: add_functions<3>(rows, fn, columns, block, stride); break;
            default: add_functions<4>(rows, fn, columns, block, stride);
          }
        }
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      float* token = &totals[size_t((first + t) * (functions + 1))];
      for (int64_t o = from * kFunctions; o < smaller(functions, to * kFunctions); ++o)
        token[o] = sum(sums[size_t(t * stride + o)]);
      if (from == 0) token[functions] = sum(squares[t]);
    }
  }

  // Function o of the next W tokens, of which there may be fewer.
  Floats logits(const float (*v)[W], int64_t o, int kind) const {
    return load<Floats>(v[o]) * p.scale[kind] + p.base[o];
  }

  static Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

  void finish(int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; t += W) weigh(first + t, int(smaller(W, count - t)));
  }

  void weigh(int64_t first, int count) {
    float v[(2 + N) * N][W] = {};  // tokens last
    for (int t = 0; t < count; ++t) {
      const float* token = &totals[size_t((first + t) * (functions + 1))];
      float factor = 1 / __builtin_sqrtf(token[functions] / float(width) + p.norm_eps);
      for (int64_t o = 0; o < functions; ++o) v[o][t] = token[o] * factor;
    }
    float pre[N][W];
    for (int j = 0; j < N; ++j) store(pre[j], sigmoid(logits(v, j, 0)) + p.eps);
    for (int t = 0; t < count; ++t) collapse(first + t, pre, t);
    if (!p.post) return;
    for (int j = 0; j < N; ++j) {
      float weights[W];
      store(weights, 2.0f * sigmoid(logits(v, N + j, 1)));
      for (int t = 0; t < count; ++t) p.post[(first + t) * N + j] = weights[t];
    }
    Floats comb[N][N];
    for (int j = 0; j < N; ++j)
      for (int k = 0; k < N; ++k) comb[j][k] = logits(v, (2 + j) * N + k, 2);
    sinkhorn<N>(comb, p.iters, p.eps);
    for (int j = 0; j < N; ++j)
      for (int k = 0; k < N; ++k) {
        float weights[W];
        store(weights, comb[j][k]);
        for (int t = 0; t < count; ++t) p.comb[((first + t) * N + j) * N + k] = weights[t];
      }
  }

  void collapse(int64_t token, const float (*pre)[W], int lane) const {
    const T* x = streams(token);
    T* u = static_cast<T*>(p.u) + token * p.size;
    for (int64_t i = 0; i < p.size; i += W) {
      Floats total{};
      for (int j = 0; j < N; ++j) total += read(x + j * p.size + i, p.size - i) * pre[j][lane];
      write(u + i, total, p.size - i);
    }
  }
};

template <class T, int N>
void hyper_post_of(const sparing::HyperPost& p) {
  over_rows(p.tokens, N * p.size, p.threads, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      auto x = static_cast<const T*>(p.x) + t * N * p.size, y = static_cast<const T*>(p.y) + t * p.size;
      auto out = static_cast<T*>(p.out) + t * N * p.size;
      const float *post = p.post + t * N, *comb = p.comb + t * N * N;
      for (int64_t i = 0; i < p.size; i += W) {
        int64_t left = p.size - i;
        Floats branch = read(y + i, left), streams[N];
        for (int j = 0; j < N; ++j) streams[j] = read(x + j * p.size + i, left);
        for (int k = 0; k < N; ++k) {
          Floats total = branch * post[k];
          for (int j = 0; j < N; ++j) total += streams[j] * comb[j * N + k];
          write(out + k * p.size + i, total, left);
        }
      }
    }
  });
}

#define STREAMS(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)

template <class T>
void hyper_pre_of(const sparing::HyperPre& p) {
  switch (p.streams) {
#define CASE(N) \
  case N: HyperPreRun<T, N>{p}; return;
    STREAMS(CASE)
#undef CASE
  }
}

template <class T>
void hyper_post_with(const sparing::HyperPost& p) {
  switch (p.streams) {
#define CASE(N) \
  case N: return hyper_post_of<T, N>(p);
    STREAMS(CASE)
#undef CASE
  }
}
#undef STREAMS

void hyper_pre(sparing::Type type, const sparing::HyperPre& p) {
  type == sparing::Type::float32 ? hyper_pre_of<float>(p) : hyper_pre_of<bf16>(p);
}

void hyper_post(sparing::Type type, const sparing::HyperPost& p) {
  type == sparing::Type::float32 ? hyper_post_with<float>(p) : hyper_post_with<bf16>(p);
}

}  // namespace
