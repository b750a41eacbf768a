// What stands between the products of a layer: norms and rotations. Each in one pass, in float32, with one rounding. An element's result does not depend on where in a vector it lies.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kPieceNumbers = 16 << 10;  // the share a thread takes at a time

// Calls rows(first, last) over stretches of rows of `size` numbers.
template <class F>
void over_rows(int64_t rows, int64_t size, int threads, F body) {
  int64_t step = greater(1, kPieceNumbers / greater(1, size));
  sparing::share((rows + step - 1) / step, threads,
                 [&](int64_t i) { body(i * step, smaller(rows, (i + 1) * step)); });
}

template <class T>
void norm_of(const sparing::Norm& n) {
  auto weight = static_cast<const T*>(n.weight);
  over_rows(n.rows, n.size, n.threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      auto x = static_cast<const T*>(n.x) + r * n.size;
      auto y = static_cast<T*>(n.y) + r * n.size;
      Floats squares[2] = {};
      for (int64_t i = 0; i < n.size; i += W) {
        Floats v = read(x + i, n.size - i);
        squares[i / W % 2] += v * v;
      }
      float factor = 1 / __builtin_sqrtf(sum(squares[0] + squares[1]) / float(n.size) + n.eps);
      for (int64_t i = 0; i < n.size; i += W) {
        Floats v = read(x + i, n.size - i) * factor;
        write(y + i, weight ? v * read(weight + i, n.size - i) : v, n.size - i);
      }
    }
  });
}

template <class T>
void rotation_of(const sparing::Rotation& p) {
  over_rows(p.tokens, p.heads * p.d, p.threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first * p.heads; row < last * p.heads; ++row) {
      auto x = static_cast<const T*>(p.x) + row * p.d;
      auto y = static_cast<T*>(p.y) + row * p.d;
      auto cos = static_cast<const T*>(p.cos) + row / p.heads * p.half;
      auto sin = static_cast<const T*>(p.sin) + row / p.heads * p.half;
      for (int64_t i = 0; i < p.half; i += W) {
        int64_t n = p.half - i;
        Floats a = read(x + i, n), b = read(x + p.half + i, n), c = read(cos + i, n), s = read(sin + i, n);
        write(y + i, a * c - b * s, n);
        write(y + p.half + i, b * c + a * s, n);
      }
      memcpy(y + 2 * p.half, x + 2 * p.half, (p.d - 2 * p.half) * sizeof(T));
    }
  });
}

void norm(sparing::Type type, const sparing::Norm& n) {
  type == sparing::Type::float32 ? norm_of<float>(n) : norm_of<bf16>(n);
}

void rotation(sparing::Type type, const sparing::Rotation& r) {
  type == sparing::Type::float32 ? rotation_of<float>(r) : rotation_of<bf16>(r);
}

}  // namespace
