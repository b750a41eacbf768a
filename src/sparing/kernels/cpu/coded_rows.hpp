// Attention over codes for the rows of a batch: of each row the kernel for its widths, span after span.
#pragma once

#include <vector>

#include "code_parts.hpp"
#include "codes.hpp"

namespace {

// Queries of one row, from the `first` on, over one span: out [queries, heads, dv], lse [queries, heads].
void over_span(const sparing::CodedRows& a, const sparing::CodedSpan& s, int64_t first, int64_t queries, float* out,
               float* lse, int threads) {
  auto codes_at = [&](int64_t place, int64_t layer) { return reinterpret_cast<const uint8_t*>(place + a.layer * layer); };
  const float* q = a.q + first * a.heads * a.d;
  const uint8_t *k = codes_at(s.k, s.k_layer), *v = codes_at(s.v, s.v_layer);
  const void *k_scale = codes_at(s.k_scale, s.k_scale_layer), *v_scale = codes_at(s.v_scale, s.v_scale_layer);
  if (2 <= a.k_bits && a.k_bits <= 4 && 2 <= a.v_bits && a.v_bits <= 4) {
    sparing::CodesAttention one{};
    one.q = q, one.k_centroids = a.k_centroids, one.v_centroids = a.v_centroids;
    one.k = k, one.v = v, one.k_scale = k_scale, one.v_scale = v_scale, one.out = out, one.lse = lse;
    one.tokens = queries, one.heads = a.heads, one.kv_heads = a.kv_heads, one.n = s.count, one.d = a.d, one.dv = a.dv;
    one.k_head = s.k_head, one.v_head = s.v_head, one.k_scale_head = s.k_scale_head, one.v_scale_head = s.v_scale_head;
    one.k_bits = a.k_bits, one.v_bits = a.v_bits, one.has_half_scales = a.has_half_scales, one.is_exact = a.is_exact;
    one.scale = a.scale, one.threads = threads;
    return codes(one);
  }
  sparing::CodePart keys{}, values{};
  keys.codes = k, keys.scale = k_scale, keys.centroids = a.k_centroids, keys.vectors = const_cast<float*>(q);
  keys.bits = a.k_bits, keys.dims = a.d, keys.codes_head = s.k_head, keys.scale_head = s.k_scale_head;
  values.codes = v, values.scale = v_scale, values.centroids = a.v_centroids, values.vectors = out;
  values.bits = a.v_bits, values.dims = a.dv, values.codes_head = s.v_head, values.scale_head = s.v_scale_head;
  sparing::PartsAttention one{};
  one.keys = {&keys, 1}, one.values = {&values, 1}, one.lse = lse;
  one.tokens = queries, one.heads = a.heads, one.kv_heads = a.kv_heads, one.n = s.count;
  one.has_half_scales = a.has_half_scales, one.is_exact = a.is_exact, one.scale = a.scale, one.threads = threads;
  code_parts(one);
}

// Adds to a mix of `size` numbers another one, over other tokens, each with the logarithm of what its softmax divided by.
void add_partial(float* out, float* lse, const float* more, float more_lse, int64_t size) {
  float top = more_lse > *lse ? more_lse : *lse;
  float keep = exponential(*lse - top), add = exponential(more_lse - top), both = keep + add;
  for (int64_t j = 0; j < size; ++j) out[j] = (out[j] * keep + more[j] * add) / both;
  *lse = top + __builtin_logf(both);
}

void over_row(const sparing::CodedRows& a, const sparing::CodedRow& row, int64_t first, int threads) {
  const int64_t vectors = row.queries * a.heads;
  float *out = a.out + first * a.heads * a.dv, *lse = a.lse + first * a.heads;
  if (row.spans == 0) {
    std::fill(out, out + vectors * a.dv, 0.0f);
    std::fill(lse, lse + vectors, -__builtin_inff());
    return;
  }
  over_span(a, a.spans[row.span], first, row.queries, out, lse, threads);
  if (row.spans == 1) return;
  std::vector<float> more(size_t(vectors * a.dv)), more_lse(size_t(vectors), 0.0f);
  for (int64_t s = 1; s < row.spans; ++s) {
    over_span(a, a.spans[row.span + s], first, row.queries, more.data(), more_lse.data(), threads);
    for (int64_t i = 0; i < vectors; ++i) add_partial(out + i * a.dv, lse + i, &more[size_t(i * a.dv)], more_lse[size_t(i)], a.dv);
  }
}

void coded_rows(const sparing::CodedRows& a) {
  std::vector<int64_t> first;  // queries of the rows before
  for (int64_t i = 0, queries = 0; i < a.num_rows; queries += a.rows[i++].queries) first.push_back(queries);
  if (a.num_rows == 1) return over_row(a, a.rows[0], 0, a.threads);
  sparing::share(a.num_rows, a.threads, [&](int64_t i) {
    if (a.rows[i].queries) over_row(a, a.rows[i], first[size_t(i)], 1);
  });
}

}  // namespace
