// What every instruction set offers: one table of functions over raw pointers. All arrays of a call are of one type, and
// contiguous where no stride is named. Strides count numbers, not bytes.
#pragma once

#include <cstdint>

// The fields of a struct, and their text: from it bind.hpp knows what Python calls them. A field with an initialiser may
// be left out of a call. Fields are of the types that `binding::Types` knows, their initialisers without commas.
#define FIELDS(...) \
  __VA_ARGS__       \
  static constexpr const char* fields = #__VA_ARGS__;

// An enum, and the text of its names: in Python one of them is a string.
#define CHOICES(name, ...)         \
  enum class name { __VA_ARGS__ }; \
  constexpr const char* choices(name) { return #__VA_ARGS__; }

namespace sparing {

enum class Type { float32, bfloat16 };

// Some structs, one after the other.
template <class T>
struct List {
  const T* data;
  int64_t count;
};

// In what follows bind.hpp fills in, where a call does not,
// threads (0): as many as PyTorch has;
// past_caches: whether weights that are read once are fetched past the larger caches (`prefetch_once`).

CHOICES(Activation, none, silu, gelu)  // gelu: its tanh approximation

// y[r, o] = activation(sum_i x[r, i] * w[o, i] + bias[o]); x [rows, inputs], w [outputs, inputs] and y [rows, outputs]
// contiguous, bias [outputs] or null. All in float32, rounded once.
// A second matrix of the same shape, where there is one: y2 receives its product, or y is multiplied by it if y2 is null.
// limit: sums are cut off above it before the activation, and those that y is multiplied by above and below.
// groups: of several each has its own x, matrices, biases and y, which lie after those of the one before.
// wide: y and y2 are float whatever x is, of one group; y2 is not null where there is a second matrix.
struct Product {
  FIELDS(
    const void *x, *w, *bias = nullptr, *w2 = nullptr, *bias2 = nullptr;
    void *y, *y2 = nullptr;
    int64_t rows, inputs, outputs, groups = 1;
    Activation activation = Activation::none;
    float limit = __builtin_inff();
    bool wide = false;
    int threads = 0;
    bool past_caches = false;
  )
};

// y[r, o] = sum_i x[r, i] * w[o, i] + bias[o] with w in few bits: codes and scales as in weights/*.py, scale_2 or null; of
// blocks all are in the codes.
// scales: what shares one in formats of eight bits, the matrix, a row, or a block of 128 x 128. `inputs` is a multiple
// of the block of a format of four bits. Of a stack of matrices the next one's codes and scales lie so many bytes later;
// groups: so many of them multiply their own x [groups, rows, inputs] to y [groups, rows, outputs], without bias.
// unpack: y[o, i] = w[first + o, i] instead; x, bias and rows are not read.
CHOICES(Packing, int8, fp8, int4, nvfp4, mxfp4, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, f16,
        bf16)
CHOICES(Scales, matrix, row, block)
struct Packed {
  FIELDS(
    const void *x = nullptr, *codes, *scale = nullptr, *scale_2 = nullptr, *bias = nullptr;
    void* y = nullptr;
    int64_t rows = 0, inputs, first = 0, outputs, groups = 1, codes_bytes = 0, scale_bytes = 0;
    Packing packing;
    Scales scales = Scales::row;
    int threads = 0;
    bool past_caches = false;
  )
};

// Whether the float16 numbers of `count` blocks, by which their codes are scaled, are finite.
struct BlockScales {
  FIELDS(
    const void* codes;
    int64_t count;
    Packing packing;
    int threads = 0;
  )
};

// Keys that follow from values: k[h, i] = v[h, i] * weight, then its pairs (m, m + d / 2) turned for m < `turning` by the
// row of `table` [.., 2, turning], cos and sin, that belongs to the position of the entry. weight [d]; null: not tied.
struct TiedKeys {
  FIELDS(
    const void *weight, *table;
    int64_t turning;
  )
};

// Where entries are: positions [kv_heads, n], a head `head` numbers after the one before; null: first, first + 1 ...
struct Positions {
  FIELDS(
    const int32_t* positions = nullptr;
    int64_t head = 0, first = 0;
  )
};

// Entries that lie one after another, of one layer after another: addresses of the first key and value of kv head 0 of
// layer 0, how many there are, strides of kv heads and of entries in numbers, and of layers in bytes; addresses of their
// positions, int32, or 0 where they follow one another from `first` on, and strides of these. k is 0 where keys are tied.
// Everything is an int64, so that a table of them can be changed from outside between two calls.
struct Span {
  int64_t k, v, count, k_head, v_head, k_key, v_key, layer, positions, positions_head, positions_layer, first;
};

// A sequence in a batch, whose tokens follow those of the one before: how many of its newest entries are new (still to be
// written), how many queries stand at their end, all its entries, the first of its spans and how many there are.
// causal: a query sees the entries up to its own, and of these the last `window` (0: all). Otherwise all.
// dropped: entries before the first that are not held any more. Sums run over tiles that begin at multiples of 64 of all
// entries ever, whatever spans they lie in. end: the position after the newest token.
struct AttendedRow {
  int64_t added, queries, entries, span, spans, causal, window, dropped, end;
};

// Softmax attention over the rows of a table, with grouped heads: q [all queries, heads, d], out [all queries, heads, dv]
// contiguous, strides of the inner dimension 1. layer: of those that spans hold. Tied keys: dv is d. more: what the same
// queries made of other entries, [all queries, heads, dv], and the logarithm of the sum that their softmax divided by,
// [all queries, heads]: out is then attention over both; or null.
struct Attention {
  FIELDS(
    const void* q;
    const float *more = nullptr, *more_lse = nullptr;
    void* out;
    const AttendedRow* rows;
    const Span* spans;
    int64_t num_rows, layer, heads, kv_heads, d, dv, q_token, q_head;
    float scale;
    TiedKeys tied = {};
    int threads = 0;
  )
};

// Writes new keys [all added, kv_heads, d] and values [all added, kv_heads, dv] to the newest entries of rows; k null:
// values alone. item: bytes of a number, of whatever type.
struct Staging {
  FIELDS(
    const void *k = nullptr, *v;
    const AttendedRow* rows;
    const Span* spans;
    int64_t num_rows, layer, kv_heads, d, dv, k_token = 0, k_head = 0, v_token, v_head, item;
    int threads = 0;
  )
};

// A sequence in a batch, whose tokens follow those of the one before: how many it adds and the position of the first of
// them; addresses of float [layers, series, 3, d], the windows that are open before and after them (which may be the
// same), and numbers to the next layer. Of a window and channel they hold the largest gate, the sum of e^(gate - largest)
// and that sum weighted by the values; of series 0 the window that comes to its end first.
struct PooledRow {
  int64_t tokens, first, before, before_layer, after, after_layer;
};

// Folds kv and gate [all tokens, series * d], and ape [m, series * d] on top of the gates, into the open windows of rows,
// and writes entries [all windows of m tokens that close, d]. The last series of a token is of its own window, the first
// of two of the next one.
struct Pooling {
  FIELDS(
    const void *kv, *gate;
    const float* ape;
    float* entries;
    const PooledRow* rows;
    int64_t num_rows, layer, kv_row, gate_row, m, series, d;
    int threads = 0;
  )
};

// The k entries whose keys score highest, sum_h w[h] * max(q[h] . key, 0), of those that a query sees: at position t the
// first (t + 1) / m. q [all queries, heads, d], w float [all queries, heads]; keys are the values of spans, `end` and
// `queries` of rows count tokens. selected int32 [all queries, width], ascending, then -1. is_released: keys are bytes, as
// kernels/released_entries.py lays them out, and strides count those.
struct Selection {
  FIELDS(
    const void* q;
    const float* w;
    int32_t* selected;
    const AttendedRow* rows;
    const Span* spans;
    int64_t num_rows, layer, heads, d, q_token, q_head, m, k, width;
    bool is_released = false;
    int threads = 0;
  )
};

// Softmax attention over a window of tokens and over compressed entries of all before, which are values and keys at once,
// and a sink, a logit of each head that contributes no value: q and out [all queries, heads, d], sinks float [heads].
// selected: int32 [all queries, k], entries that each query sees, -1: none; null: all of the first (t + 1) / m.
// compressed: null, or rows whose `end` and `queries` count tokens too. is_released: entries are bytes, as
// kernels/released_entries.py lays them out, of which `rotary` numbers turn. Returns whether all that is selected is seen.
struct JointAttention {
  FIELDS(
    const void* q;
    void* out;
    const float* sinks;
    const int32_t* selected = nullptr;
    const AttendedRow *window, *compressed = nullptr;
    const Span *window_spans, *compressed_spans = nullptr;
    int64_t num_rows, layer, heads, d, q_token, q_head, m, k = 0, rotary = 0;
    float scale;
    bool is_released = false;
    int threads = 0;
  )
};

// y = x / sqrt(mean(x^2) + eps) * (weight + shift) for each row of x [rows, size]; weight [size], or null: 1.
struct Norm {
  FIELDS(
    const void *x, *weight = nullptr;
    void* y;
    int64_t rows, size;
    float eps, shift = 0;
    int threads = 0;
  )
};

// Turns 2 half numbers of each head of x [tokens, heads, d], from `first` on, by cos, sin [tokens, half]; the others stay.
// A pair of them is (m, m + half) in halves, (2 m, 2 m + 1) in pairs. wide: cos and sin are float whatever x is.
// norms: x is normed first, with the weight `norm` [d] and shift or null, and rounded.
CHOICES(Layout, halves, pairs)
struct Rotation {
  FIELDS(
    const void *x, *norm = nullptr, *cos, *sin;
    void* y;
    int64_t tokens, heads, d, half, first = 0;
    Layout layout = Layout::halves;
    bool wide = false, norms = false;
    float eps = 0, shift = 0;
    int threads = 0;
  )
};

// sum = (x + norm(y)) * scale, the residual after a branch, and normed = the norm of sum: x, y, sum and normed
// [rows, size]. before: weight [size] of y's norm, null: y as it is; scale: [1] or null; after: weight of the sum's
// norm, with normed, or both null; shift: of both norms.
struct Residual {
  FIELDS(
    const void *x, *y, *before = nullptr, *scale = nullptr, *after = nullptr;
    void *sum, *normed = nullptr;
    int64_t rows, size;
    float eps, shift = 0;
    int threads = 0;
  )
};

// What a branch reads of streams x [tokens, streams, size], and the weights with which they are mixed after it:
//   u = sum_j pre_j x_j,  pre = sigmoid(v scale_0 + base) + eps,  post = 2 sigmoid(v scale_1 + base),
//   comb = a Sinkhorn of `iters` rounds of v scale_2 + base,  v = fn x / sqrt(mean(x^2) + norm_eps)
// fn [functions, streams * size] and base [functions] in the order pre, post, comb; u [tokens, size], post [tokens,
// streams], comb [tokens, streams, streams]. post and comb null: neither is wanted, nor are their functions there.
// At most 8 streams.
struct HyperPre {
  FIELDS(
    const void* x;
    const float *fn, *base, *scale;
    void* u;
    float *post = nullptr, *comb = nullptr;
    int64_t tokens, streams, size, iters = 0;
    float eps, norm_eps;
    int threads = 0;
  )
};

// out[k] = post_k y + sum_j comb[j, k] x[j] for the streams x and out [tokens, streams, size], y [tokens, size]. At most 8.
struct HyperPost {
  FIELDS(
    const void *x, *y;
    const float *post, *comb;
    void* out;
    int64_t tokens, streams, size;
    int threads = 0;
  )
};

// Entries of DeepSeek-V4 as numbers x [rows, size], of which the last `rotary` turn, and in the bytes of its release
// [rows, entry_bytes] (kernels/released_entries.py): one of them is made of the other.
struct ReleasedEntries {
  FIELDS(
    void* x;
    uint8_t* packed;
    int64_t rows, size, rotary;
    int threads = 0;
  )
};

// Keys of its indexer, x [rows, size] and packed [rows, key_bytes]. Those that are encoded are turned by a Hadamard matrix
// first; packed null: the numbers that their bytes would stand for go to `rounded` [rows, size].
struct ReleasedKeys {
  FIELDS(
    void* x;
    uint8_t* packed = nullptr;
    void* rounded = nullptr;
    int64_t rows, size;
    int threads = 0;
  )
};

// Attention of few queries over the first n tokens of codes (kernels/code_layout.py), all of them visible, in the
// rotated frames: q float [tokens, heads, d], out float [tokens, heads, dv], lse float [tokens, heads]. k, v: blocks of
// 64 tokens, contiguous within a kv head; scales [kv_heads, blocks, 64], contiguous within a head, float16 or float;
// k_centroids, v_centroids: 2^bits floats; bits 2, 3 or 4; bias: added to the scaled scores, [tokens, heads, n] or null.
// is_exact: products in float; otherwise queries, weights and centroids may be rounded to integers.
struct CodesAttention {
  FIELDS(
    const float *q, *k_centroids, *v_centroids, *bias = nullptr;
    const uint8_t *k, *v;
    const void *k_scale, *v_scale;
    float *out, *lse;
    int64_t tokens, heads, kv_heads, n, d, dv;
    int64_t k_head, v_head, k_scale_head, v_scale_head;
    int k_bits, v_bits;
    bool has_half_scales, is_exact;
    float scale;
    int threads = 0;
  )
};

// A part of vectors in codes of 1 to 8 bits: codes, scales and centroids as above. vectors [tokens, heads, dims]:
// of keys the queries in its frame, of values the mix, which is written.
struct CodePart {
  FIELDS(
    const uint8_t* codes;
    const void* scale;
    const float* centroids;
    float* vectors;
    int64_t bits, dims, codes_head, scale_head;
  )
};

// Keys that follow from values in codes. With X [a, b] the decoded parts of a value, each filled up to 16 dimensions, one
// after the other, L X R [a_out, b_out] are the channels m and, in the second half, m + d / 2 of the value for the
// first m; of these `keys` says what becomes of them, and q [tokens, heads, a_out * b_out] are the queries there.
// left [a_out, a], right [kv_heads, b, b_out], of which right_head is 0 if it is the same for all. q null: not tied.
struct TiedCodes {
  FIELDS(
    const float *q, *left, *right;
    int64_t a, a_out, b, b_out, right_head = 0;
    TiedKeys keys;
    Positions where;
  )
};

// As CodesAttention for keys and values that are sums of any parts. tied: `keys` have no codes, only queries, for the
// channels of values that do not turn. is_exact: in float; otherwise what is written out may be rounded to bfloat16.
struct PartsAttention {
  FIELDS(
    List<CodePart> keys, values;
    TiedCodes tied = {};
    const float* bias = nullptr;
    float* lse;
    int64_t tokens, heads, kv_heads, n;
    bool has_half_scales, is_exact;
    float scale;
    int threads = 0;
  )
};

// Codes of tokens that follow one another, of one layer after another: addresses of the first block and of its scales, of
// keys and of values, of kv head 0 of layer 0; how many tokens; strides of kv heads in numbers, and of layers in bytes.
struct CodedSpan {
  int64_t k, k_scale, v, v_scale, count, k_head, k_scale_head, v_head, v_scale_head;
  int64_t k_layer, k_scale_layer, v_layer, v_scale_layer;
};

// A sequence in a batch, whose queries follow those of the one before: how many, the first of its spans, how many there are.
struct CodedRow {
  int64_t queries, span, spans;
};

// CodesAttention over the rows of a table, and with other widths PartsAttention: q [all queries, heads, d], out [all
// queries, heads, dv], lse [all queries, heads]. Of a row without spans out is 0, and lse minus infinity.
struct CodedRows {
  FIELDS(
    const float *q, *k_centroids, *v_centroids;
    float *out, *lse;
    const CodedRow* rows;
    const CodedSpan* spans;
    int64_t num_rows, layer, heads, kv_heads, d, dv;
    int k_bits, v_bits;
    bool has_half_scales, is_exact;
    float scale;
    int threads = 0;
  )
};

// y[t, c] = silu(bias[c] + sum_j weight[c, j] * window[t + j, c]): window [taps - 1 + tokens, channels], weight
// [channels, taps], bias [channels] or null; y float [tokens, channels].
struct Convolution {
  FIELDS(
    const void *x, *weight, *bias = nullptr;
    float* y;
    int64_t tokens, channels, taps;
    int threads = 0;
  )
};

// Tokens of a scan: x [tokens, heads, p] and dt [tokens, heads], B and C [tokens, groups, n] with the same stride.
struct ScanInputs {
  FIELDS(
    const float *x, *dt, *B, *C;
    int64_t tokens, x_row, dt_row, B_row;
  )
};

// S = exp(dt A) S + dt x B^T, y = S C + D x for states [heads, p, n]; D [heads] or null. Pending tokens carry the state
// to `carried`, which may be `state` itself, and make no y (their C is not read). Staged ones start from there and leave
// it: y [tokens - skipped, heads, p] of all but the first, and to `after`, unless null, the state after the last of them.
struct Scan {
  FIELDS(
    const float* state;
    float* carried = nullptr;
    const float *A, *D = nullptr;
    ScanInputs pending = {}, staged = {};
    float *y = nullptr, *after = nullptr;
    int64_t heads, p, n, groups, skipped = 0;
    int threads = 0;
  )
};

// A sequence in a batch, whose tokens follow those of the one before: how many it adds, and how many of the newest are
// asked for their y. What follows are addresses, of layer 0 where layers lie one after the other:
// states, carried and after (0: not wanted) float [layers, heads, p, n], as in Scan; moved: int64 [layers], 1 for those
// whose states have gone to `carried` (0: none are pending); tails [layers, taps - 1, channels] of the inputs' type, the
// inputs before the new ones; windows: int64 [layers], addresses of [taps - 1 + added, channels], all inputs; mixed and dt
// float [.., added, channels or heads], what the convolution makes of the new ones, `mixed_layer` numbers to the next
// layer, and their steps; pending_mixed and pending_dt the same of `pending` committed tokens, with room for
// `pending_room` of them a layer.
struct ScannedRow {
  int64_t added, queries, states, carried, after, moved, tails, windows, mixed, mixed_layer, dt;
  int64_t pending, pending_room, pending_mixed, pending_dt;
};

// The convolution and the scan of one layer for the rows of a table: x [all added, channels], the inputs, and dt [all
// added, heads], their steps; y [all queries, heads, p]. Writes windows, mixed, dt, after and, for pending tokens, carried
// and moved of each row.
struct RowsScan {
  FIELDS(
    const void *x, *conv_weight, *conv_bias = nullptr;
    const float *dt, *A, *D;
    float* y;
    const ScannedRow* rows;
    int64_t num_rows, layer, x_row, dt_row, heads, p, n, groups, taps;
    int threads = 0;
  )
};

// out = rms_norm(y * silu(gate)) * weight, the mean taken within each group of `size` numbers: y float [rows, groups,
// size] and out contiguous, weight [groups * size].
struct GatedNorm {
  FIELDS(
    const float* y;
    const void *gate, *weight;
    void* out;
    int64_t rows, groups, size, gate_row;
    float eps;
    int threads = 0;
  )
};

// ids and weights [tokens, k] of the experts chosen by scores of x gate^T, plus bias, null: 0; x [tokens, inputs], gate
// [experts, inputs]. sqrtsoftplus: of no less than -87. given: ids that were chosen already; others are not written.
CHOICES(Scoring, sigmoid, sqrtsoftplus, softmax)
struct Route {
  FIELDS(
    const void *x, *gate;
    const float* bias = nullptr;
    const int64_t* given = nullptr;
    int64_t* ids = nullptr;
    float* weights;
    int64_t tokens, inputs, experts, k, n_group = 1, topk_group = 1;
    Scoring scoring = Scoring::sigmoid;
    bool normalize;
    float scale;
    int threads = 0;
    bool past_caches = false;
  )
};

// y[t] = sum_j weights[t, j] * down_e activation(up_e x[t]) with e = ids[t, j]; x, y [tokens, inputs], up [experts,
// width, inputs] (gated activations: 2 width, the gate's rows first), down [experts, inputs, width]. ids null: all 0;
// weights null: all 1. limit: a gate is cut off above it before the activation, its factor above and below.
CHOICES(ExpertActivation, relu2, gated_gelu, gated_silu)
struct Experts {
  FIELDS(
    const void *x, *up, *down;
    const int64_t* ids = nullptr;
    const float* weights = nullptr;
    void* y;
    int64_t tokens, k, inputs, width;
    ExpertActivation activation;
    float limit = __builtin_inff();
    int threads = 0;
    bool past_caches = false;
  )
};

// Experts whose matrices are stacks packed in one format (their x, y, bias, rows and groups are not read). gate: of gated
// activations, where `up` does not hold its rows too.
struct PackedExperts {
  FIELDS(
    const void* x;
    Packed up, down, gate = {};
    const int64_t* ids = nullptr;
    const float* weights = nullptr;
    void* y;
    int64_t tokens, k;
    ExpertActivation activation;
    float limit = __builtin_inff();
    int threads = 0;
  )
};

// target [count] = source [count], which do not overlap. Returns whether all of them are finite.
struct Copy {
  FIELDS(
    const void* source;
    void* target;
    int64_t count;
    int threads = 0;
  )
};

struct Kernels {
  const char* name;
  void (*product)(Type, const Product&);
  void (*packed)(Type, const Packed&);
  void (*unpack)(Type, const Packed&);
  bool (*finite_blocks)(const BlockScales&);
  void (*attention)(Type, const Attention&);
  void (*stage)(const Staging&);
  void (*pool)(Type, const Pooling&);
  void (*select_entries)(Type, const Selection&);
  bool (*joint_attention)(Type, const JointAttention&);
  void (*norm)(Type, const Norm&);
  void (*rotation)(Type, const Rotation&);
  void (*residual)(Type, const Residual&);
  void (*hyper_pre)(Type, const HyperPre&);
  void (*hyper_post)(Type, const HyperPost&);
  void (*encode_entries)(Type, const ReleasedEntries&);
  void (*decode_entries)(Type, const ReleasedEntries&);
  void (*encode_keys)(Type, const ReleasedKeys&);
  void (*decode_keys)(Type, const ReleasedKeys&);
  void (*codes)(const CodesAttention&);
  void (*code_parts)(const PartsAttention&);
  void (*coded_rows)(const CodedRows&);
  void (*convolution)(Type, const Convolution&);
  void (*scan)(const Scan&);
  void (*scan_rows)(Type, const RowsScan&);
  void (*gated_norm)(Type, const GatedNorm&);
  void (*route)(Type, const Route&);
  void (*experts)(Type, const Experts&);
  void (*packed_experts)(Type, const PackedExperts&);
  bool (*copy)(Type, const Copy&);
};

#undef FIELDS
#undef CHOICES

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2, avx512, avx512_bf16;
#endif

}  // namespace sparing
