// What stands between the products of a layer: norms, rotations and the residual. In float32; what leaves a norm
// or a sum is rounded. An element's result does not depend on where in a vector it lies.
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

// What x has to be multiplied by for a mean square of one.
template <class T>
float norm_factor(const T* x, int64_t size, float eps) {
  Floats squares[2] = {};
  for (int64_t i = 0; i < size; i += W) {
    Floats v = read(x + i, size - i);
    squares[i / W % 2] += v * v;
  }
  return 1 / __builtin_sqrtf(sum(squares[0] + squares[1]) / float(size) + eps);
}

template <class T>
void norm_row(const T* x, const T* weight, T* y, int64_t size, float eps) {
  float factor = norm_factor(x, size, eps);
  for (int64_t i = 0; i < size; i += W) {
    Floats v = read(x + i, size - i) * factor;
    write(y + i, weight ? v * read(weight + i, size - i) : v, size - i);
  }
}

template <class T>
void norm_of(const sparing::Norm& n) {
  over_rows(n.rows, n.size, n.threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      norm_row(static_cast<const T*>(n.x) + r * n.size, static_cast<const T*>(n.weight),
               static_cast<T*>(n.y) + r * n.size, n.size, n.eps);
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
      if (p.norm) {
        norm_row(x, static_cast<const T*>(p.norm), y, p.d, p.eps);
        x = y;
      } else {
        memcpy(y + 2 * p.half, x + 2 * p.half, (p.d - 2 * p.half) * sizeof(T));
      }
      for (int64_t i = 0; i < p.half; i += W) {
        int64_t n = p.half - i;
        Floats a = read(x + i, n), b = read(x + p.half + i, n), c = read(cos + i, n), s = read(sin + i, n);
        write(y + i, a * c - b * s, n);
        write(y + p.half + i, b * c + a * s, n);
      }
    }
  });
}

template <class T>
void residual_of(const sparing::Residual& p) {
  auto before = static_cast<const T*>(p.before), after = static_cast<const T*>(p.after);
  float scale = p.scale ? widen(*static_cast<const T*>(p.scale)) : 1.0f;
  over_rows(p.rows, p.size, p.threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      auto x = static_cast<const T*>(p.x) + r * p.size, y = static_cast<const T*>(p.y) + r * p.size;
      auto sum = static_cast<T*>(p.sum) + r * p.size;
      float factor = before ? norm_factor(y, p.size, p.eps) : 1.0f;
      for (int64_t i = 0; i < p.size; i += W) {
        int64_t n = p.size - i;
        Floats branch = read(y + i, n) * factor;
        if (before) branch *= read(before + i, n);
        write(sum + i, (read(x + i, n) + branch) * scale, n);
      }
      if (after) norm_row(sum, after, static_cast<T*>(p.normed) + r * p.size, p.size, p.eps);
    }
  });
}

void norm(sparing::Type type, const sparing::Norm& n) {
  type == sparing::Type::float32 ? norm_of<float>(n) : norm_of<bf16>(n);
}

void rotation(sparing::Type type, const sparing::Rotation& r) {
  type == sparing::Type::float32 ? rotation_of<float>(r) : rotation_of<bf16>(r);
}

void residual(sparing::Type type, const sparing::Residual& r) {
  type == sparing::Type::float32 ? residual_of<float>(r) : residual_of<bf16>(r);
}

}  // namespace
