// Weights in the blocks of GGUF files, as weights/blocks.py describes them. A kind says what the codes of a block are, as
// signed bytes in order, and what the numbers of its groups are worth; everything else is said once for all of them.
#pragma once

#include "code_lines.hpp"
#include "packed.hpp"
#include "threads.hpp"

namespace {

typedef uint8_t Few __attribute__((vector_size(16)));
typedef uint8_t Many __attribute__((vector_size(32)));

inline float half_at(const Byte* p) {
  uint16_t some[W] = {};
  memcpy(some, p, 2);
#if defined(__AVX2__)
  return _cvtsh_ss(some[0]);
#else
  return from_halves(some)[0];
#endif
}

// Code i of 32 gets 16 where bit i is set.
inline Many fifth_bits(const Byte* p) {
#if defined(__AVX2__)
  int32_t bits;
  memcpy(&bits, p, 4);
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3,
                                          3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread), bit);
  return (Many)_mm256_and_si256(_mm256_cmpeq_epi8(own, bit), _mm256_set1_epi8(16));
#else
  Many v;
  for (int i = 0; i < 32; ++i) v[i] = Byte((p[i / 8] >> i % 8 & 1) << 4);
  return v;
#endif
}

// The two codes of each of 16 bytes: those in the low nibbles first.
inline Many nibbles(const Byte* p) {
#if defined(__AVX2__)
  __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Many)_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
#else
  Few v = load<Few>(p), low = v & 15, high = v >> 4;
  Many both;
  memcpy(&both, &low, 16);
  memcpy(reinterpret_cast<Byte*>(&both) + 16, &high, 16);
  return both;
#endif
}

// Kinds of 32 numbers. d, m: where in a block its float16 numbers lie; one with m has minima. codes: written to `to`, or
// as they lie in the block.
struct Q4_0 {
  static constexpr int block = 32, bytes = 18, group = 32, d = 0;
  static const Byte* codes(const Byte* p, Byte* to) { return store(to, nibbles(p + 2) - 8), to; }
  static void scales(const Byte* p, float* scale, float*) { scale[0] = half_at(p + d); }
};

struct Q4_1 {
  static constexpr int block = 32, bytes = 20, group = 32, d = 0, m = 2;
  static const Byte* codes(const Byte* p, Byte* to) { return store(to, nibbles(p + 4)), to; }
  static void scales(const Byte* p, float* scale, float* minimum) { scale[0] = half_at(p + d), minimum[0] = -half_at(p + m); }
};

struct Q5_0 {
  static constexpr int block = 32, bytes = 22, group = 32, d = 0;
  static const Byte* codes(const Byte* p, Byte* to) { return store(to, (nibbles(p + 6) | fifth_bits(p + 2)) - 16), to; }
  static void scales(const Byte* p, float* scale, float*) { scale[0] = half_at(p + d); }
};

struct Q5_1 {
  static constexpr int block = 32, bytes = 24, group = 32, d = 0, m = 2;
  static const Byte* codes(const Byte* p, Byte* to) { return store(to, nibbles(p + 8) | fifth_bits(p + 4)), to; }
  static void scales(const Byte* p, float* scale, float* minimum) { scale[0] = half_at(p + d), minimum[0] = -half_at(p + m); }
};

struct Q8_0 {
  static constexpr int block = 32, bytes = 34, group = 32, d = 0;
  static const Byte* codes(const Byte* p, Byte*) { return p + 2; }
  static void scales(const Byte* p, float* scale, float*) { scale[0] = half_at(p + d); }
};

struct IQ4_NL {
  static constexpr int block = 32, bytes = 18, group = 32, d = 0;
  static const Byte* codes(const Byte* p, Byte* to) {
    alignas(16) static constexpr int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                      1,    13,   25,  38,  53,  69,  89,  113};
#if defined(__AVX2__)
    __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
    store(to, _mm256_shuffle_epi8(table, (__m256i)nibbles(p + 2)));
#else
    Many v = nibbles(p + 2);
    for (int i = 0; i < 32; ++i) to[i] = Byte(values[v[i]]);
#endif
    return to;
  }
  static void scales(const Byte* p, float* scale, float*) { scale[0] = half_at(p + d); }
};

// to[i] = from[i] * factor of 16 signed bytes.
inline void scaled(const void* from, float factor, float* to) {
  for (int i = 0; i < 16; i += W) store(to + i, Int8::read(static_cast<const Byte*>(from) + i) * factor);
}

// Kinds of 256 numbers.
struct Q2_K {
  static constexpr int block = 256, bytes = 84, group = 16, d = 80, m = 82;
  static const Byte* codes(const Byte* p, Byte* to) {
    for (int i = 0; i < 2; ++i) {
      Many v = load<Many>(p + 16 + 32 * i);
      for (int k = 0; k < 4; ++k) store(to + 128 * i + 32 * k, v >> 2 * k & 3);
    }
    return to;
  }
  static void scales(const Byte* p, float* scale, float* minimum) {
    Few both = load<Few>(p), low = both & 15, high = both >> 4;
    scaled(&low, half_at(p + d), scale);
    scaled(&high, half_at(p + m), minimum);
  }
};

struct Q3_K {
  static constexpr int block = 256, bytes = 110, group = 16, d = 108;
  static const Byte* codes(const Byte* p, Byte* to) {
    Many third = load<Many>(p);
    for (int i = 0; i < 2; ++i) {
      Many v = load<Many>(p + 32 + 32 * i);
      for (int k = 0; k < 4; ++k)
        store(to + 128 * i + 32 * k, (v >> 2 * k & 3) + ((third >> (4 * i + k) & 1) << 2) - 4);
    }
    return to;
  }
  static void scales(const Byte* p, float* scale, float*) {
    Byte each[16];
    for (int i = 0; i < 16; ++i)
      each[i] = Byte(((p[96 + i % 8] >> i / 8 * 4 & 15) | (p[104 + i % 4] >> i / 4 * 2 & 3) << 4) - 32);
    scaled(each, half_at(p + d), scale);
  }
};

// The same of eight bytes in one number: written in pieces and read as a whole they would have to wait for the cache.
inline void scaled(uint64_t from, float factor, float* to) {
#if defined(__AVX2__)
  __m256i each = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(int64_t(from)));
  _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(each), _mm256_set1_ps(factor)));
#else
  for (int i = 0; i < 8; ++i) to[i] = float(from >> 8 * i & 0xff) * factor;
#endif
}

// The scales and minima of Q4_K and Q5_K: d, m, and eight of each in 12 bytes.
inline void six_bits(const Byte* p, float* scale, float* minimum) {
  uint32_t first, second, third;
  memcpy(&first, p + 4, 4);
  memcpy(&second, p + 8, 4);
  memcpy(&third, p + 12, 4);
  const uint64_t last_scales = (third & 0x0f0f0f0f) | (first >> 6 & 0x03030303) << 4;
  const uint64_t last_minima = (third >> 4 & 0x0f0f0f0f) | (second >> 6 & 0x03030303) << 4;
  scaled((first & 0x3f3f3f3f) | last_scales << 32, half_at(p), scale);
  scaled((second & 0x3f3f3f3f) | last_minima << 32, half_at(p + 2), minimum);
}

struct Q4_K {
  static constexpr int block = 256, bytes = 144, group = 32, d = 0, m = 2;
  static const Byte* codes(const Byte* p, Byte* to) {
    for (int i = 0; i < 4; ++i) {
      Many v = load<Many>(p + 16 + 32 * i);
      store(to + 64 * i, v & 15);
      store(to + 64 * i + 32, v >> 4);
    }
    return to;
  }
  static void scales(const Byte* p, float* scale, float* minimum) { six_bits(p, scale, minimum); }
};

struct Q5_K {
  static constexpr int block = 256, bytes = 176, group = 32, d = 0, m = 2;
  static const Byte* codes(const Byte* p, Byte* to) {
    Many fifth = load<Many>(p + 16);
    for (int i = 0; i < 4; ++i) {
      Many v = load<Many>(p + 48 + 32 * i);
      store(to + 64 * i, (v & 15) | (fifth >> 2 * i & 1) << 4);
      store(to + 64 * i + 32, v >> 4 | (fifth >> (2 * i + 1) & 1) << 4);
    }
    return to;
  }
  static void scales(const Byte* p, float* scale, float* minimum) { six_bits(p, scale, minimum); }
};

struct Q6_K {
  static constexpr int block = 256, bytes = 210, group = 16, d = 208;
  static const Byte* codes(const Byte* p, Byte* to) {
    for (int i = 0; i < 2; ++i, to += 128) {
      Many a = load<Many>(p + 64 * i), b = load<Many>(p + 64 * i + 32), more = load<Many>(p + 128 + 32 * i);
      store(to, ((a & 15) | (more << 4 & 48)) - 32);
      store(to + 32, ((b & 15) | (more << 2 & 48)) - 32);
      store(to + 64, (a >> 4 | (more & 48)) - 32);
      store(to + 96, (b >> 4 | (more >> 2 & 48)) - 32);
    }
    return to - 256;
  }
  static void scales(const Byte* p, float* scale, float*) { scaled(p + 192, half_at(p + d), scale); }
};

template <class K, class = void>
constexpr bool has_minima = false;
template <class K>
constexpr bool has_minima<K, decltype(void(K::m))> = true;

// A block in the hand: its codes, and what they are worth. weights(i): W of them from the i-th on, as `dequantize()`
// makes them.
template <class K>
struct Decoded {
  alignas(64) Byte room[K::block];
  float scale[K::block / K::group < 16 ? 16 : K::block / K::group], minimum[has_minima<K> ? 16 : 1];
  const Byte* codes;
  explicit Decoded(const Byte* p) : codes(K::codes(p, room)) { K::scales(p, scale, minimum); }
  Floats weights(int i) const {
    Floats w = Int8::read(codes + i) * scale[i / K::group];
    return has_minima<K> ? w - minimum[i / K::group] : w;
  }
};

// What a block adds to the sums of R rows of x, each in two chains, whatever R is. Minima belong to each weight: apart
// from them, a large x at a weight near 0 would leave the difference of two large sums.
template <class K, int R>
void add_block(const Byte* p, const float* x, int64_t stride, Floats (*sums)[R]) {
  Decoded<K> block(p);
#pragma GCC unroll 16
  for (int g = 0; g < K::block / K::group; ++g) {
    Floats part[R] = {};
#pragma GCC unroll 8
    for (int j = g * K::group; j < (g + 1) * K::group; j += W) {
      Floats w = has_minima<K> ? block.weights(j) : Int8::read(block.codes + j);
      for (int r = 0; r < R; ++r) part[r] += w * load<Floats>(x + r * stride + j);
    }
    for (int r = 0; r < R; ++r) sums[g % 2][r] += has_minima<K> ? part[r] : part[r] * block.scale[g];
  }
}

// y[r * width] of R rows of x with a row of the weight.
template <class K, int R>
void block_row(const Byte* p, int64_t in, const float* x, int64_t stride, bool past_caches, float* y, int64_t width) {
  Floats sums[2][R] = {};
  for (int64_t i = 0; i < in; i += K::block, p += K::bytes) {
    for (int line = 0; line < K::bytes; line += 64) prefetch_once(p + kAhead + line, past_caches);
    add_block<K, R>(p, x + i, stride, sums);
  }
  for (int r = 0; r < R; ++r) y[r * width] = sum(sums[0][r] + sums[1][r]);
}

inline bool is_finite(const Byte* p, uint16_t exponent) {
  uint16_t bits;
  memcpy(&bits, p, 2);
  return (bits & exponent) != exponent;
}

// Numbers of 16 bits: a block is one of them, and a row has any number.
struct F16 {
  static constexpr uint16_t exponent = 0x7c00;
  static Floats read(const Byte* p) { return from_halves(reinterpret_cast<const uint16_t*>(p)); }
};
struct BF16 {
  static constexpr uint16_t exponent = 0x7f80;
  static Floats read(const Byte* p) { return ::read(reinterpret_cast<const bf16*>(p)); }
};
template <class K>
Floats sixteen_bits(const Byte* p, int64_t n) {
  if (n >= W) return K::read(p);
  Byte some[2 * W] = {};
  memcpy(some, p, size_t(2 * n));
  return K::read(some);
}
template <class K, int R>
void plain_row(const Byte* p, int64_t in, const float* x, int64_t stride, bool past_caches, float* y, int64_t width) {
  Floats sums[2][R] = {};
  for (int64_t i = 0; i < in; i += W) {
    prefetch_once(p + 2 * i + kAhead, past_caches);
    Floats w = sixteen_bits<K>(p + 2 * i, in - i);  // x is 0 past its end
    for (int r = 0; r < R; ++r) sums[i / W % 2][r] += w * load<Floats>(x + r * stride + i);
  }
  for (int r = 0; r < R; ++r) y[r * width] = sum(sums[0][r] + sums[1][r]);
}

// How the rows of a kind are multiplied and written out, and how many bytes they and their blocks have.
template <class K>
struct InBlocks {
  static constexpr int bytes = K::bytes;
  static bool is_finite(const Byte* p) {
    bool all = ::is_finite(p + K::d, F16::exponent);
    if constexpr (has_minima<K>) all &= ::is_finite(p + K::m, F16::exponent);
    return all;
  }
  static int64_t row_bytes(int64_t in) { return in / K::block * K::bytes; }
  template <int R>
  static void row(const Byte* p, int64_t in, const float* x, int64_t stride, bool past_caches, float* y, int64_t width) {
    block_row<K, R>(p, in, x, stride, past_caches, y, width);
  }
  template <class T>
  static void unpack(const Byte* p, int64_t in, T* y) {
    for (int64_t i = 0; i < in; i += K::block, p += K::bytes) {
      Decoded<K> block(p);
      for (int j = 0; j < K::block; j += W) write(y + i + j, block.weights(j));
    }
  }
};
template <class K>
struct InHalves {
  static constexpr int bytes = 2;
  static bool is_finite(const Byte* p) { return ::is_finite(p, K::exponent); }
  static int64_t row_bytes(int64_t in) { return 2 * in; }
  template <int R>
  static void row(const Byte* p, int64_t in, const float* x, int64_t stride, bool past_caches, float* y, int64_t width) {
    plain_row<K, R>(p, in, x, stride, past_caches, y, width);
  }
  template <class T>
  static void unpack(const Byte* p, int64_t in, T* y) {
    for (int64_t i = 0; i < in; i += W) write(y + i, sixteen_bits<K>(p + 2 * i, in - i), in - i);
  }
};

template <class Call>
void by_kind(sparing::Packing packing, Call call) {
  switch (packing) {
    case sparing::Packing::q4_0: return call(InBlocks<Q4_0>{});
    case sparing::Packing::q4_1: return call(InBlocks<Q4_1>{});
    case sparing::Packing::q5_0: return call(InBlocks<Q5_0>{});
    case sparing::Packing::q5_1: return call(InBlocks<Q5_1>{});
    case sparing::Packing::q8_0: return call(InBlocks<Q8_0>{});
    case sparing::Packing::q2_k: return call(InBlocks<Q2_K>{});
    case sparing::Packing::q3_k: return call(InBlocks<Q3_K>{});
    case sparing::Packing::q4_k: return call(InBlocks<Q4_K>{});
    case sparing::Packing::q5_k: return call(InBlocks<Q5_K>{});
    case sparing::Packing::q6_k: return call(InBlocks<Q6_K>{});
    case sparing::Packing::iq4_nl: return call(InBlocks<IQ4_NL>{});
    case sparing::Packing::f16: return call(InHalves<F16>{});
    case sparing::Packing::bf16: return call(InHalves<BF16>{});
    default: return;  // the formats of packed.hpp
  }
}

// As FourBits of packed.hpp, for all kinds: x is in its own order, so that experts may mix them.
struct Blocks {
  typedef float Number;
  static int64_t code_bytes(int64_t in) { return in * 5 / 8; }  // about
  template <class T>
  static void lay(const T* x, int64_t in, float* to) {
    for (int64_t i = 0; i < in; ++i) to[i] = widen(x[i]);
  }
  template <int R>
  static void rows(const sparing::Packed& p, const float* x, int64_t stride, int64_t first, int64_t last, float* y,
                   int64_t width) {
    by_kind(p.packing, [&](auto kind) {
      typedef decltype(kind) Kind;
      const int64_t bytes = Kind::row_bytes(p.inputs);
      auto row = static_cast<const Byte*>(p.codes) + first * bytes;
      for (int64_t o = first; o < last; ++o, row += bytes, ++y)
        Kind::template row<R>(row, p.inputs, x, stride, p.past_caches, y, width);
    });
  }
};

bool finite_blocks(const sparing::BlockScales& s) {
  constexpr int64_t step = 1 << 16;
  bool are_finite = true;
  by_kind(s.packing, [&](auto kind) {
    sparing::share((s.count + step - 1) / step, s.threads, [&](int64_t piece) {
      bool all = true;
      for (int64_t i = piece * step; i < smaller(s.count, (piece + 1) * step); ++i)
        all &= kind.is_finite(static_cast<const Byte*>(s.codes) + i * kind.bytes);
      if (!all) __atomic_store_n(&are_finite, false, __ATOMIC_RELAXED);
    });
  });
  return are_finite;
}

}  // namespace
