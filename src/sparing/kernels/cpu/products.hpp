// Products with few rows of x: a weight is read once, in the order it lies in memory, and meets all rows.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

constexpr int kRowsAtOnce = 8;
constexpr int64_t kPieceBytes = 128 << 10;  // of weights, the share a thread takes at a time
constexpr int64_t kAheadBytes = 4096;       // with several rows the arithmetic hides the fetching, if it is early

// Both activations are x * sigmoid(z): z = x, or z = sqrt(8 / pi) * (x + 0.044715 x^3).
inline Floats activate(Floats x, sparing::Activation activation) {
  if (activation == sparing::Activation::none) return x;
  Floats z = activation == sparing::Activation::gelu ? 1.5957691216f * (x + 0.044715f * (x * x * x)) : x;
  return x / (1.0f + exp(-z));
}

// What a gate is cut off at, and what it is multiplied by. NaN stays.
inline Floats below(Floats x, float limit) { return lesser(splat(limit), x); }
inline Floats within(Floats x, float limit) { return larger(splat(-limit), below(x, limit)); }

// totals[r * W]: the sums of R rows of x with one row of weights. Each has two chains of sums, whatever R is: a row's
// result does not depend on how many there are.
template <class T, int R>
void dot_rows(const T* x, const T* w, int64_t in, bool past_caches, float* totals) {
  constexpr int N = Line<T>::size;
  Floats sums[R][2] = {};
  int64_t i = 0;
  for (; i + 2 * N <= in; i += 2 * N) {
    for (int half = 0; half < 2; ++half) {
      // Few rows run at the speed of memory, which hardware fetches in time by itself. But all the weights would pass
      // through the caches, and between two products everything else, Python above all, start cold.
      if (R > 2)
        prefetch(reinterpret_cast<const char*>(w + i + half * N) + kAheadBytes);
      else
        prefetch_once(w + i + half * N, past_caches);
      Line<T> weight = Line<T>::read(w + i + half * N);
      for (int r = 0; r < R; ++r)
        sums[r][half] = weight.dot(Line<T>::read(x + r * in + i + half * N), sums[r][half]);
    }
  }
  for (int half = 0; i < in; i += N, ++half) {
    int n = int(smaller(N, in - i));
    Line<T> weight = Line<T>::read(w + i, n);
    for (int r = 0; r < R; ++r) sums[r][half] = weight.dot(Line<T>::read(x + r * in + i, n), sums[r][half]);
  }
  for (int r = 0; r < R; ++r) totals[r * W] = sum(sums[r][0] + sums[r][1]);
}

// totals[r * W]: the same of any number of rows, at most kRowsAtOnce.
template <class T>
void dot_some(int64_t rows, const T* x, const T* w, int64_t in, bool past_caches, float* totals) {
  switch (rows) {
#define ROWS(R) \
  case R:       \
    return dot_rows<T, R>(x, w, in, past_caches, totals);
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8)
#undef ROWS
  }
}

// One of the matrices of a product, and what becomes of the sums.
template <class T>
struct Matrix {
  const T *w, *bias;
  T* y;
  sparing::Activation activation;
  bool multiplies;  // what y holds already
  float limit;
};

// The matrices of one group, the second with w null where there is none.
template <class T>
struct Group {
  const T* x;
  Matrix<T> one, two;
  Group(const sparing::Product& p, int64_t g)
      : x(static_cast<const T*>(p.x) + g * p.rows * p.inputs),
        one{matrix(p.w, g * p.outputs * p.inputs), matrix(p.bias, g * p.outputs), y(p.y, p, g), p.activation, false,
            p.limit},
        two{matrix(p.w2, g * p.outputs * p.inputs), matrix(p.bias2, g * p.outputs), y(p.y2 ? p.y2 : p.y, p, g),
            sparing::Activation::none, !p.y2, p.limit} {}

 private:
  static const T* matrix(const void* of, int64_t at) { return of ? static_cast<const T*>(of) + at : nullptr; }
  static T* y(void* of, const sparing::Product& p, int64_t g) { return static_cast<T*>(of) + g * p.rows * p.outputs; }
};

template <class T, int R>
void product_rows(const sparing::Product& p, const Matrix<T>& m, const T* x, int64_t row, int64_t first, int64_t last) {
  for (int64_t o = first; o < last; o += W) {
    float totals[R][W] = {};
    int64_t n = smaller(W, last - o);
    for (int64_t c = 0; c < n; ++c)
      dot_rows<T, R>(x + row * p.inputs, m.w + (o + c) * p.inputs, p.inputs, p.past_caches, &totals[0][c]);
    for (int r = 0; r < R; ++r) {
      int64_t at = (row + r) * p.outputs + o;
      T* y = m.y + at;
      Floats sums = load<Floats>(totals[r]);
      if (m.bias) sums += read(m.bias + o, n);
      if (p.wide)
        write(reinterpret_cast<float*>(m.y) + at, activate(below(sums, m.limit), m.activation), n);
      else
        write(y, m.multiplies ? read(y, n) * within(sums, m.limit) : activate(below(sums, m.limit), m.activation), n);
    }
  }
}

template <class T>
void product_piece(const sparing::Product& p, const Matrix<T>& m, const T* x, int64_t first, int64_t last) {
  for (int64_t r = 0; r < p.rows; r += kRowsAtOnce) switch (p.rows - r) {
#define ROWS(R) \
  product_rows<T, R>(p, m, x, r, first, last); \
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

template <class T>
void product_of_few_rows(const sparing::Product& p) {
  int64_t step = round_up(greater(1, kPieceBytes / int64_t(sizeof(T)) / p.inputs), W);
  int64_t pieces = (p.outputs + step - 1) / step, matrices = p.w2 ? 2 : 1;
  sparing::share(p.groups * pieces, p.groups * pieces * matrices > 2 ? p.threads : 1, [&](int64_t i) {
    Group<T> group(p, i / pieces);
    int64_t first = i % pieces * step, last = smaller(first + step, p.outputs);
    product_piece(p, group.one, group.x, first, last);
    if (group.two.w) product_piece(p, group.two, group.x, first, last);
  });
}

}  // namespace
