// Entries gathered from spans, which meet all query heads at once: heads lie in the lanes of vectors, and each number of
// an entry is multiplied with a vector of them. Entries need not be transposed, and may lie anywhere.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"
#include "unpack.hpp"

namespace {

constexpr int kAcross = W == 16 ? 4 : 2;  // vectors of heads, or of numbers, that meet four entries or heads in registers

// Where the entries of a row are, found by their number among all it holds; fast where numbers do not jump.
class Places {
 public:
  // unit: bytes of what strides of entries count.
  Places(const sparing::Span* spans, int64_t layer, int64_t unit) : span(spans), layer(layer), unit(unit) {}

  const char* operator()(int64_t number) {
    while (number < begin) begin -= (--span)->count;
    while (number >= begin + span->count) begin += span->count, ++span;
    return reinterpret_cast<const char*>(span->v + layer * span->layer) + (number - begin) * span->v_key * unit;
  }

 private:
  const sparing::Span* span;
  int64_t layer, unit, begin = 0;  // begin: number of the span's first entry
};

// What entries are: each gives the d numbers of one as floats, in `room` or where they are.
template <class T>
struct Plain {
  static constexpr int64_t unit = sizeof(T);
  int64_t d;
  const float* operator()(const char* entry, float* room) const {
    auto numbers = reinterpret_cast<const T*>(entry);
    if constexpr (unit == 4) return numbers;
    for (int64_t j = 0; j < d; j += W) write(room + j, read(numbers + j, d - j), d - j);
    return room;
  }
};

// Entries and keys of the indexer in the bytes of kernels/released_entries.py.
struct ReleasedEntry {
  static constexpr int64_t unit = 1, block = 64;
  int64_t d, rotary;
  const float* operator()(const char* entry, float* room) const {
    auto codes = reinterpret_cast<const Byte*>(entry);
    int64_t plain = d - rotary;
    const Byte* scales = codes + plain + 2 * rotary;
    for (int64_t j = 0; j < plain; j += W) {
      Byte some[W] = {};
      memcpy(some, codes + j, size_t(smaller(W, plain - j)));
      write(room + j, FP8::exact(some) * (FP8::unit * MXFP4::exact_scale(scales + j / block)), plain - j);
    }
    Plain<bf16>{rotary}(entry + plain, room + plain);
    return room;
  }
};
struct ReleasedKey {
  static constexpr int64_t unit = 1, block = 32;
  int64_t d;
  const float* operator()(const char* key, float* room) const {
    auto codes = reinterpret_cast<const Byte*>(key);
    for (int64_t j = 0; j < d; j += W)
      write(room + j, values<MXFP4>(codes_in_order(codes + j / 2)) * MXFP4::exact_scale(codes + d / 2 + j / block));
    return room;
  }
};

// Queries of one token [heads, d], times `scale`, as vectors of heads: to [vectors, d, W], zeros beyond the last head.
template <class T>
void lay_heads(const T* q, int64_t heads, int64_t q_head, int64_t d, float scale, float* to) {
  for (int64_t h = 0; h < round_up(heads, W); ++h) {
    float* lane = to + h / W * d * W + h % W;
    const T* from = q + h * q_head;
    if (h < heads)
      for (int64_t j = 0; j < d; ++j) lane[j * W] = widen(from[j]) * scale;
    else
      for (int64_t j = 0; j < d; ++j) lane[j * W] = 0;
  }
}

// sums[i][b]: of entry i with the heads of vector b, for E entries and B vectors of `lay_heads`.
template <int E, int B>
inline void meet(const float* const* entries, const float* heads, int64_t d, Floats (*sums)[B]) {
  for (int i = 0; i < E; ++i)
    for (int b = 0; b < B; ++b) sums[i][b] = Floats{};
  for (int64_t j = 0; j < d; ++j) {
    Floats q[B];
    for (int b = 0; b < B; ++b) q[b] = load<Floats>(heads + (b * d + j) * W);
    for (int i = 0; i < E; ++i)
      for (int b = 0; b < B; ++b) sums[i][b] += q[b] * entries[i][j];
  }
}

}  // namespace
