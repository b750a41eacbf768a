// Weights in few bits written out as numbers, for products with many rows. The vectors are those of packed.hpp, but in
// the order of the numbers: W codes at a time, which never belong to two scales.
#pragma once

#include "packed_products.hpp"

namespace {

// The codes of W consecutive weights, each in the lowest bits of its word.
inline Words codes_in_order(const Byte* p) {
#if defined(__AVX512F__)
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Words)_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4)));
#elif defined(__AVX2__)
  int32_t four;
  memcpy(&four, p, 4);
  __m128i bytes = _mm_cvtsi32_si128(four);
  return (Words)_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4)));
#else
  Words w;
  for (int l = 0; l < W; ++l) w[l] = p[l / 2] >> (4 * (l % 2));
  return w;
#endif
}

template <class F, class T>
void unpack_four(const sparing::Packed& p, int64_t o, T* y) {
  int64_t block = 8 * F::lanes;
  auto codes = static_cast<const Byte*>(p.codes) + o * p.inputs / 2;
  auto scale = static_cast<const Byte*>(p.scale) + o * p.inputs / block * F::scale_bytes;
  const float whole = p.scale_2 ? *static_cast<const float*>(p.scale_2) : 1.0f;
  for (int64_t i = 0; i < p.inputs; i += block, scale += F::scale_bytes) {
    float s = F::exact_scale(scale) * whole;
    for (int64_t j = i; j < i + block; j += W) write(y + j, values<F>(codes_in_order(codes + j / 2)) * s);
  }
}

template <class F, class T>
void unpack_eight(const sparing::Packed& p, int64_t o, T* y) {
  auto codes = static_cast<const Byte*>(p.codes) + o * p.inputs;
  for (int64_t i = 0; i < p.inputs;) {
    int64_t end = smaller(i + scaled_together(p), p.inputs);
    float s = scale_at(p, o, i);
    for (; i + W <= end; i += W) write(y + i, F::exact(codes + i) * F::unit * s);
    if (i < end) {
      Byte rest[W] = {};
      memcpy(rest, codes + i, size_t(end - i));
      write(y + i, F::exact(rest) * F::unit * s, end - i);
      i = end;
    }
  }
}

template <class T>
void unpack_of(const sparing::Packed& p) {
  int64_t step = greater(1, kPackedPieceBytes / greater(1, p.inputs));
  sparing::share((p.outputs + step - 1) / step, p.threads, [&](int64_t piece) {
    for (int64_t row = piece * step; row < smaller((piece + 1) * step, p.outputs); ++row) {
      T* y = static_cast<T*>(p.y) + row * p.inputs;
      int64_t o = p.first + row;
      switch (p.packing) {
        case sparing::Packing::int8: unpack_eight<Int8>(p, o, y); break;
        case sparing::Packing::fp8: unpack_eight<FP8>(p, o, y); break;
        case sparing::Packing::int4: unpack_four<Int4>(p, o, y); break;
        case sparing::Packing::nvfp4: unpack_four<NVFP4>(p, o, y); break;
        case sparing::Packing::mxfp4: unpack_four<MXFP4>(p, o, y); break;
        default:
          by_kind(p.packing, [&](auto kind) {
            kind.unpack(static_cast<const Byte*>(p.codes) + o * kind.row_bytes(p.inputs), p.inputs, y);
          });
      }
    }
  });
}

void unpack(sparing::Type type, const sparing::Packed& p) {
  type == sparing::Type::float32 ? unpack_of<float>(p) : unpack_of<bf16>(p);
}

}  // namespace
