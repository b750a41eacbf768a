// Entries gathered from spans, which meet all query heads at once: heads lie in the lanes of vectors, and each number of
// an entry is multiplied with a vector of them. Entries need not be transposed, and may lie anywhere.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

constexpr int kAcross = W == 16 ? 4 : 2;  // vectors of heads, or of numbers, that meet four entries or heads in registers

// Where the entries of a row are, found by their number among all it holds; fast where numbers do not jump.
class Places {
 public:
  // entry_bytes: from one to the next.
  Places(const sparing::Span* spans, int64_t layer, int64_t number_bytes)
      : span(spans), layer(layer), number_bytes(number_bytes) {}

  const char* operator()(int64_t number) {
    while (number < begin) begin -= (--span)->count;
    while (number >= begin + span->count) begin += span->count, ++span;
    return reinterpret_cast<const char*>(span->v + layer * span->layer) +
           (number - begin) * span->v_key * number_bytes;
  }

 private:
  const sparing::Span* span;
  int64_t layer, number_bytes, begin = 0;  // begin: number of the span's first entry
};

// The d numbers of an entry as floats: in `room`, or where they are.
inline const float* floats_of(const float* entry, int64_t, float*) { return entry; }
inline const float* floats_of(const bf16* entry, int64_t d, float* room) {
  int64_t j = 0;
  for (; j + W <= d; j += W) store(room + j, read(entry + j));
  for (; j < d; ++j) room[j] = widen(entry[j]);
  return room;
}

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

// sums[i][b]: of entry i with the heads of vector b, for four entries and B vectors of `lay_heads`.
template <int B>
inline void meet(const float* const* entries, const float* heads, int64_t d, Floats (*sums)[B]) {
  for (int i = 0; i < 4; ++i)
    for (int b = 0; b < B; ++b) sums[i][b] = Floats{};
  for (int64_t j = 0; j < d; ++j) {
    Floats q[B];
    for (int b = 0; b < B; ++b) q[b] = load<Floats>(heads + (b * d + j) * W);
    for (int i = 0; i < 4; ++i)
      for (int b = 0; b < B; ++b) sums[i][b] += q[b] * entries[i][j];
  }
}

}  // namespace
