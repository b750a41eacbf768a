// The Python module: chooses the instruction set, and offers its kernels as bind.hpp makes functions of them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.hpp"

namespace nb = nanobind;
using namespace sparing;
using binding::chosen, binding::Function;

namespace {

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
  m.def("attach", [](nb::object get_num_threads, nb::object data_ptr) {
    binding::torch = {get_num_threads.release().ptr(), data_ptr.release().ptr()};
  });

  auto& types = *new binding::Types(fetches_past_caches());  // fields refer to it for good
  types.add<Activation>("Activation");
  types.add<Packing>("Packing");
  types.add<Scales>("Scales");
  types.add<ExpertActivation>("ExpertActivation");
  types.add<Layout>("Layout");
  types.add<Scoring>("Scoring");
  types.add<Packed>("Packed");
  types.add<TiedKeys>("TiedKeys");
  types.add<Positions>("Positions");
  types.add<TiedCodes>("TiedCodes");
  types.add<CodePart>("CodePart");
  types.add<ScanInputs>("ScanInputs");

  Function<&Kernels::product>::add_to(m, "product", types);
  Function<&Kernels::packed>::add_to(m, "packed", types);
  Function<&Kernels::unpack>::add_to(m, "unpack", types);
  Function<&Kernels::finite_blocks>::add_to(m, "finite_blocks", types);
  Function<&Kernels::attention>::add_to(m, "attention", types);
  Function<&Kernels::stage>::add_to(m, "stage", types);
  Function<&Kernels::pool>::add_to(m, "pool", types);
  Function<&Kernels::select_entries>::add_to(m, "select_entries", types);
  Function<&Kernels::joint_attention>::add_to(m, "joint_attention", types);
  Function<&Kernels::norm>::add_to(m, "norm", types);
  Function<&Kernels::rotation>::add_to(m, "rotation", types);
  Function<&Kernels::residual>::add_to(m, "residual", types);
  Function<&Kernels::hyper_pre>::add_to(m, "hyper_pre", types);
  Function<&Kernels::hyper_post>::add_to(m, "hyper_post", types);
  Function<&Kernels::encode_entries>::add_to(m, "encode_entries", types);
  Function<&Kernels::decode_entries>::add_to(m, "decode_entries", types);
  Function<&Kernels::encode_keys>::add_to(m, "encode_keys", types);
  Function<&Kernels::decode_keys>::add_to(m, "decode_keys", types);
  Function<&Kernels::codes>::add_to(m, "codes", types);
  Function<&Kernels::code_parts>::add_to(m, "code_parts", types);
  Function<&Kernels::coded_rows>::add_to(m, "coded_rows", types);
  Function<&Kernels::convolution>::add_to(m, "convolution", types);
  Function<&Kernels::scan>::add_to(m, "scan", types);
  Function<&Kernels::scan_rows>::add_to(m, "scan_rows", types);
  Function<&Kernels::gated_norm>::add_to(m, "gated_norm", types);
  Function<&Kernels::route>::add_to(m, "route", types);
  Function<&Kernels::experts>::add_to(m, "experts", types);
  Function<&Kernels::packed_experts>::add_to(m, "packed_experts", types);
  Function<&Kernels::copy>::add_to(m, "copy", types);
}
