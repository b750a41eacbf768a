// What every instruction set offers: one table of functions over raw pointers. All arrays of a call are of one type, and
// contiguous where no stride is named. Strides count numbers, not bytes.
#pragma once

#include <cstdint>

namespace sparing {

enum class Type { float32, bfloat16 };

// past_caches, in what follows: weights that are read once are fetched past the larger caches (`prefetch_once`).

enum class Activation { none, silu, gelu };  // gelu: its tanh approximation

// y[r, o] = activation(sum_i x[r, i] * w[o, i] + bias[o]); x [rows, in], w [out, in] and y [rows, out] contiguous, bias
// [out] or null. All in float32, rounded once.
// A second matrix of the same shape, where there is one: y2 receives its product, or y is multiplied by it if y2 is null.
struct Product {
  const void *x, *w, *bias, *w2, *bias2;
  void *y, *y2;
  int64_t rows, in, out;
  Activation activation;
  int threads;
  bool past_caches;
};

// y[r, o] = sum_i x[r, i] * w[o, i] + bias[o] with w in few bits: codes and scales as in weights/*.py, scale_2 or null.
// scales: what shares one in formats of eight bits, the matrix, a row, or a block of 128 x 128. `in` is a multiple of the
// block of a format of four bits.
// unpack: y[o, i] = w[first + o, i] instead; x, bias and rows are not read.
enum class Packing { int8, fp8, int4, nvfp4, mxfp4 };
enum class Scales { matrix, row, block };
struct Packed {
  const void *x, *codes, *scale, *scale_2, *bias;
  void* y;
  int64_t rows, in, first, out;
  Packing packing;
  Scales scales;
  int threads;
  bool past_caches;
};

// Keys that follow from values: k[h, i] = v[h, i] * weight, then its pairs (m, m + d / 2) turned for m < `turning` by the
// row of `table` [.., 2, turning], cos and sin, that belongs to positions[h, i] (null: to first + i). weight [d].
struct TiedKeys {
  const void *weight, *table;
  const int64_t* positions;  // [kv_heads, keys]
  int64_t first, turning;
};

// Softmax attention of the last `tokens` of `keys` positions, with grouped heads: q [tokens, heads, d],
// k [kv_heads, keys, d], v [kv_heads, keys, dv], out [tokens, heads, dv] contiguous, strides of the inner dimension 1.
// k null: keys are `tied`, and dv is d.
// causal: a query sees the keys up to its own, and of these the last `window` (0: all). Otherwise all.
struct Attention {
  const void *q, *k, *v;
  void* out;
  int64_t tokens, heads, kv_heads, keys, d, dv;
  int64_t q_token, q_head, k_head, k_key, v_head, v_key;
  float scale;
  bool causal;
  int64_t window;
  int threads;
  TiedKeys tied;
};

// y = x / sqrt(mean(x^2) + eps) * weight for each row of x [rows, size]; weight [size] or null.
struct Norm {
  const void *x, *weight;
  void* y;
  int64_t rows, size;
  float eps;
  int threads;
};

// Turns the pairs (m, m + half) of x [tokens, heads, d] by cos, sin [tokens, half]; what is beyond stays. With a norm
// weight [d], x is normed first, and rounded.
struct Rotation {
  const void *x, *norm, *cos, *sin;
  void* y;
  int64_t tokens, heads, d, half;
  float eps;
  int threads;
};

// sum = (x + norm(y)) * scale, the residual stream after a branch, and normed = the norm of sum: x, y, sum and normed
// [rows, size]. before: weight [size] of y's norm, null: y as it is; scale: [1] or null; after: weight of the sum's
// norm, with normed, or both null.
struct Residual {
  const void *x, *y, *before, *scale, *after;
  void *sum, *normed;
  int64_t rows, size;
  float eps;
  int threads;
};

// Attention of few queries over the first n tokens of packed codes (kernels/code_layout.py), all of them visible, in the
// rotated frames: q float [tokens, heads, d], out float [tokens, heads, dv], lse float [tokens, heads]. k, v: blocks of
// 64 tokens, contiguous within a kv head; scales [kv_heads, blocks, 64], contiguous within a head, float16 or float;
// k_centroids, v_centroids: 2^bits floats; bits 2, 3 or 4; bias: added to the scaled scores, [tokens, heads, n] or null.
// is_exact: products in float; otherwise queries, weights and centroids may be rounded to integers.
struct CodesAttention {
  const float *q, *k_centroids, *v_centroids, *bias;
  const uint8_t *k, *v;
  const void *k_scale, *v_scale;
  float *out, *lse;
  int64_t tokens, heads, kv_heads, n, d, dv;
  int64_t k_head, v_head, k_scale_head, v_scale_head;
  int k_bits, v_bits;
  bool has_half_scales, is_exact;
  float scale;
  int threads;
};

// A part of vectors in codes of 1 to 8 bits: packed codes, scales and centroids as above. vectors [tokens, heads, dims]:
// of keys the queries in its frame, of values the mix, which is written.
struct CodeStream {
  const uint8_t* codes;
  const void* scale;
  const float* centroids;
  float* vectors;
  int64_t bits, dims, codes_head, scale_head;
};

// Keys that follow from values in codes. With X [a, b] the decoded parts of a value, each filled up to 16 dimensions, one
// after the other, L X R [a_out, b_out] are the channels m and, in the second half, m + d / 2 of the value for the
// first m; of these `keys` says what becomes of them, and q [tokens, heads, a_out * b_out] are the queries there.
// left [a_out, a], right [kv_heads, b, b_out], of which right_head is 0 if it is the same for all. q null: not tied.
struct TiedCodes {
  const float *q, *left, *right;
  int64_t a, a_out, b, b_out, right_head;
  TiedKeys keys;
};

// As CodesAttention for keys and values that are sums of any parts. tied: `keys` have no codes, only queries, for the
// channels of values that do not turn. is_exact: in float; otherwise what is written out may be rounded to bfloat16.
struct StreamsAttention {
  const CodeStream *keys, *values;
  int64_t key_streams, value_streams;
  TiedCodes tied;
  const float* bias;
  float* lse;
  int64_t tokens, heads, kv_heads, n;
  bool has_half_scales, is_exact;
  float scale;
  int threads;
};

// y[t, c] = silu(bias[c] + sum_j weight[c, j] * window[t + j, c]): window [taps - 1 + tokens, channels], weight
// [channels, taps], bias [channels] or null; y float [tokens, channels].
struct Convolution {
  const void *window, *weight, *bias;
  float* y;
  int64_t tokens, channels, taps;
  int threads;
};

// Tokens of a scan: x [tokens, heads, p] and dt [tokens, heads], B and C [tokens, groups, n] with the same stride.
struct ScanInputs {
  const float *x, *dt, *B, *C;
  int64_t tokens, x_row, dt_row, B_row;
};

// S = exp(dt A) S + dt x B^T, y = S C + D x for states [heads, p, n]; D [heads] or null. The tokens `behind` carry the
// state on in place and make no y (their C is not read); those `ahead` start from there and leave it: y [tokens, heads,
// p], and to `after`, unless null, the state after the last of them.
struct Scan {
  float* state;
  const float *A, *D;
  ScanInputs behind, ahead;
  float *y, *after;
  int64_t heads, p, n, groups;
  int threads;
};

// out = rms_norm(y * silu(gate)) * weight, the mean taken within each group of `size` numbers: y float [rows, groups,
// size] and out contiguous, weight [groups * size].
struct GatedNorm {
  const float* y;
  const void *gate, *weight;
  void* out;
  int64_t rows, groups, size, gate_row;
  float eps;
  int threads;
};

// ids and weights [tokens, k] of the experts chosen by sigmoid(x gate^T) + bias; x [tokens, in], gate [experts, in].
struct Route {
  const void *x, *gate;
  const float* bias;
  int64_t* ids;
  float* weights;
  int64_t tokens, in, experts, k, n_group, topk_group;
  bool normalize;
  float scale;
  int threads;
  bool past_caches;
};

// y[t] = sum_j weights[t, j] * down_e activation(up_e x[t]) with e = ids[t, j]; x, y [tokens, in], up [experts, width,
// in] (gated_gelu: 2 width, the gate's rows first), down [experts, in, width]. ids null: 0; weights null: 1.
enum class ExpertActivation { relu2, gated_gelu };
struct Experts {
  const void *x, *up, *down;
  const int64_t* ids;
  const float* weights;
  void* y;
  int64_t tokens, k, in, width;
  ExpertActivation activation;
  int threads;
  bool past_caches;
};

// Experts whose matrices are packed in one format: up and down as `Packed` of the first expert (its x is read, y, bias
// and rows are not), the next one's codes and scales this many bytes later.
struct PackedStack : Packed {
  int64_t codes_bytes, scale_bytes;
};
struct PackedExperts {
  PackedStack up, down;
  const int64_t* ids;
  const float* weights;
  void* y;
  int64_t tokens, k;
  ExpertActivation activation;
  int threads;
};

// to [count] = from [count], which do not overlap. is_finite: set to false where one is NaN or infinite, else left alone.
struct Copy {
  const void* from;
  void* to;
  int64_t count;
  bool* is_finite;
  int threads;
};

struct Kernels {
  const char* name;
  void (*product)(Type, const Product&);
  void (*packed)(Type, const Packed&);
  void (*unpack)(Type, const Packed&);
  void (*attention)(Type, const Attention&);
  void (*norm)(Type, const Norm&);
  void (*rotation)(Type, const Rotation&);
  void (*residual)(Type, const Residual&);
  void (*codes)(const CodesAttention&);
  void (*code_streams)(const StreamsAttention&);
  void (*convolution)(Type, const Convolution&);
  void (*scan)(const Scan&);
  void (*gated_norm)(Type, const GatedNorm&);
  void (*route)(Type, const Route&);
  void (*experts)(Type, const Experts&);
  void (*packed_experts)(Type, const PackedExperts&);
  void (*copy)(Type, const Copy&);
};

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2, avx512, avx512_bf16;
#endif

}  // namespace sparing
