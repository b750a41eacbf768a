// The Python module: chooses the instruction set, and passes addresses and shapes on.
// Callers check types and shapes (kernels/dispatch.py and the file of each mechanism); here nothing is checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "kernels.hpp"

namespace nb = nanobind;
using namespace sparing;

namespace {

const Kernels* chosen = &portable;

std::vector<const Kernels*> available() {  // the fastest last
  std::vector<const Kernels*> sets = {&portable};
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  if (has_avx2) sets.push_back(&avx2);
  if (has_avx512) sets.push_back(&avx512);
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512_bf16);
#endif
  return sets;
}

// Whether weights that are read once are fetched past the caches. Then everything else, Python above all, finds them
// warm after a product; but Intel CPUs take up to twice as long for one with such fetching.
bool fetches_past_caches() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return true;
#endif
}

const bool past_caches = fetches_past_caches();

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Type type_of(bool is_bfloat16) { return is_bfloat16 ? Type::bfloat16 : Type::float32; }

// Addresses of x, dt, B and C, tokens, and strides of x, dt and B.
using Staged = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>;

ScanInputs inputs(const Staged& staged) {
  auto [x, dt, B, C, tokens, x_row, dt_row, B_row] = staged;
  return {at<const float>(x), at<const float>(dt), at<const float>(B), at<const float>(C), tokens, x_row, dt_row, B_row};
}

// Addresses of codes, scales, centroids and vectors; bits, dims, and strides of codes and scales.
using Stream = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>;

std::vector<CodeStream> streams(const std::vector<Stream>& all) {
  std::vector<CodeStream> found;
  for (auto [codes, scale, centroids, vectors, bits, dims, codes_head, scale_head] : all)
    found.push_back({at<const uint8_t>(codes), at(scale), at<const float>(centroids), at<float>(vectors), bits, dims,
                     codes_head, scale_head});
  return found;
}

// Addresses of q, left, right, weight, table and positions; a, a_out, b, b_out, right_head, first, turning.
using Tied = std::tuple<std::array<uintptr_t, 6>, std::array<int64_t, 7>>;

}  // namespace

NB_MODULE(_native, m) {
  m.def("sets", [] {
    std::vector<std::string> names;
    for (auto set : available()) names.push_back(set->name);
    return names;
  });
  m.def("use", [](const std::string& name) {
    for (auto set : available())
      if (set->name == name) return void(chosen = set);
    throw nb::value_error(("this CPU has no " + name).c_str());
  });
  m.def("product", [](bool bfloat16, uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t w2, uintptr_t bias2,
                      uintptr_t y, uintptr_t y2, int64_t rows, int64_t in, int64_t out, int activation, int threads) {
    Product p{at(x), at(w), at(bias), at(w2), at(bias2), at(y), at(y2), rows, in, out, Activation(activation), threads,
              past_caches};
    nb::gil_scoped_release free;
    chosen->product(type_of(bfloat16), p);
  });
  m.def("packed", [](bool bfloat16, int packing, uintptr_t x, uintptr_t codes, uintptr_t scale, uintptr_t scale_2,
                     uintptr_t bias, uintptr_t y, int64_t rows, int64_t in, int64_t out, int scales, int threads) {
    Packed p{at(x), at(codes), at(scale), at(scale_2), at(bias), at(y), rows,
             in,    0,         out,       Packing(packing), Scales(scales), threads, past_caches};
    nb::gil_scoped_release free;
    chosen->packed(type_of(bfloat16), p);
  });
  m.def("unpack", [](bool bfloat16, int packing, uintptr_t codes, uintptr_t scale, uintptr_t scale_2, uintptr_t y,
                     int64_t in, int64_t first, int64_t out, int scales, int threads) {
    Packed p{nullptr, at(codes), at(scale), at(scale_2), nullptr, at(y), 0,
             in,      first,     out,       Packing(packing), Scales(scales), threads, past_caches};
    nb::gil_scoped_release free;
    chosen->unpack(type_of(bfloat16), p);
  });
  m.def("attention", [](bool bfloat16, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int64_t tokens,
                        int64_t heads, int64_t kv_heads, int64_t keys, int64_t d, int64_t dv, int64_t q_token,
                        int64_t q_head, int64_t k_head, int64_t k_key, int64_t v_head, int64_t v_key, float scale,
                        bool causal, int64_t window, int threads, uintptr_t weight, uintptr_t table,
                        uintptr_t positions, int64_t first, int64_t turning) {
    Attention a{at(q),   at(k),  at(v),  at(out), tokens, heads, kv_heads, keys,   d,      dv,
                q_token, q_head, k_head, k_key,   v_head, v_key, scale,    causal, window, threads,
                {at(weight), at(table), at<const int64_t>(positions), first, turning}};
    nb::gil_scoped_release free;
    chosen->attention(type_of(bfloat16), a);
  });
  m.def("norm", [](bool bfloat16, uintptr_t x, uintptr_t weight, uintptr_t y, int64_t rows, int64_t size,
                   float eps, int threads) {
    Norm n{at(x), at(weight), at(y), rows, size, eps, threads};
    nb::gil_scoped_release free;
    chosen->norm(type_of(bfloat16), n);
  });
  m.def("rotation", [](bool bfloat16, uintptr_t x, uintptr_t norm, uintptr_t cos, uintptr_t sin, uintptr_t y,
                       int64_t tokens, int64_t heads, int64_t d, int64_t half, float eps, int threads) {
    Rotation r{at(x), at(norm), at(cos), at(sin), at(y), tokens, heads, d, half, eps, threads};
    nb::gil_scoped_release free;
    chosen->rotation(type_of(bfloat16), r);
  });
  m.def("residual", [](bool bfloat16, uintptr_t x, uintptr_t y, uintptr_t before, uintptr_t scale, uintptr_t after,
                       uintptr_t sum, uintptr_t normed, int64_t rows, int64_t size, float eps, int threads) {
    Residual r{at(x), at(y), at(before), at(scale), at(after), at(sum), at(normed), rows, size, eps, threads};
    nb::gil_scoped_release free;
    chosen->residual(type_of(bfloat16), r);
  });
  m.def("codes", [](uintptr_t q, uintptr_t k, uintptr_t k_scale, uintptr_t k_centroids, int k_bits, uintptr_t v,
                    uintptr_t v_scale, uintptr_t v_centroids, int v_bits, uintptr_t bias, uintptr_t out, uintptr_t lse,
                    int64_t tokens, int64_t heads, int64_t kv_heads, int64_t n, int64_t d, int64_t dv, int64_t k_head,
                    int64_t v_head, int64_t k_scale_head, int64_t v_scale_head, bool has_half_scales, bool is_exact,
                    float scale, int threads) {
    CodesAttention a{at<const float>(q), at<const float>(k_centroids), at<const float>(v_centroids),
                     at<const float>(bias), at<const uint8_t>(k), at<const uint8_t>(v), at(k_scale), at(v_scale),
                     at<float>(out), at<float>(lse), tokens, heads, kv_heads, n, d, dv, k_head, v_head, k_scale_head,
                     v_scale_head, k_bits, v_bits, has_half_scales, is_exact, scale, threads};
    nb::gil_scoped_release free;
    chosen->codes(a);
  });
  m.def("code_streams", [](const std::vector<Stream>& keys, const std::vector<Stream>& values, const Tied& tied,
                           uintptr_t bias, uintptr_t lse, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t n,
                           bool has_half_scales, bool is_exact, float scale, int threads) {
    auto k = streams(keys), v = streams(values);
    auto [p, size] = tied;
    StreamsAttention a{k.data(), v.data(), int64_t(k.size()), int64_t(v.size()),
                       {at<const float>(p[0]), at<const float>(p[1]), at<const float>(p[2]), size[0], size[1], size[2],
                        size[3], size[4], {at(p[3]), at(p[4]), at<const int64_t>(p[5]), size[5], size[6]}},
                       at<const float>(bias), at<float>(lse), tokens, heads, kv_heads, n, has_half_scales, is_exact,
                       scale, threads};
    nb::gil_scoped_release free;
    chosen->code_streams(a);
  });
  m.def("convolution", [](bool bfloat16, uintptr_t window, uintptr_t weight, uintptr_t bias, uintptr_t y,
                          int64_t tokens, int64_t channels, int64_t taps, int threads) {
    Convolution c{at(window), at(weight), at(bias), at<float>(y), tokens, channels, taps, threads};
    nb::gil_scoped_release free;
    chosen->convolution(type_of(bfloat16), c);
  });
  m.def("scan", [](uintptr_t state, uintptr_t A, uintptr_t D, const Staged& behind, const Staged& ahead, uintptr_t y,
                   uintptr_t after, int64_t heads, int64_t p, int64_t n, int64_t groups, int threads) {
    Scan s{at<float>(state), at<const float>(A), at<const float>(D), inputs(behind), inputs(ahead), at<float>(y),
           at<float>(after), heads, p, n, groups, threads};
    nb::gil_scoped_release free;
    chosen->scan(s);
  });
  m.def("gated_norm", [](bool bfloat16, uintptr_t y, uintptr_t gate, uintptr_t weight, uintptr_t out, int64_t rows,
                         int64_t groups, int64_t size, int64_t gate_row, float eps, int threads) {
    GatedNorm g{at<const float>(y), at(gate), at(weight), at(out), rows, groups, size, gate_row, eps, threads};
    nb::gil_scoped_release free;
    chosen->gated_norm(type_of(bfloat16), g);
  });
  m.def("route", [](bool bfloat16, uintptr_t x, uintptr_t gate, uintptr_t bias, uintptr_t ids, uintptr_t weights,
                    int64_t tokens, int64_t in, int64_t experts, int64_t k, int64_t n_group, int64_t topk_group,
                    bool normalize, float scale, int threads) {
    Route r{at(x), at(gate), at<const float>(bias), at<int64_t>(ids), at<float>(weights), tokens, in, experts, k,
            n_group, topk_group, normalize, scale, threads, past_caches};
    nb::gil_scoped_release free;
    chosen->route(type_of(bfloat16), r);
  });
  m.def("experts", [](bool bfloat16, uintptr_t x, uintptr_t up, uintptr_t down, uintptr_t ids, uintptr_t weights,
                      uintptr_t y, int64_t tokens, int64_t k, int64_t in, int64_t width, int activation, int threads) {
    Experts e{at(x), at(up), at(down), at<const int64_t>(ids), at<const float>(weights), at(y), tokens, k, in, width,
              ExpertActivation(activation), threads, past_caches};
    nb::gil_scoped_release free;
    chosen->experts(type_of(bfloat16), e);
  });
  // up, down: (codes, scale, scale_2, bytes of an expert's codes, of its scales)
  typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t> Stack;
  m.def("packed_experts", [](bool bfloat16, int packing, int scales, uintptr_t x, const Stack& up, const Stack& down,
                             uintptr_t ids, uintptr_t weights, uintptr_t y, int64_t tokens, int64_t k, int64_t in,
                             int64_t width, int activation, int threads) {
    bool gated = ExpertActivation(activation) == ExpertActivation::gated_gelu;
    auto stack = [&](const Stack& s, int64_t in, int64_t out) {
      auto [codes, scale, scale_2, codes_bytes, scale_bytes] = s;
      Packed first{at(x), at(codes), at(scale), at(scale_2), nullptr, nullptr, 0,
                   in,    0,         out,       Packing(packing), Scales(scales), threads, past_caches};
      return PackedStack{first, codes_bytes, scale_bytes};
    };
    PackedExperts e{stack(up, in, gated ? 2 * width : width), stack(down, width, in), at<const int64_t>(ids),
                    at<const float>(weights), at(y), tokens, k, ExpertActivation(activation), threads};
    nb::gil_scoped_release free;
    chosen->packed_experts(type_of(bfloat16), e);
  });
  m.def("copy", [](bool bfloat16, uintptr_t from, uintptr_t to, int64_t count, int threads) {
    bool is_finite = true;
    Copy c{at(from), at(to), count, &is_finite, threads};
    nb::gil_scoped_release free;
    chosen->copy(type_of(bfloat16), c);
    return is_finite;
  });
}
