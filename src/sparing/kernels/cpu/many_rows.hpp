// Products with many rows of x in bfloat16, at the speed of arithmetic, on CPUs that multiply pairs of such numbers.
//
// A vector holds the inputs 2k and 2k + 1 of 16 rows of x. The same pair of a weight's row, as it lies in memory, is
// spread over a vector and meets up to 4 of those, so no weight is moved. x is rearranged once for all outputs, into
// panels of V * 16 rows: [in / 2][V][16] pairs, which stay in the second cache while the weights pass by.
// An output's sum runs over the inputs in order: it depends neither on the other rows nor on the threads.
#pragma once

#include <type_traits>
#include <vector>

#include "products.hpp"

namespace {

#if defined(__AVX512BF16__)

constexpr int kBlock = 32;                    // outputs whose sums wait to be turned: what a row's line of y holds
constexpr int64_t kPanelBytes = 512 << 10;    // at most, of a panel: half of the smallest second cache of such CPUs
constexpr int64_t kSpanBytes = 384 << 10;     // of weights, the share of a piece: all panels find them in a cache
constexpr int64_t kAllPanelsBytes = 4 << 20;  // at most, if that is a panel or more: the memory that a thread keeps

// 16 rows of 16 words become 16 columns.
inline void transpose(Words* rows) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      a[i + j] = _mm512_shuffle_i32x4(b[i + j], b[i + j + 4], 0x88);
      a[i + j + 4] = _mm512_shuffle_i32x4(b[i + j], b[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    rows[j] = (Words)_mm512_shuffle_i32x4(a[j], a[j + 8], 0x88);
    rows[j + 8] = (Words)_mm512_shuffle_i32x4(a[j], a[j + 8], 0xdd);
  }
}

// A panel of x's rows `first` to `last` - 1, filled up to V * 16 with rows of zeros.
template <int V>
void make_panel(const bf16* x, int64_t in, int64_t first, int64_t last, Words* panel) {
  for (int v = 0; v < V; ++v)
    for (int64_t k = 0; k < in; k += 2 * W) {
      Words rows[W];
      for (int i = 0; i < W; ++i) {
        int64_t row = first + v * W + i;
        rows[i] = row < last ? load<Words>(x + row * in + k) : Words{};
      }
      transpose(rows);
      for (int i = 0; i < W; ++i) panel[(k / 2 + i) * V + v] = rows[i];
    }
}

// sums[r * V + v]: R outputs of the rows v * 16 to v * 16 + 15 of a panel. w: the weight's rows.
template <int V, int R>
inline void tile(const Words* panel, const bf16* w, int64_t in, Floats* sums) {
  Floats total[R][V] = {};
  auto next = reinterpret_cast<const char*>(w + R * in);  // weights of the next tile
  for (int64_t k = 0; k < in / 2; ++k) {
    prefetch(next + k * (4 * R));  // rows are too short for hardware to see them coming
    Words x[V];
    for (int v = 0; v < V; ++v) x[v] = panel[k * V + v];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      uint32_t pair;
      memcpy(&pair, w + r * in + 2 * k, 4);
      Words spread = Words{} + pair;
      for (int v = 0; v < V; ++v)
        total[r][v] = (Floats)_mm512_dpbf16_ps((__m512)total[r][v], (__m512bh)x[v], (__m512bh)spread);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r * V + v] = total[r][v];
}

// The sums of n outputs with a panel. V * R of them fit the registers with V + 1 operands, and outlast the adder.
template <int V>
void block_sums(const Words* panel, const bf16* w, int64_t in, int64_t n, Floats* sums) {
  constexpr int R = V == 4 ? 6 : 8;
  int64_t o = 0;
  for (; o + R <= n; o += R) tile<V, R>(panel, w + o * in, in, sums + o * V);
  for (; o + 2 <= n; o += 2) tile<V, 2>(panel, w + o * in, in, sums + o * V);
  for (; o < n; ++o) tile<V, 1>(panel, w + o * in, in, sums + o * V);
}

// Outputs o to o + n - 1 of rows `first` to `last` - 1, from the sums of one matrix, or of both for their product.
template <int V>
void finish(const Matrix<bf16>& m, const Floats* sums, const bf16* other_bias, const Floats* other, int64_t out,
            int64_t o, int64_t n, int64_t first, int64_t last) {
  for (int v = 0; v < V; ++v) {
    Words turned[kBlock / W][W];
    for (int i = 0; i < n; ++i) {
      Floats y = sums[i * V + v];
      if (m.bias) y += widen(m.bias[o + i]);
      y = activate(below(y, m.limit), m.activation);
      if (other) y *= within(other_bias ? other[i * V + v] + widen(other_bias[o + i]) : other[i * V + v], m.limit);
      turned[i / W][i % W] = (Words)y;
    }
    for (int part = 0; part * W < n; ++part) transpose(turned[part]);
    for (int i = 0; i < smaller(W, last - first - v * W); ++i) {
      bf16* y = m.y + (first + v * W + i) * out + o;
      for (int part = 0; part * W < n; ++part) write(y + part * W, (Floats)turned[part][i], n - part * W);
    }
  }
}

template <int V>
void panel_product(const sparing::Product& p, const Matrix<bf16>& one, const Matrix<bf16>& two, const Words* panel,
                   int64_t first, int64_t last, int64_t low, int64_t high) {
  Floats sums[kBlock * V], more[kBlock * V];
  for (int64_t o = low; o < high; o += kBlock) {
    int64_t n = smaller(kBlock, high - o);
    block_sums<V>(panel, one.w + o * p.inputs, p.inputs, n, sums);
    if (two.w) block_sums<V>(panel, two.w + o * p.inputs, p.inputs, n, more);
    finish<V>(one, sums, two.bias, two.w && two.multiplies ? more : nullptr, p.outputs, o, n, first, last);
    if (two.w && !two.multiplies) finish<V>(two, more, nullptr, nullptr, p.outputs, o, n, first, last);
  }
}

// f of the number as a constant.
template <class F>
void with_vectors(int64_t V, F f) {
  if (V == 1) f(std::integral_constant<int, 1>());
  if (V == 2) f(std::integral_constant<int, 2>());
  if (V == 3) f(std::integral_constant<int, 3>());
  if (V == 4) f(std::integral_constant<int, 4>());
}

void product_of_many_rows(const sparing::Product& p, const Group<bf16>& group) {
  const bf16* x = group.x;
  const Matrix<bf16>& one = group.one;
  const Matrix<bf16>& two = group.two;
  struct Pairs {
    Words words;
  };
  static thread_local std::vector<Pairs> room;  // of the caller; helpers write and read it
  int64_t largest = greater(1, smaller(4, kPanelBytes / (2 * W * p.inputs)));
  int64_t span = round_up(greater(1, kSpanBytes / (two.w ? 4 : 2) / p.inputs), kBlock);
  int64_t spans = (p.outputs + span - 1) / span;
  // Rows are spread evenly over as few rounds as can be, and those of a round over panels.
  int64_t most = greater(largest * W, kAllPanelsBytes / 2 / p.inputs), rounds = (p.rows + most - 1) / most;
  int64_t step = round_up((p.rows + rounds - 1) / rounds, W);
  for (int64_t start = 0; start < p.rows; start += step) {
    int64_t stop = smaller(p.rows, start + step), vectors = (stop - start + W - 1) / W;
    int64_t panels = (vectors + largest - 1) / largest;
    if (int64_t(room.size()) < vectors * p.inputs / 2) room.resize(vectors * p.inputs / 2);
    Words* panel = &room[0].words;
    auto in_panel = [&](int64_t i, auto f) {  // f(V, the panel, its first row)
      int64_t before = i * vectors / panels;
      with_vectors((i + 1) * vectors / panels - before,
                   [&](auto V) { f(V, panel + before * p.inputs / 2, start + before * W); });
    };
    sparing::share(panels, p.threads, [&](int64_t i) {
      in_panel(i, [&](auto V, Words* to, int64_t first) { make_panel<V>(x, p.inputs, first, stop, to); });
    });
    sparing::share(panels * spans, p.threads, [&](int64_t i) {
      int64_t low = i / panels * span, high = smaller(low + span, p.outputs);
      in_panel(i % panels, [&](auto V, const Words* from, int64_t first) {
        panel_product<V>(p, one, two, from, first, smaller(first + V * W, stop), low, high);
      });
    });
  }
}

#endif

template <class T>
void product_of(const sparing::Product& p) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2)
    if (p.rows > kRowsAtOnce && p.inputs % (2 * W) == 0 && !p.wide) {
      for (int64_t g = 0; g < p.groups; ++g) product_of_many_rows(p, Group<T>(p, g));
      return;
    }
#endif
  product_of_few_rows<T>(p);
}

void product(sparing::Type type, const sparing::Product& p) {
  type == sparing::Type::float32 ? product_of<float>(p) : product_of<bf16>(p);
}

}  // namespace
