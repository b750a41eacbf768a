// What every instruction set offers: one table of functions over raw pointers. Shapes are in numbers, strides in
// elements; `T` stands for the type of x, q, k, v and weights.
#pragma once

#include <cstdint>

namespace sparing {

enum class Type { float32, bfloat16 };

// y[r, o] = sum_i x[r, i] * w[o, i] + bias[o]; x [rows, in] with rows x_stride apart, w [out, in] and y [rows, out]
// contiguous, bias [out] or null. Sums in float32, rounded once.
struct Product {
  const void *x, *w, *bias;
  void* y;
  int64_t rows, x_stride, in, out;
  int threads;
};

// Softmax attention of few queries, the last `tokens` of `keys` positions, with grouped heads: q [tokens, heads, d],
// k [kv_heads, keys, d], v [kv_heads, keys, dv], out [tokens, heads, dv] contiguous, strides of the inner dimension 1.
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
};

struct Kernels {
  const char* name;
  void (*product)(Type, const Product&);
  void (*attention)(Type, const Attention&);
};

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2, avx512, avx512_bf16;
#endif

}  // namespace sparing
