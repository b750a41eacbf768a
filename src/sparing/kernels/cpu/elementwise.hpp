// What stands between the products of a layer: norms, rotations and the residual. In float32; what leaves a norm
// or a sum is rounded. An element's result does not depend on where in a vector it lies.
#pragma once

#include <vector>

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
void norm_row(const T* x, const T* weight, T* y, int64_t size, float eps, float shift) {
  float factor = norm_factor(x, size, eps);
  for (int64_t i = 0; i < size; i += W) {
    Floats v = read(x + i, size - i) * factor;
    write(y + i, weight ? v * (read(weight + i, size - i) + shift) : v, size - i);
  }
}

template <class T>
void norm_of(const sparing::Norm& n) {
  over_rows(n.rows, n.size, n.threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      norm_row(static_cast<const T*>(n.x) + r * n.size, static_cast<const T*>(n.weight),
               static_cast<T*>(n.y) + r * n.size, n.size, n.eps, n.shift);
  });
}

// Pairs of numbers that lie `half` apart.
template <class T, class Table>
void turn_halves(const T* x, const Table* cos, const Table* sin, int64_t half, T* y) {
  for (int64_t i = 0; i < half; i += W) {
    int64_t n = half - i;
    Floats a = read(x + i, n), b = read(x + half + i, n), c = read(cos + i, n), s = read(sin + i, n);
    write(y + i, a * c - b * s, n);
    write(y + half + i, b * c + a * s, n);
  }
}

// Pairs of neighbours: cos [2 half] holds each number twice, sin [2 half] also, the first of the two negative.
template <class T>
void turn_pairs(const T* x, const float* cos, const float* sin, int64_t half, T* y) {
  typedef uint64_t Longs __attribute__((vector_size(4 * W)));
  for (int64_t i = 0; i < 2 * half; i += W) {
    int64_t n = 2 * half - i;
    Floats v = read(x + i, n);
    Floats swapped = (Floats)((Longs)v << 32 | (Longs)v >> 32);
    write(y + i, v * read(cos + i, n) + swapped * read(sin + i, n), n);
  }
}

template <class T, class Table>
void rotation_of(const sparing::Rotation& p) {
  over_rows(p.tokens, p.heads * p.d, p.threads, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> room;
    bool is_paired = p.layout == sparing::Layout::pairs;
    if (is_paired) room.resize(size_t(4 * p.half));
    float *cos_twice = room.data(), *sin_twice = cos_twice + 2 * p.half;
    int64_t after = p.first + 2 * p.half;
    for (int64_t t = first; t < last; ++t) {
      auto cos = static_cast<const Table*>(p.cos) + t * p.half, sin = static_cast<const Table*>(p.sin) + t * p.half;
      for (int64_t m = 0; is_paired && m < p.half; ++m) {
        cos_twice[2 * m] = cos_twice[2 * m + 1] = widen(cos[m]);
        sin_twice[2 * m] = -widen(sin[m]), sin_twice[2 * m + 1] = widen(sin[m]);
      }
      for (int64_t row = t * p.heads; row < (t + 1) * p.heads; ++row) {
        auto x = static_cast<const T*>(p.x) + row * p.d;
        auto y = static_cast<T*>(p.y) + row * p.d;
        if (p.norms) {
          norm_row(x, static_cast<const T*>(p.norm), y, p.d, p.eps, p.shift);
          x = y;
        } else {
          memcpy(y, x, p.first * sizeof(T));
          memcpy(y + after, x + after, (p.d - after) * sizeof(T));
        }
        if (is_paired)
          turn_pairs(x + p.first, cos_twice, sin_twice, p.half, y + p.first);
        else
          turn_halves(x + p.first, cos, sin, p.half, y + p.first);
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
        if (before) branch *= read(before + i, n) + p.shift;
        write(sum + i, (read(x + i, n) + branch) * scale, n);
      }
      if (after) norm_row(sum, after, static_cast<T*>(p.normed) + r * p.size, p.size, p.eps, p.shift);
    }
  });
}

void norm(sparing::Type type, const sparing::Norm& n) {
  type == sparing::Type::float32 ? norm_of<float>(n) : norm_of<bf16>(n);
}

void rotation(sparing::Type type, const sparing::Rotation& r) {
  if (type == sparing::Type::float32) return rotation_of<float, float>(r);
  r.wide ? rotation_of<bf16, float>(r) : rotation_of<bf16, bf16>(r);
}

void residual(sparing::Type type, const sparing::Residual& r) {
  type == sparing::Type::float32 ? residual_of<float>(r) : residual_of<bf16>(r);
}

}  // namespace
