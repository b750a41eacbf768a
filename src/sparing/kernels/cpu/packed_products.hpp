// Products of few rows with weights of any packing: x is laid out once, and threads share the rows of the weight.
#pragma once

#include <vector>

#include "blocks.hpp"
#include "packed.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t kPackedPieceBytes = 32 << 10;  // of codes, the share a thread takes at a time

// y[r * width + o - first] of any number of laid out rows of x with rows first..last-1 of the weight.
template <class M>
void multiply(const sparing::Packed& p, const typename M::Number* x, int64_t stride, int64_t rows, int64_t first,
              int64_t last, float* y, int64_t width) {
  for (; rows > 0; rows -= 4, x += 4 * stride, y += 4 * width) switch (smaller(4, rows)) {
      case 1: M::template rows<1>(p, x, stride, first, last, y, width); break;
      case 2: M::template rows<2>(p, x, stride, first, last, y, width); break;
      case 3: M::template rows<3>(p, x, stride, first, last, y, width); break;
      default: M::template rows<4>(p, x, stride, first, last, y, width);
    }
}

// Rows of x in a buffer, as M wants them, zeros after each.
template <class M>
struct Laid {
  typedef typename M::Number Number;
  int64_t stride;
  Number* numbers;
  Laid(std::vector<char>& buffer, int64_t rows, int64_t in) : stride(round_up(in, kChunk)) {
    buffer.assign(size_t(rows * stride) * sizeof(Number) + 64, 0);
    numbers = reinterpret_cast<Number*>(round_up(reinterpret_cast<intptr_t>(buffer.data()), 64));
  }
  Number* row(int64_t r) const { return numbers + r * stride; }
};

// How many rows of the weight a thread takes at a time.
template <class M>
int64_t packed_stretch(int64_t in) {
  return greater(1, kPackedPieceBytes / greater(1, M::code_bytes(in)));
}

// One matrix of a stack.
inline sparing::Packed matrix_of(const sparing::Packed& stack, int64_t index) {
  sparing::Packed p = stack;
  p.codes = static_cast<const Byte*>(p.codes) + index * p.codes_bytes;
  p.scale = static_cast<const Byte*>(p.scale) + index * p.scale_bytes;
  if (p.scale_2) p.scale_2 = static_cast<const float*>(p.scale_2) + index;
  return p;
}

// Lays out x once, then shares the rows of the weights among threads.
template <class M, class T>
void packed_rows(const sparing::Packed& p) {
  static thread_local std::vector<char> buffer;
  Laid<M> x(buffer, p.groups * p.rows, p.inputs);
  for (int64_t r = 0; r < p.groups * p.rows; ++r)
    M::lay(static_cast<const T*>(p.x) + r * p.inputs, p.inputs, x.row(r));
  int64_t step = packed_stretch<M>(p.inputs), pieces = (p.outputs + step - 1) / step;
  sparing::share(p.groups * pieces, p.groups * pieces > 2 ? p.threads : 1, [&](int64_t i) {
    static thread_local std::vector<float> sums;
    int64_t first = i % pieces * step, last = smaller(first + step, p.outputs), width = last - first;
    int64_t row = i / pieces * p.rows;
    sums.resize(size_t(p.rows * width));
    multiply<M>(matrix_of(p, i / pieces), x.row(row), x.stride, p.rows, first, last, sums.data(), width);
    auto bias = static_cast<const T*>(p.bias);
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t o = 0; o < width; o += W) {
        int64_t n = smaller(W, width - o);
        Floats total = read(&sums[size_t(r * width + o)], n);
        if (bias) total += read(bias + first + o, n);
        write(static_cast<T*>(p.y) + (row + r) * p.outputs + first + o, total, n);
      }
  });
}

// call(M, T): how the packing is multiplied, and the type of x.
template <class Call>
void by_packing(sparing::Type type, sparing::Packing packing, Call call) {
  auto with = [&](auto x, auto number) {
    typedef decltype(x) X;
    switch (packing) {
      case sparing::Packing::int8: return call(EightBits<Int8>{}, number);
      case sparing::Packing::fp8: return call(EightBits<FP8>{}, number);
      case sparing::Packing::int4: return call(FourBits<Int4, X>{}, number);
      case sparing::Packing::nvfp4: return call(FourBits<NVFP4, X>{}, number);
      case sparing::Packing::mxfp4: return call(FourBits<MXFP4, X>{}, number);
      default: return call(Blocks{}, number);
    }
  };
  if (type == sparing::Type::float32) return with(FloatX{}, float{});
#if defined(__AVX512BF16__)
  with(HalfX{}, bf16{});
#else
  with(FloatX{}, bf16{});
#endif
}

void packed(sparing::Type type, const sparing::Packed& p) {
  by_packing(type, p.packing, [&](auto m, auto number) { packed_rows<decltype(m), decltype(number)>(p); });
}

}  // namespace
