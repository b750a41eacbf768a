// The second product of attention: values of a tile of keys, added up with their weights.
#pragma once

#include "simd.hpp"
#include "softmax.hpp"

namespace {

// run<R>: out[r] = out[r] * factors[r] + sum_i weights[r][i] * v[i] for R rows. `out` holds, line after line of a value,
// `parts` vectors in which lane `lane` of vector `part` belongs to number `place(part, lane)` of the line. `next`, unless
// null, are the next keys: their lines are asked for on the way. weights[r][i] is 0 for i >= count.
template <class T>
struct Mix {
  static constexpr int N = Line<T>::size, P = Line<T>::parts;
  static constexpr bool is_narrow = false;  // whether weights are to be rounded to bf16
  static int place(int part, int lane) { return Line<T>::place(part, lane); }

  template <int R>
  static void run(float (*weights)[kTile], const float* factors, const T* v, int64_t v_key, int count, int64_t dv,
                  float* out, int64_t out_row, const T* next, int64_t k_key) {
    constexpr int B = R <= 2 ? 2 : 1;  // lines at a time: enough sums to hide the latency of adding to them
    int64_t j = 0;
    for (; j + B * N <= dv; j += B * N)
      lines<R, B>(weights, factors, v + j, v_key, count, N, out + j, out_row, next ? next + j : next, k_key);
    for (; j < dv; j += N) {
      int n = int(smaller(N, dv - j));
      lines<R, 1>(weights, factors, v + j, v_key, count, n, out + j, out_row, next ? next + j : next, k_key);
    }
  }

  template <int R, int B>
  static void lines(const float (*weights)[kTile], const float* factors, const T* v, int64_t v_key, int count, int n,
                    float* out, int64_t out_row, const T* next, int64_t k_key) {
    Floats sums[R][B][P];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        for (int p = 0; p < P; ++p) sums[r][b][p] = load<Floats>(out + r * out_row + b * N + p * W) * factors[r];
    for (int i = 0; i < count; ++i)
      for (int b = 0; b < B; ++b) {
        if (next) prefetch(next + i * k_key + b * N);
        const T* at = v + i * v_key + b * N;
        Floats values[P];
        (n == N ? Line<T>::read(at) : Line<T>::read(at, n)).widen(values);
        for (int r = 0; r < R; ++r)
          for (int p = 0; p < P; ++p) sums[r][b][p] += values[p] * weights[r][i];
      }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        for (int p = 0; p < P; ++p) store(out + r * out_row + b * N + p * W, sums[r][b][p]);
  }
};

#if defined(__AVX512BF16__)
// With bfloat16 arithmetic two keys meet in one instruction. Weights are rounded to bf16 for it, as in torch; the largest
// is 1 and stays exact.
template <>
struct Mix<bf16> {
  static constexpr int N = 2 * W;
  static constexpr bool is_narrow = true;
  static int place(int part, int lane) { return lane / 4 * 8 + part * 4 + lane % 4; }  // of unpacklo and unpackhi

  template <int R>
  static void run(float (*weights)[kTile], const float* factors, const bf16* v, int64_t v_key, int count, int64_t dv,
                  float* out, int64_t out_row, const bf16* next, int64_t k_key) {
    uint32_t pairs[R][kTile / 2];  // the weights of keys i and i + 1
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kTile; i += 2 * W)
        store(pairs[r] + i / 2,
              _mm512_cvtne2ps_pbh(load<__m512>(weights[r] + i + W), load<__m512>(weights[r] + i)));
    constexpr int B = R <= 2 ? 2 : 1;
    int64_t j = 0;
    for (; j + B * N <= dv; j += B * N)
      lines<R, B>(pairs, factors, v + j, v_key, count, N, out + j, out_row, next ? next + j : next, k_key);
    for (; j < dv; j += N) {
      int n = int(smaller(N, dv - j));
      lines<R, 1>(pairs, factors, v + j, v_key, count, n, out + j, out_row, next ? next + j : next, k_key);
    }
  }

  template <int R, int B>
  static void lines(const uint32_t (*pairs)[kTile / 2], const float* factors, const bf16* v, int64_t v_key, int count,
                    int n, float* out, int64_t out_row, const bf16* next, int64_t k_key) {
    __m512 sums[R][B][2];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        for (int p = 0; p < 2; ++p)
          sums[r][b][p] = (__m512)(load<Floats>(out + r * out_row + b * N + p * W) * factors[r]);
    __mmask32 lanes = n == N ? ~0u : (1u << n) - 1;
    for (int i = 0; i < count; i += 2)
      for (int b = 0; b < B; ++b) {
        if (next) prefetch(next + i * k_key + b * N), prefetch(next + (i + 1) * k_key + b * N);
        const bf16* at = v + i * v_key + b * N;
        __m512i even = _mm512_maskz_loadu_epi16(lanes, at);
        __m512i odd = _mm512_maskz_loadu_epi16(i + 1 < count ? lanes : 0, at + v_key);
        __m512i both[2] = {_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
        for (int r = 0; r < R; ++r) {
          __m512i pair = _mm512_set1_epi32(int(pairs[r][i / 2]));
          for (int p = 0; p < 2; ++p) sums[r][b][p] = _mm512_dpbf16_ps(sums[r][b][p], (__m512bh)both[p], (__m512bh)pair);
        }
      }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b)
        for (int p = 0; p < 2; ++p) store(out + r * out_row + b * N + p * W, sums[r][b][p]);
  }
};
#endif

}  // namespace
