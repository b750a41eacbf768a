// Codes of any width written out as numbers, a block of 64 tokens at a time. For widths and layouts that no product
// of code_lines.hpp reads as they are; what is written stays in the cache until it is used.
#pragma once

#include "code_lines.hpp"
#include "kernels.hpp"
#include "softmax.hpp"

namespace {

// The centroids of codes of `bits` bits. Odd widths store magnitude and sign; of 8 bits both are made from the code, as
// the negative half of a codebook mirrors the positive one.
template <int bits>
struct Levels {
  static constexpr bool has_signs = bits % 2, is_whole = bits == 8;
  static constexpr int plain = bits - has_signs;  // bits of the planes before the signs
  static constexpr int entries = is_whole ? 128 : 1 << plain;
  float table[greater(entries, 16)];

  explicit Levels(const float* centroids) {
    for (int i = 0; i < greater(entries, 16); ++i) table[i] = centroids[(has_signs || is_whole ? entries : 0) + i % entries];
  }
  Floats at(Words index) const {
    return plain == 0 ? splat(table[0]) : lookup<entries>(table, index);
  }
};

// to[i * step + lane] = centroid of code[lane, i] * its scale, for `lanes` lanes (whole sixteens) and i < depth. Lanes are
// the tokens of keys and the dimensions of values, so that rows of W numbers are written; scale [64] of the tokens.
template <int bits, bool are_keys, class T>
void write_block(const uint8_t* codes, int64_t lanes, int64_t depth, const float* centroids, const float* scale, T* to,
                 int64_t step) {
  using L = Levels<bits>;
  const L levels(centroids);
  const int64_t run = depth * kLanes * bits / 8;
  for (int64_t lane = 0; lane < lanes; lane += kLanes, codes += run)
    for (int first = 0; first < kLanes; first += W) {
      const LaneSigns lane_signs(first);
      const uint8_t* signs = codes + depth * kLanes * L::plain / 8;
      Floats lane_scale = are_keys ? load<Floats>(scale + lane + first) : Floats{};
      T* out = to + lane + first;
      for (int64_t i = 0; i < depth; i += 4, out += 4 * step) {
        Words four = L::has_signs ? lane_signs.four(signs + i * 2) : Words{};
        Words planes[4] = {};  // words that hold these four depths, shifted so that depth j begins at bit 8 j
        const uint8_t* plane = codes;
        for (int width = 8, p = 0; width > 1; width /= 2, ++p)
          if (L::plain & width) {
            planes[p] = load<Words>(plane + i * width / 32 * 64 + first * 4) >> uint32_t(i / 4 * width % 8);
            plane += depth * kLanes * width / 8;
          }
        Words negative = ~planes[0] & 0x80808080u;  // of 8 bits: the sign of each of the four codes
        if (L::is_whole) planes[0] ^= negative - (negative >> 7);  // and their magnitudes: the lower bits, turned if negative
        for (int j = 0; j < 4; ++j) {
          Words index{};
          for (int width = 8, p = 0, shift = 0; width > 1; width /= 2, ++p)
            if (L::plain & width) {
              index |= ((planes[p] >> uint32_t(8 * j)) & ((1u << width) - 1)) << uint32_t(shift);
              shift += width;
            }
          Floats x = levels.at(index);
          if (L::has_signs) x = LaneSigns::give(x, four, j);
          if (L::is_whole) x = (Floats)((Words)x ^ ((negative << uint32_t(24 - 8 * j)) & 0x80000000u));
          write(out + j * step, x * (are_keys ? lane_scale : splat(scale[i + j])));
        }
      }
    }
}

// Block `block` of a kv head: rows of 64 tokens for each dimension (keys), or rows of dimensions for each token (values).
template <bool are_keys, class T>
void write_block(const sparing::CodePart& s, bool has_half_scales, int64_t head, int64_t block, T* to, int64_t step) {
  const int64_t dims = round_up(s.dims, kLanes), lanes = are_keys ? kTile : dims, depth = are_keys ? dims : kTile;
  alignas(64) float scale[kTile];
  read_scales(s.scale, has_half_scales, head * s.scale_head + block * kTile, kTile, scale);
  const uint8_t* codes = s.codes + head * s.codes_head + block * (dims * kTile * s.bits / 8);
  switch (s.bits) {
    case 1: return write_block<1, are_keys>(codes, lanes, depth, s.centroids, scale, to, step);
    case 2: return write_block<2, are_keys>(codes, lanes, depth, s.centroids, scale, to, step);
    case 3: return write_block<3, are_keys>(codes, lanes, depth, s.centroids, scale, to, step);
    case 4: return write_block<4, are_keys>(codes, lanes, depth, s.centroids, scale, to, step);
    case 5: return write_block<5, are_keys>(codes, lanes, depth, s.centroids, scale, to, step);
    case 6: return write_block<6, are_keys>(codes, lanes, depth, s.centroids, scale, to, step);
    case 7: return write_block<7, are_keys>(codes, lanes, depth, s.centroids, scale, to, step);
    case 8: return write_block<8, are_keys>(codes, lanes, depth, s.centroids, scale, to, step);
  }
}

}  // namespace
