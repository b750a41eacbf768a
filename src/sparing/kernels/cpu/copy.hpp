// Copying numbers and looking at them on the way: memory is the limit, so looking costs nothing.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kCopiedBytes = 256 << 10;  // the share a thread takes at a time

// exponent: the bits that are all set in infinities and NaN, and in nothing else.
template <class U>
bool copy_bits(const sparing::Copy& c, U exponent) {
  auto source = static_cast<const U*>(c.source);
  auto target = static_cast<U*>(c.target);
  bool is_finite = true;
  int64_t step = kCopiedBytes / int64_t(sizeof(U));
  sparing::share((c.count + step - 1) / step, c.threads, [&](int64_t piece) {
    U found = 0;  // no branch: the loop becomes loads, stores and comparisons of whole vectors
    for (int64_t i = piece * step, last = smaller(c.count, (piece + 1) * step); i < last; ++i) {
      U bits = source[i];
      target[i] = bits;
      found |= U((bits & exponent) == exponent);
    }
    if (found) __atomic_store_n(&is_finite, false, __ATOMIC_RELAXED);
  });
  return is_finite;
}

bool copy(sparing::Type type, const sparing::Copy& c) {
  return type == sparing::Type::bfloat16 ? copy_bits<uint16_t>(c, 0x7F80) : copy_bits<uint32_t>(c, 0x7F800000);
}

}  // namespace
