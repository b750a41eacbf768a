// Mamba-2: the convolution before the scan, the scan token by token, and the gated norm after it. All in float32.
//
// A block of the state stays in registers for a tile of tokens: three operations a number and token, whatever the
// number of tokens, so that tokens taken together and one by one give the same results.
#pragma once

#include <vector>

#include "elementwise.hpp"
#include "kernels.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

constexpr int kBlockRows = W < 16 ? 2 : 4, kBlockVectors = 4;  // of a state: what registers hold beside B, C and sums
constexpr int64_t kBlockWidth = kBlockVectors * W;
constexpr int64_t kScanTile = 16;      // tokens: their inputs for one head stay in the first cache
constexpr int64_t kChannelStretch = 512;  // of the convolution: its taps and rows stay in the first cache
constexpr int64_t kTokenStretch = 64;

inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

// The inputs of at most kScanTile tokens for one head: decay [tokens], x = dt x [tokens, p], B and C [tokens, width],
// rows padded with zeros to whole blocks.
struct ScanTile {
  int64_t tokens;
  float decay[kScanTile];
  float *x, *B, *C;
};

class ScanRun {
 public:
  explicit ScanRun(const sparing::Scan& s) : s(s), width(round_up(s.n, kBlockWidth)) {}

  void head(int64_t h) const {
    static thread_local std::vector<float> room;
    int64_t of_tile = kScanTile * (s.p + 2 * width), size = s.p * s.n;
    room.resize(size_t(2 * of_tile + kScanTile * s.p + size + 16));
    auto at = reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(room.data()), 64));
    ScanTile pending = tile_at(at), staged = tile_at(at + of_tile);
    float *y = at + 2 * of_tile, *spare = y + kScanTile * s.p;
    const float* from = s.state + h * size;
    float* carried = s.carried ? s.carried + h * size : nullptr;
    float* after = s.after ? s.after + h * size : nullptr;

    // The state is carried over pending tokens tile by tile. Their last tile and the first staged one share a pass over
    // it, so a step of decoding reads and writes it once.
    int64_t b = 0;
    staged.tokens = 0;
    for (; b + kScanTile < s.pending.tokens; b += kScanTile) {
      lay(s.pending, b, h, pending);
      sweep(from, pending, carried, staged, nullptr, y);
      from = carried;
    }
    lay(s.pending, b, h, pending);
    for (int64_t a = 0;; a += kScanTile) {
      lay(s.staged, a, h, staged);
      bool is_last = a + kScanTile >= s.staged.tokens;
      // The state between staged tiles goes to `after`, or to `spare` where nobody wants it: it stays as it was.
      float* to = after ? after : is_last ? nullptr : spare;
      sweep(from, pending, pending.tokens ? carried : nullptr, staged, to, y);
      put(a, h, staged, y);
      if (is_last) break;
      from = to;
      pending.tokens = 0;
    }
  }

 private:
  const sparing::Scan& s;
  int64_t width;

  ScanTile tile_at(float* at) const {
    return {0, {}, at, at + kScanTile * s.p, at + kScanTile * (s.p + width)};
  }

  void lay(const sparing::ScanInputs& in, int64_t first, int64_t h, ScanTile& tile) const {
    tile.tokens = greater(0, smaller(kScanTile, in.tokens - first));
    int64_t group = h / (s.heads / s.groups);
    float exponents[kScanTile] = {};
    for (int64_t t = 0; t < tile.tokens; ++t) {
      float dt = in.dt[(first + t) * in.dt_row + h];
      exponents[t] = dt * s.A[h];
      const float* x = in.x + (first + t) * in.x_row + h * s.p;
      for (int64_t i = 0; i < s.p; ++i) tile.x[t * s.p + i] = dt * x[i];
      copy(in.B + (first + t) * in.B_row + group * s.n, tile.B + t * width);
      if (in.C) copy(in.C + (first + t) * in.B_row + group * s.n, tile.C + t * width);
    }
    for (int64_t t = 0; t < tile.tokens; t += W) write(tile.decay + t, exp(read(exponents + t)));
  }

  void copy(const float* from, float* to) const {
    memcpy(to, from, 4 * s.n);
    memset(to + s.n, 0, 4 * (width - s.n));
  }

  // y = S C of the staged tokens, with D x on top, to where it belongs.
  void put(int64_t first, int64_t h, const ScanTile& staged, const float* y) const {
    float d = s.D ? s.D[h] : 0;
    for (int64_t t = greater(0, s.skipped - first); t < staged.tokens; ++t) {
      const float* x = s.staged.x + (first + t) * s.staged.x_row + h * s.p;
      float* to = s.y + ((first + t - s.skipped) * s.heads + h) * s.p;
      for (int64_t i = 0; i < s.p; ++i) to[i] = y[t * s.p + i] + d * x[i];
    }
  }

  // One pass over the state of a head: `from`, over pending tokens to `kept`, over staged ones to `to` (or null).
  void sweep(const float* from, const ScanTile& pending, float* kept, const ScanTile& staged, float* to,
             float* y) const {
    int64_t row = 0;
    for (; row + kBlockRows <= s.p; row += kBlockRows)
      for (int64_t c = 0; c < width; c += kBlockWidth) block<kBlockRows>(row, c, from, pending, kept, staged, to, y);
    for (; row < s.p; ++row)
      for (int64_t c = 0; c < width; c += kBlockWidth) block<1>(row, c, from, pending, kept, staged, to, y);
  }

  template <int R>
  void block(int64_t row, int64_t column, const float* from, const ScanTile& pending, float* kept,
             const ScanTile& staged, float* to, float* y) const {
    // R rows x kBlockVectors vectors of the state stay in registers for all tokens of both tiles.
    int64_t at = row * s.n + column, rest = s.n - column;
    Floats S[R][kBlockVectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kBlockVectors; ++v) {
        const float* number = from + at + r * s.n + v * W;
        prefetch(number + 2 * R * s.n);
        S[r][v] = v * W < rest ? read(number, rest - v * W) : Floats{};
      }
    for (int64_t t = 0; t < pending.tokens; ++t) step<R>(S, pending, t, row, column);
    if (kept) keep<R>(S, kept + at, rest);
    for (int64_t t = 0; t < staged.tokens; ++t) {
      step<R>(S, staged, t, row, column);
      Floats sums[R] = {};
      for (int v = 0; v < kBlockVectors; ++v) {
        Floats c = load<Floats>(staged.C + t * width + column + v * W);
        for (int r = 0; r < R; ++r) sums[r] += S[r][v] * c;
      }
      float totals[R];
      if constexpr (R == 4)
        sum4(sums[0], sums[1], sums[2], sums[3], totals);
      else
        for (int r = 0; r < R; ++r) totals[r] = sum(sums[r]);
      // y = S C runs over all columns: the first block of them starts the sum, the others add to it.
      for (int r = 0; r < R; ++r) y[t * s.p + row + r] = (column ? y[t * s.p + row + r] : 0.0f) + totals[r];
    }
    if (to) keep<R>(S, to + at, rest);
  }

  template <int R>
  void step(Floats (*S)[kBlockVectors], const ScanTile& tile, int64_t t, int64_t row, int64_t column) const {
    for (int v = 0; v < kBlockVectors; ++v) {
      Floats b = load<Floats>(tile.B + t * width + column + v * W);
      for (int r = 0; r < R; ++r) S[r][v] = S[r][v] * tile.decay[t] + b * tile.x[t * s.p + row + r];
    }
  }

  template <int R>
  void keep(Floats (*S)[kBlockVectors], float* to, int64_t rest) const {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kBlockVectors && v * W < rest; ++v) write(to + r * s.n + v * W, S[r][v], rest - v * W);
  }
};

void scan(const sparing::Scan& s) {
  ScanRun run(s);
  sparing::share(s.heads, s.threads, [&](int64_t h) { run.head(h); });
}

// The taps of n channels in float, [taps, n]; they stay until the next call of the same thread.
template <class T>
const float* lay_taps(const T* weight, int64_t count, int64_t n) {
  static thread_local std::vector<float> taps;
  taps.resize(size_t(count * n));
  if (count == 4) {  // the same as below, with a step the compiler knows
    for (int64_t i = 0; i < n; ++i)
      for (int j = 0; j < 4; ++j) taps[j * n + i] = widen(weight[4 * i + j]);
  } else {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < n; ++i) taps[j * n + i] = widen(weight[i * count + j]);
  }
  return taps.data();
}

// y [n] of one token: row(j) is what tap j sees of these channels.
template <class T, class Row>
void convolve(Row row, const float* taps, int64_t count, const T* bias, int64_t n, float* y) {
  static thread_local std::vector<const T*> rows;
  rows.resize(size_t(count));
  for (int64_t j = 0; j < count; ++j) rows[size_t(j)] = row(j);
  const T* const* inputs = rows.data();
  for (int64_t i = 0; i < n; i += W) {
    Floats sums = bias ? read(bias + i, n - i) : Floats{};
    for (int64_t j = 0; j < count; ++j) sums += read(inputs[j] + i, n - i) * read(&taps[j * n + i], n - i);
    write(y + i, silu(sums), n - i);
  }
}

// Calls body(first channel, how many, first token, the one after the last) for all pieces.
template <class F>
void over_channels(int64_t tokens, int64_t channels, int threads, F body) {
  int64_t across = (channels + kChannelStretch - 1) / kChannelStretch;
  int64_t along = (tokens + kTokenStretch - 1) / kTokenStretch;
  sparing::share(across * along, tokens * channels >= kPieceNumbers ? threads : 1, [&](int64_t piece) {
    int64_t channel = piece % across * kChannelStretch, first = piece / across * kTokenStretch;
    body(channel, smaller(kChannelStretch, channels - channel), first, smaller(tokens, first + kTokenStretch));
  });
}

template <class T>
void convolution_of(const sparing::Convolution& c) {
  over_channels(c.tokens, c.channels, c.threads, [&](int64_t channel, int64_t n, int64_t first, int64_t last) {
    const float* taps = lay_taps(static_cast<const T*>(c.weight) + channel * c.taps, c.taps, n);
    const T* bias = c.bias ? static_cast<const T*>(c.bias) + channel : nullptr;
    for (int64_t t = first; t < last; ++t) {
      const T* rows = static_cast<const T*>(c.x) + t * c.channels + channel;
      convolve([&](int64_t j) { return rows + j * c.channels; }, taps, c.taps, bias, n,
               c.y + t * c.channels + channel);
    }
  });
}

// The rows of a table, in one layer.
template <class T>
class RowsScanRun {
 public:
  explicit RowsScanRun(const sparing::RowsScan& s)
      : s(s), channels(s.heads * s.p + 2 * s.groups * s.n), before(s.taps - 1), firsts(size_t(s.num_rows + 1), 0) {
    for (int64_t r = 0; r < s.num_rows; ++r) firsts[size_t(r) + 1] = firsts[size_t(r)] + s.rows[r].added;
    convolve_all();
    scan_all();
  }

 private:
  const sparing::RowsScan& s;
  const int64_t channels, before;  // inputs before the first new one
  std::vector<int64_t> firsts;     // new tokens before those of a row

  // Of a row: numbers of this layer, `step` of them a layer.
  template <class N>
  N* at(int64_t address, int64_t step) const {
    return address ? reinterpret_cast<N*>(address) + s.layer * step : nullptr;
  }

  void convolve_all() const {
    over_channels(firsts.back(), channels, s.threads, [&](int64_t channel, int64_t n, int64_t first, int64_t last) {
      const float* taps = lay_taps(static_cast<const T*>(s.conv_weight) + channel * s.taps, s.taps, n);
      const T* bias = s.conv_bias ? static_cast<const T*>(s.conv_bias) + channel : nullptr;
      for (int64_t r = 0; r < s.num_rows; ++r) {
        int64_t start = firsts[size_t(r)];
        convolve_row(s.rows[r], start, greater(first, start) - start, smaller(last, firsts[size_t(r) + 1]) - start,
                     channel, n, taps, bias);
      }
    });
  }

  // Tokens first..last - 1 of a row whose inputs start with token `start` of all: convolved, and kept.
  void convolve_row(const sparing::ScannedRow& row, int64_t start, int64_t first, int64_t last, int64_t channel,
                    int64_t n, const float* taps, const T* bias) const {
    if (first >= last) return;
    const T* tail = at<const T>(row.tails, before * channels) + channel;
    const T* x = static_cast<const T*>(s.x) + start * s.x_row + channel;
    T* window = reinterpret_cast<T*>(*at<const int64_t>(row.windows, 1)) + channel;
    float* mixed = at<float>(row.mixed, row.mixed_layer) + channel;
    auto input = [&](int64_t i) { return i < before ? tail + i * channels : x + (i - before) * s.x_row; };
    for (int64_t i = first ? before + first : 0; i < before + last; ++i)
      memcpy(window + i * channels, input(i), size_t(n) * sizeof(T));
    for (int64_t t = first; t < last; ++t)
      convolve([&](int64_t j) { return input(t + j); }, taps, s.taps, bias, n, mixed + t * channels);
    if (channel) return;
    float* dt = at<float>(row.dt, row.added * s.heads);
    for (int64_t t = first; t < last; ++t)
      memcpy(dt + t * s.heads, s.dt + (start + t) * s.dt_row, size_t(s.heads) * sizeof(float));
  }

  void scan_all() const {
    std::vector<sparing::Scan> scans;
    int64_t queries = 0;
    for (int64_t r = 0; r < s.num_rows; queries += s.rows[r++].queries)
      scans.push_back(scan_of(s.rows[r], s.y + queries * s.heads * s.p));
    sparing::share(s.num_rows * s.heads, s.threads,
                   [&](int64_t i) { ScanRun(scans[size_t(i / s.heads)]).head(i % s.heads); });
    for (int64_t r = 0; r < s.num_rows; ++r)
      if (int64_t* moved = at<int64_t>(s.rows[r].moved, 1)) *moved = 1;
  }

  sparing::Scan scan_of(const sparing::ScannedRow& row, float* y) const {
    int64_t size = s.heads * s.p * s.n;
    const int64_t* moved = at<const int64_t>(row.moved, 1);
    float* carried = at<float>(row.carried, size);
    bool is_pending = moved && !*moved;
    sparing::Scan scan{};
    scan.state = moved && *moved ? carried : at<const float>(row.states, size);
    scan.carried = is_pending ? carried : nullptr;
    scan.A = s.A, scan.D = s.D;
    if (is_pending)
      scan.pending = inputs(at<const float>(row.pending_mixed, row.pending_room * channels),
                            at<const float>(row.pending_dt, row.pending_room * s.heads), row.pending);
    scan.pending.C = nullptr;
    scan.staged = inputs(at<const float>(row.mixed, row.mixed_layer), at<const float>(row.dt, row.added * s.heads),
                         row.added);
    scan.y = y, scan.after = at<float>(row.after, size);
    scan.heads = s.heads, scan.p = s.p, scan.n = s.n, scan.groups = s.groups;
    scan.skipped = row.added - row.queries;
    return scan;
  }

  // mixed: x, B and C of a token side by side.
  sparing::ScanInputs inputs(const float* mixed, const float* dt, int64_t tokens) const {
    const float* B = mixed + s.heads * s.p;
    return {mixed, dt, B, B + s.groups * s.n, tokens, channels, s.heads, channels};
  }
};

template <class T>
void gated_norm_of(const sparing::GatedNorm& g) {
  auto weight = static_cast<const T*>(g.weight);
  over_rows(g.rows, g.groups * g.size, g.threads, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> gated;
    gated.resize(size_t(g.size + W));
    for (int64_t r = first; r < last; ++r)
      for (int64_t channel = 0; channel < g.groups * g.size; channel += g.size) {
        const float* y = g.y + r * g.groups * g.size + channel;
        auto gate = static_cast<const T*>(g.gate) + r * g.gate_row + channel;
        auto to = static_cast<T*>(g.out) + r * g.groups * g.size + channel;
        Floats squares[2] = {};
        for (int64_t i = 0; i < g.size; i += W) {
          Floats v = read(y + i, g.size - i) * silu(read(gate + i, g.size - i));
          squares[i / W % 2] += v * v;
          write(&gated[i], v);
        }
        float factor = 1 / __builtin_sqrtf(sum(squares[0] + squares[1]) / float(g.size) + g.eps);
        for (int64_t i = 0; i < g.size; i += W) {
          Floats v = read(&gated[i]) * factor;
          write(to + i, v * read(weight + channel + i, g.size - i), g.size - i);
        }
      }
  });
}

void convolution(sparing::Type type, const sparing::Convolution& c) {
  type == sparing::Type::float32 ? convolution_of<float>(c) : convolution_of<bf16>(c);
}

void scan_rows(sparing::Type type, const sparing::RowsScan& s) {
  type == sparing::Type::float32 ? void(RowsScanRun<float>{s}) : void(RowsScanRun<bf16>{s});
}

void gated_norm(sparing::Type type, const sparing::GatedNorm& g) {
  type == sparing::Type::float32 ? gated_norm_of<float>(g) : gated_norm_of<bf16>(g);
}

}  // namespace
