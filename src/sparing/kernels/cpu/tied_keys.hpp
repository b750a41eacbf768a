// Keys made from the values of a layer that projects both with one matrix: weighted, then rotated.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

// In float32 the keys are bit for bit what norm and rotation make of the projection. In bfloat16 the weight of the pairs
// that do not turn goes into the query instead: a key is then mostly its value, and is rounded less often.
template <class T>
class TiedKeys {
 public:
  // Of one kv head.
  TiedKeys(const sparing::TiedKeys& tied, int64_t head, int64_t d)
      : turning(tied.turning), head(head), d(d), half(d / 2), weight(static_cast<const T*>(tied.weight)),
        table(static_cast<const T*>(tied.table)) {}

  // What the query [d] takes over from the keys.
  void fold(T* q) const {
    if (is_narrow) still([&](int64_t i, int64_t n) { write(q + i, read(q + i, n) * read(weight + i, n), n); });
  }

  // The keys of `count` values v [count, d], v_key apart, of which the first is number `at` of `where`: rows k_key apart of
  // k_size numbers, zeros after the first d.
  template <class K>
  void make(const T* v, int64_t v_key, const sparing::Positions& where, int64_t at, int count, K* k, int64_t k_key,
            int64_t k_size) const {
    const int32_t* positions = where.positions ? where.positions + head * where.head : nullptr;
    for (int i = 0; i < count; ++i, v += v_key, k += k_key) {
      const T* cos = table + (positions ? positions[at + i] : where.first + at + i) * 2 * turning;
      const T* sin = cos + turning;
      for (int64_t j = 0; j < turning; j += W) {
        int64_t n = turning - j;
        Floats x = read(v + j, n) * read(weight + j, n), y = read(v + half + j, n) * read(weight + half + j, n);
        Floats c = read(cos + j, n), s = read(sin + j, n);
        write(k + j, x * c - y * s, n);
        write(k + half + j, y * c + x * s, n);
      }
      if constexpr (is_narrow) {
        copy(k + turning, v + turning, half - turning);
        copy(k + half + turning, v + half + turning, d - half - turning);
      } else {
        still([&](int64_t j, int64_t n) { write(k + j, read(v + j, n) * read(weight + j, n), n); });
      }
      memset(k + d, 0, (k_size - d) * sizeof(K));
    }
  }

 private:
  static constexpr bool is_narrow = sizeof(T) == 2;
  int64_t turning, head, d, half;
  const T *weight, *table;

  // Calls body(i, n) for vectors of up to W numbers from i on, of what does not turn.
  template <class F>
  void still(F body) const {
    for (int64_t i = turning; i < half; i += W) body(i, smaller(W, half - i));
    for (int64_t i = half + turning; i < d; i += W) body(i, smaller(W, d - i));
  }

  static void copy(T* to, const T* from, int64_t n) {
    constexpr int N = Line<T>::size;
    int64_t i = 0;
    for (; i + N <= n; i += N) store(to + i, load<Words>(from + i));
    memcpy(to + i, from + i, (n - i) * sizeof(T));
  }
};

}  // namespace
