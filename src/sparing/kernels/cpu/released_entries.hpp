// What DeepSeek-V4 remembers of a token in the bytes of its release, made of numbers and read back: FP8 entries with
// bfloat16 where they turn, and FP4 keys of the indexer that a Hadamard matrix has turned (kernels/released_entries.py).
#pragma once

#include <vector>

#include "elementwise.hpp"
#include "kernels.hpp"
#include "packed.hpp"
#include "simd.hpp"
#include "threads.hpp"
#include "unpack.hpp"

namespace {

constexpr int64_t kEntryBlock = 64, kKeyBlock = 32;  // numbers that share a scale
constexpr float kSmallestEntry = 1e-4f, kSmallestKey = 6 * 0x1p-126f;  // largest magnitude of a block at least

inline Ints least(Ints a, Ints b) {
  Ints first = a < b;
  return (first & a) | (~first & b);
}

// The largest magnitude of a block, at least `smallest`; NaN if one of the numbers is.
inline float magnitude(const float* x, int64_t n, float smallest) {
  Ints most{};
  for (int64_t i = 0; i < n; i += W) {
    Ints bits = (Ints)read(x + i, n - i) & 0x7fffffff;  // in the order of their numbers, NaN above all
    most = -least(-most, -bits);
  }
  int32_t best = 0;
  for (int l = 0; l < W; ++l) best = most[l] > best ? most[l] : best;
  float value = float_of(uint32_t(best));
  return value < smallest ? smallest : value;
}

// UE8M0 of the least power of two that is not below a positive number; 255 where there is none, and of NaN.
inline Byte power_above(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return Byte(smaller(255, (bits >> 23 & 255) + ((bits & 0x7fffff) != 0)));
}

// Codes float8_e4m3fn, each in the lowest bits of its word: to nearest, ties to even, beyond 448 to 448.
inline Words e4m3_of(Floats x) {
  Words sign = (Words)x >> 24 & 0x80;
  Ints bits = (Ints)x & 0x7fffffff, is_nan = bits > 0x7f800000;
  bits = least(bits, Ints{} + 0x43e00000);  // 448
  Ints normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
  // Below 2^-6 numbers lie 2^-9 apart: so do floats from 2^14 on, and adding that rounds to one of them.
  Ints small = (Ints)((Floats)bits + 16384.0f) - 0x46800000, is_small = bits < 0x3c800000;
  Ints code = (is_small & small) | (~is_small & normal);
  return sign | (Words)((is_nan & 0x7f) | (~is_nan & code));
}

// Codes E2M1, likewise, of numbers up to 6.
inline Words e2m1_of(Floats x) {
  const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  Floats size = (Floats)((Ints)x & 0x7fffffff);
  auto whole = [&](Floats v) { return (Ints)(v + shift) - 0x4b400000; };
  // In each of three ranges values lie evenly; the code is the least of the three counts, as spacing only grows.
  Ints code = least(least(whole(size * 2.0f), whole(size) + 2), whole(size * 0.5f) + 4);
  return (Words)((least(code, Ints{} + 7) & 7) | ((x < Floats{}) & 8));
}

template <class T>
void encode_entry(const T* x, Byte* to, int64_t size, int64_t rotary) {
  int64_t plain = size - rotary, scales = (plain + kEntryBlock - 1) / kEntryBlock;
  Byte* scale = to + plain + 2 * rotary;
  for (int64_t b = 0; b < plain; b += kEntryBlock) {
    float block[kEntryBlock];
    int64_t n = smaller(kEntryBlock, plain - b);
    for (int64_t i = 0; i < n; ++i) block[i] = widen(x[b + i]);
    Byte power = scale[b / kEntryBlock] = power_above(magnitude(block, n, kSmallestEntry) / 448.0f);
    float unit = MXFP4::exact_scale(&power);
    for (int64_t i = 0; i < n; i += W) {
      Words codes = e4m3_of(read(block + i, n - i) / unit);
      for (int l = 0; l < smaller(W, n - i); ++l) to[b + i + l] = Byte(codes[l]);
    }
  }
  for (int64_t i = 0; i < rotary; ++i) {
    bf16 number = narrow<bf16>(widen(x[plain + i]));
    memcpy(to + plain + 2 * i, &number, 2);
  }
  memset(scale + scales, 0, size_t(round_up(scales, 8) - scales));
}

template <class T>
void decode_entry(const Byte* from, T* x, int64_t size, int64_t rotary) {
  int64_t plain = size - rotary;
  const Byte* scale = from + plain + 2 * rotary;
  for (int64_t b = 0; b < plain; b += kEntryBlock, ++scale) {
    int64_t end = smaller(plain, b + kEntryBlock), i = b;
    float unit = MXFP4::exact_scale(scale);
    for (; i + W <= end; i += W) write(x + i, FP8::exact(from + i) * FP8::unit * unit);
    for (; i < end; ++i) x[i] = narrow<T>(kE4M3.of[from[i]] * unit);
  }
  for (int64_t i = 0; i < rotary; ++i) {
    bf16 number;
    memcpy(&number, from + plain + 2 * i, 2);
    x[plain + i] = narrow<T>(widen(number));
  }
}

// x times the normalised Walsh-Hadamard matrix of Sylvester; size is a power of two, a multiple of 32.
inline void turn(float* x, int64_t size) {
  for (int64_t apart = 1; apart < size; apart *= 2)
    for (int64_t b = 0; b < size; b += 2 * apart)
      if (apart >= W)
        for (int64_t i = b; i < b + apart; i += W) {
          Floats one = load<Floats>(x + i), other = load<Floats>(x + i + apart);
          store(x + i, one + other), store(x + i + apart, one - other);
        }
      else
        for (int64_t i = b; i < b + apart; ++i) {
          float one = x[i], other = x[i + apart];
          x[i] = one + other, x[i + apart] = one - other;
        }
  float scale = float(1 / __builtin_sqrt(double(size)));
  for (int64_t i = 0; i < size; i += W) store(x + i, load<Floats>(x + i) * scale);
}

inline void decode_key_block(const Byte* codes, Byte scale, float* to) {
  float unit = MXFP4::exact_scale(&scale);
  for (int64_t i = 0; i < kKeyBlock; i += W) store(to + i, values<MXFP4>(codes_in_order(codes + i / 2)) * unit);
}

// Turns a key or a query: to its bytes, or to the numbers they stand for; the other is null.
template <class T>
void encode_key(const T* x, float* room, Byte* packed, T* rounded, int64_t size) {
  for (int64_t i = 0; i < size; ++i) room[i] = widen(x[i]);
  turn(room, size);
  for (int64_t b = 0; b < size; b += kKeyBlock) {
    float* block = room + b;
    for (int64_t i = 0; i < kKeyBlock; ++i) block[i] = widen(narrow<T>(block[i]));
    Byte power = power_above(magnitude(block, kKeyBlock, kSmallestKey) / 6.0f), codes[kKeyBlock], pairs[kKeyBlock / 2];
    float unit = MXFP4::exact_scale(&power);
    for (int64_t i = 0; i < kKeyBlock; i += W) {
      Words some = e2m1_of(load<Floats>(block + i) / unit);
      for (int l = 0; l < W; ++l) codes[i + l] = Byte(some[l]);
    }
    for (int64_t i = 0; i < kKeyBlock / 2; ++i) pairs[i] = Byte(codes[2 * i] | codes[2 * i + 1] << 4);
    if (packed) {
      memcpy(packed + b / 2, pairs, sizeof pairs);
      packed[size / 2 + b / kKeyBlock] = power;
    } else {
      decode_key_block(pairs, power, block);
      for (int64_t i = 0; i < kKeyBlock; i += W) write(rounded + b + i, load<Floats>(block + i));
    }
  }
}

template <class T>
void decode_key(const Byte* packed, T* x, int64_t size) {
  for (int64_t b = 0; b < size; b += kKeyBlock) {
    float block[kKeyBlock];
    decode_key_block(packed + b / 2, packed[size / 2 + b / kKeyBlock], block);
    for (int64_t i = 0; i < kKeyBlock; i += W) write(x + b + i, load<Floats>(block + i));
  }
}

template <class T>
void entries_of(const sparing::ReleasedEntries& e, bool encodes) {
  int64_t scales = (e.size - e.rotary + kEntryBlock - 1) / kEntryBlock;
  int64_t bytes = e.size + e.rotary + round_up(scales, 8);
  over_rows(e.rows, e.size, e.threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      T* x = static_cast<T*>(e.x) + r * e.size;
      encodes ? encode_entry(x, e.packed + r * bytes, e.size, e.rotary)
              : decode_entry(e.packed + r * bytes, x, e.size, e.rotary);
    }
  });
}

template <class T>
void keys_of(const sparing::ReleasedKeys& k, bool encodes) {
  int64_t bytes = k.size / 2 + k.size / kKeyBlock;
  over_rows(k.rows, k.size, k.threads, [&](int64_t first, int64_t last) {
    std::vector<float> room(size_t(k.size));
    for (int64_t r = first; r < last; ++r) {
      T *x = static_cast<T*>(k.x) + r * k.size, *rounded = static_cast<T*>(k.rounded);
      Byte* packed = k.packed ? k.packed + r * bytes : nullptr;
      encodes ? encode_key(x, room.data(), packed, rounded ? rounded + r * k.size : nullptr, k.size)
              : decode_key(packed, x, k.size);
    }
  });
}

void encode_entries(sparing::Type type, const sparing::ReleasedEntries& e) {
  type == sparing::Type::float32 ? entries_of<float>(e, true) : entries_of<bf16>(e, true);
}

void decode_entries(sparing::Type type, const sparing::ReleasedEntries& e) {
  type == sparing::Type::float32 ? entries_of<float>(e, false) : entries_of<bf16>(e, false);
}

void encode_keys(sparing::Type type, const sparing::ReleasedKeys& k) {
  type == sparing::Type::float32 ? keys_of<float>(k, true) : keys_of<bf16>(k, true);
}

void decode_keys(sparing::Type type, const sparing::ReleasedKeys& k) {
  type == sparing::Type::float32 ? keys_of<float>(k, false) : keys_of<bf16>(k, false);
}

}  // namespace
