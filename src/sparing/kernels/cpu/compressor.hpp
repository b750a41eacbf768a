// Windows of tokens made into one entry each: per channel a softmax over their gates, token after token.
//
// A task is a row and some of its channels, through all its tokens: what is added up in which order depends on positions
// alone, and not on where a text is cut.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kPooledChannels = 64;        // of a task
constexpr int64_t kPooledNumbers = 16 << 10;  // of gates; below it one thread is faster

// Some channels of a window.
struct OpenWindow {
  float top[kPooledChannels], total[kPooledChannels], mix[kPooledChannels];

  void clear() {
    for (int i = 0; i < kPooledChannels; ++i) top[i] = -kInfinity, total[i] = mix[i] = 0;
  }
  void read_from(const float* from, int64_t d, int64_t n) {
    memcpy(top, from, 4 * n), memcpy(total, from + d, 4 * n), memcpy(mix, from + 2 * d, 4 * n);
  }
  void write_to(float* to, int64_t d, int64_t n) const {
    memcpy(to, top, 4 * n), memcpy(to + d, total, 4 * n), memcpy(to + 2 * d, mix, 4 * n);
  }

  template <class T>
  void fold(const T* value, const T* gate, const float* ape, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
      Floats score = read(gate + i, n - i) + read(ape + i, n - i), before = load<Floats>(top + i);
      Floats highest = larger(before, score), lowest = pick(before > score, score, before);
      Floats factor = exp(pick(lowest == splat(-kInfinity), lowest, lowest - highest));  // of the smaller of the two
      Floats kept = pick(before >= score, splat(1), factor), weight = pick(before >= score, factor, splat(1));
      store(top + i, highest);
      store(total + i, load<Floats>(total + i) * kept + weight);
      store(mix + i, load<Floats>(mix + i) * kept + read(value + i, n - i) * weight);
    }
  }
};

// Channels first..first + n - 1 of one row, whose tokens start with token `token` of all and whose entries at `entries`.
template <class T>
void pool_row(const sparing::Pooling& p, const sparing::PooledRow& row, int64_t token, float* entries, int64_t first,
              int64_t n) {
  int64_t size = 3 * p.d, ahead = p.series == 2 ? 1 : 0;
  const float* before = reinterpret_cast<const float*>(row.before) + p.layer * row.before_layer + first;
  float* after = reinterpret_cast<float*>(row.after) + p.layer * row.after_layer + first;
  OpenWindow windows[2];  // the open one, and the next
  for (auto& window : windows) window.clear();
  for (int64_t s = 0; s < p.series; ++s) windows[s].read_from(before + s * size, p.d, n);
  for (int64_t t = 0; t < row.tokens; ++t) {
    int64_t place = (row.first + t) % p.m;
    const T* value = static_cast<const T*>(p.kv) + (token + t) * p.kv_row + first;
    const T* gate = static_cast<const T*>(p.gate) + (token + t) * p.gate_row + first;
    const float* ape = p.ape + place * p.series * p.d + first;
    windows[0].fold(value + ahead * p.d, gate + ahead * p.d, ape + ahead * p.d, n);
    if (ahead) windows[1].fold(value, gate, ape, n);
    if (place + 1 < p.m) continue;
    for (int64_t i = 0; i < n; ++i) entries[first + i] = windows[0].mix[i] / windows[0].total[i];
    entries += p.d;
    windows[0] = windows[1];
    windows[1].clear();
  }
  for (int64_t s = 0; s < p.series; ++s) windows[s].write_to(after + s * size, p.d, n);
}

template <class T>
void pool_rows(const sparing::Pooling& p) {
  std::vector<int64_t> tokens(size_t(p.num_rows + 1), 0), closed = tokens;  // before those of a row
  for (int64_t r = 0; r < p.num_rows; ++r) {
    const auto& row = p.rows[r];
    tokens[size_t(r) + 1] = tokens[size_t(r)] + row.tokens;
    closed[size_t(r) + 1] = closed[size_t(r)] + (row.first + row.tokens) / p.m - row.first / p.m;
  }
  int64_t across = (p.d + kPooledChannels - 1) / kPooledChannels, numbers = tokens.back() * p.series * p.d;
  sparing::share(p.num_rows * across, numbers >= kPooledNumbers ? p.threads : 1, [&](int64_t i) {
    size_t r = size_t(i / across);
    int64_t first = i % across * kPooledChannels;
    pool_row<T>(p, p.rows[r], tokens[r], p.entries + closed[r] * p.d, first, smaller(kPooledChannels, p.d - first));
  });
}

void pool(sparing::Type type, const sparing::Pooling& p) {
  type == sparing::Type::float32 ? pool_rows<float>(p) : pool_rows<bf16>(p);
}

}  // namespace
