// New entries, written to where rows keep theirs.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kStagedBytes = 256 << 10;  // below it one thread is faster

void stage(const sparing::Staging& s) {
  std::vector<int64_t> firsts(size_t(s.num_rows + 1), 0);  // new entries before those of a row
  for (int64_t r = 0; r < s.num_rows; ++r) firsts[size_t(r) + 1] = firsts[size_t(r)] + s.rows[r].added;
  int64_t bytes = firsts.back() * s.kv_heads * (s.k ? s.d + s.dv : s.dv) * s.item;
  sparing::share(s.num_rows * s.kv_heads, bytes >= kStagedBytes ? s.threads : 1, [&](int64_t task) {
    int64_t r = task / s.kv_heads, head = task % s.kv_heads;
    const sparing::AttendedRow& row = s.rows[r];
    int64_t token = firsts[size_t(r)];
    auto k = static_cast<const char*>(s.k) + (token * s.k_token + head * s.k_head) * s.item;
    auto v = static_cast<const char*>(s.v) + (token * s.v_token + head * s.v_head) * s.item;
    // Backwards from the last span: the newest entries are at its end.
    const sparing::Span* span = s.spans + row.span + row.spans;
    for (int64_t left = row.added; left;) {
      int64_t n = smaller(left, (--span)->count), from = left - n, to = span->count - n;
      auto place = [&](int64_t address, int64_t stride, int64_t key) {
        return reinterpret_cast<char*>(address + s.layer * span->layer) + (head * stride + to * key) * s.item;
      };
      char *to_k = s.k ? place(span->k, span->k_head, span->k_key) : nullptr;
      char *to_v = place(span->v, span->v_head, span->v_key);
      for (int64_t i = 0; i < n; ++i) {
        if (s.k) memcpy(to_k + i * span->k_key * s.item, k + (from + i) * s.k_token * s.item, size_t(s.d * s.item));
        memcpy(to_v + i * span->v_key * s.item, v + (from + i) * s.v_token * s.item, size_t(s.dv * s.item));
      }
      left -= n;
    }
  });
}

}  // namespace
