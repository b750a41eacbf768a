// Products with few rows of x: a weight is read once, in the order it lies in memory, and meets all rows.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

constexpr int kRowsAtOnce = 8;
constexpr int64_t kPieceBytes = 128 << 10;  // of weights, the share a thread takes at a time
constexpr int64_t kAheadBytes = 4096;       // with several rows the arithmetic hides the fetching, if it is early

// R rows of x times weight rows first..last-1. Each (row, output) has two chains of sums, whatever R is: a row's result
// does not depend on how many there are.
template <class T, int R>
void product_rows(const T* x, int64_t x_stride, const T* w, const T* bias, T* y, int64_t in, int64_t out, int64_t first,
                  int64_t last) {
  constexpr int N = Line<T>::size;
  for (int64_t o = first; o < last; ++o) {
    const T* row = w + o * in;
    Floats sums[R][2] = {};
    int64_t i = 0;
    for (; i + 2 * N <= in; i += 2 * N) {
      for (int half = 0; half < 2; ++half) {
        if (R > 2) prefetch(reinterpret_cast<const char*>(row + i + half * N) + kAheadBytes);
        Line<T> weight = Line<T>::read(row + i + half * N);
        for (int r = 0; r < R; ++r)
          sums[r][half] = weight.dot(Line<T>::read(x + r * x_stride + i + half * N), sums[r][half]);
      }
    }
    for (int half = 0; i < in; i += N, ++half) {
      int n = int(in - i < N ? in - i : N);
      Line<T> weight = Line<T>::read(row + i, n);
      for (int r = 0; r < R; ++r) sums[r][half] = weight.dot(Line<T>::read(x + r * x_stride + i, n), sums[r][half]);
    }
    for (int r = 0; r < R; ++r) {
      float total = sum(sums[r][0] + sums[r][1]);
      y[r * out + o] = narrow<T>(bias ? total + widen(bias[o]) : total);
    }
  }
}

template <class T>
void product_of(const sparing::Product& p) {
  auto w = static_cast<const T*>(p.w), bias = static_cast<const T*>(p.bias);
  int64_t step = kPieceBytes / int64_t(sizeof(T)) / (p.in ? p.in : 1);
  step = step < 1 ? 1 : step;
  int64_t pieces = (p.out + step - 1) / step;
  sparing::share(pieces, pieces > 2 ? p.threads : 1, [&](int64_t i) {
    int64_t first = i * step, last = first + step < p.out ? first + step : p.out;
    for (int64_t r = 0; r < p.rows; r += kRowsAtOnce) {
      auto x = static_cast<const T*>(p.x) + r * p.x_stride;
      auto y = static_cast<T*>(p.y) + r * p.out;
      switch (p.rows - r) {
#define ROWS(R) \
  product_rows<T, R>(x, p.x_stride, w, bias, y, p.in, p.out, first, last); \
  break;
        case 1: ROWS(1)
        case 2: ROWS(2)
        case 3: ROWS(3)
        case 4: ROWS(4)
        case 5: ROWS(5)
        case 6: ROWS(6)
        case 7: ROWS(7)
        default: ROWS(8)
#undef ROWS
      }
    }
  });
}

void product(sparing::Type type, const sparing::Product& p) {
  type == sparing::Type::float32 ? product_of<float>(p) : product_of<bf16>(p);
}

}  // namespace
