// The inner loops of neighborhood attention: copies that put tokens into lanes, and products over a tile.
//
// A tile is a vector's worth of neighbouring tokens ("lanes") on each of a few rows. The tokens that it meets (keys, or
// queries where gradients are gathered) lie packed, one line of tokens for each channel, so that those at one offset
// from the tile's lanes are one unaligned load, which serves all rows of the tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../elements.h"
#include "../exponentials.h"
#include "../memory.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define TILE_PAIRS
#endif

namespace tile {

using memory::round_up;
using simd::broadcast;
using simd::ivec;
using simd::lanes;
using simd::load;
using simd::load_part;
using simd::store;
using simd::store_part;
using simd::uvec;
using simd::vec;
using std::int64_t;

// Rows a tile, offsets a block of scores and channels a block of sums: rows x offsets, and rows x channels, are the
// accumulators, of 32 registers or 16.
constexpr int rows = simd::registers == 32 ? 3 : 2;
constexpr int offsets = simd::registers == 32 ? 7 : 5;
constexpr int channels = simd::registers / 4;

// Hold a loaded vector in a register: GCC would rather load it again as an operand of each of its uses, and unaligned
// loads are what these loops are short of.
inline void hold(vec& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TILE_SHUFFLES
#endif
#endif

#ifdef TILE_SHUFFLES
template <int size, int... j>
inline void swap_blocks(vec& a, vec& b, std::integer_sequence<int, j...>) {
  const vec first = __builtin_shufflevector(a, b, ((j & size) ? lanes + j - size : j)...);
  b = __builtin_shufflevector(a, b, ((j & size) ? lanes + j : j + size)...);
  a = first;
}

// Transpose a square of lanes x lanes by exchanging the off-diagonal halves of ever larger blocks.
template <int size = 1>
inline void transpose(vec (&x)[lanes]) {
  if constexpr (size < lanes) {
    for (int i = 0; i < lanes; ++i) {
      if (!(i & size)) swap_blocks<size>(x[i], x[i + size], std::make_integer_sequence<int, lanes>{});
    }
    transpose<2 * size>(x);
  }
}
#else
inline void transpose(vec (&x)[lanes]) {
  for (int i = 0; i < lanes; ++i) {
    for (int j = i + 1; j < lanes; ++j) {
      const float kept = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = kept;
    }
  }
}
#endif

// Tokens of a tensor in memory, of any kind, `step` bytes apart.
struct Tokens {
  char* data;
  int64_t kind, step;

  template <class Element>
  Element* at(int64_t token) const {
    return reinterpret_cast<Element*>(data + token * step);
  }
};

inline Tokens floats(const float* data, int64_t step) {
  return {reinterpret_cast<char*>(const_cast<float*>(data)), simd::float32, step * 4};
}

// Two neighbouring bfloat16 channels of a token, or one channel of two tokens, the first in the lower half.
struct Pair {
  std::uint32_t bits;
};

inline vec load(const Pair* p) { return load(reinterpret_cast<const float*>(p)); }

// Copy `count` tokens of `dim` elements to one line of tokens an element, `line` floats apart. Writes `padded` elements
// and a whole number of vectors of tokens, with zeros where there is nothing.
template <class Element>
void pack_elements(const Tokens& from, int64_t count, int64_t dim, int64_t padded, float* to, int64_t line) {
  vec x[lanes];
  for (int64_t token = 0; token < count; token += lanes) {
    for (int64_t channel = 0; channel < padded; channel += lanes) {
      if (token + lanes <= count && channel + lanes <= dim) {
        for (int i = 0; i < lanes; ++i) {
          __builtin_prefetch(from.at<Element>(token + lanes + i) + channel);  // a stride that the machine does not foresee
          x[i] = load(from.at<Element>(token + i) + channel);
        }
      } else {
        for (int i = 0; i < lanes; ++i) {
          x[i] = token + i < count ? load_part(from.at<Element>(token + i) + channel, dim - channel) : vec{};
        }
      }
      transpose(x);
      const int last = static_cast<int>(std::min<int64_t>(lanes, padded - channel));
      for (int i = 0; i < last; ++i) store(to + (channel + i) * line + token, x[i]);
    }
  }
}

inline void pack(const Tokens& from, int64_t count, int64_t dim, int64_t padded, float* to, int64_t line) {
  simd::with_kind(from.kind, [&](auto* kind) {
    pack_elements<std::remove_pointer_t<decltype(kind)>>(from, count, dim, padded, to, line);
  });
}

// Undo `pack` for one vector of tokens.
inline void unpack(const float* from, int64_t count, int64_t dim, const Tokens& to) {
  simd::with_kind(to.kind, [&](auto* kind) {
    using Element = std::remove_pointer_t<decltype(kind)>;
    vec x[lanes];
    for (int64_t channel = 0; channel < dim; channel += lanes) {
      const float* first = from + channel * lanes;
      if (count == lanes && channel + lanes <= dim) {
        for (int i = 0; i < lanes; ++i) x[i] = load(first + i * lanes);
        transpose(x);
        for (int i = 0; i < lanes; ++i) store(to.at<Element>(i) + channel, x[i]);
      } else {
        for (int i = 0; i < lanes; ++i) x[i] = channel + i < dim ? load(first + i * lanes) : vec{};
        transpose(x);
        for (int i = 0; i < count; ++i) store_part(to.at<Element>(i) + channel, x[i], dim - channel);
      }
    }
  });
}

// How packed elements are multiplied: floats, or pairs of bfloat16, whose two products are added up in float32.
struct Floats {
  static constexpr int together = 1;
  static vec add(vec sum, vec a, vec b) { return sum + a * b; }
};

#ifdef TILE_PAIRS
struct Pairs {
  static constexpr int together = 2;
  static vec add(vec sum, vec a, vec b) { return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
#endif

inline vec pair(vec first, vec second) {
  const uvec x = simd::rounded_to_bfloat16(first), y = simd::rounded_to_bfloat16(second);
  return simd::bits<vec>(x | y << 16);
}

// Let each element of a line of bfloat16 values be a pair: itself, and that `step` further on.
inline void pair_up(float* line, int64_t count, int64_t step) {
  for (int64_t i = 0; i < count; i += lanes) {
    const vec second = load_part(line + i + step, count - i - step);
    store(line + i, simd::bits<vec>(simd::bits<uvec>(load(line + i)) >> 16 | simd::bits<uvec>(second)));
  }
}

// The tokens that a tile meets: packed lines, neighbouring offsets `step` floats apart and channels `line` floats.
struct Lines {
  const float* data;
  int64_t line, step;
  vec at(int64_t channel, int64_t offset) const { return load(data + channel * line + offset * step); }
  Lines from(int64_t offset) const { return {data + offset * step, line, step}; }
};

// Tokens that every lane meets: as they lie in memory, `step` floats apart.
struct Shared {
  const float* data;
  int64_t step;
  vec at(int64_t channel, int64_t offset) const { return broadcast(data[offset * step + channel]); }
  Shared from(int64_t offset) const { return {data + offset * step, step}; }
};

// What is added to a row's products: a number for each offset.
struct Bias {
  const float* data;
  int64_t step;
};

// result[row][offset] = bias[row][offset] + scale sum_channel tile[row][channel] met[channel][offset]
template <class Product, int row_count, int count, class Met>
void score_block(const float* x, int64_t x_row, Met met, int64_t dim, float scale, const Bias* bias, float* result,
                 int64_t result_row) {
  vec sum[row_count][count];
  for (int r = 0; r < row_count; ++r) {
    for (int o = 0; o < count; ++o) sum[r][o] = vec{};
  }
  for (int64_t channel = 0; channel < dim; ++channel) {
    vec own[row_count];
    for (int r = 0; r < row_count; ++r) own[r] = load(x + r * x_row + channel * lanes);
    for (int o = 0; o < count; ++o) {
      vec other = met.at(channel, o);
      hold(other);
      for (int r = 0; r < row_count; ++r) sum[r][o] = Product::add(sum[r][o], own[r], other);
    }
  }
  for (int r = 0; r < row_count; ++r) {
    for (int o = 0; o < count; ++o) {
      const vec added = bias ? broadcast(bias[r].data[o * bias[r].step]) : vec{};
      store(result + r * result_row + o * lanes, sum[r][o] * scale + added);
    }
  }
}

template <class Product, int row_count, int count, class Met>
void score_some(int wanted, const float* x, int64_t x_row, Met met, int64_t dim, float scale, const Bias* bias,
                float* result, int64_t result_row) {
  if constexpr (count > 0) {
    if (wanted == count) {
      return score_block<Product, row_count, count>(x, x_row, met, dim, scale, bias, result, result_row);
    }
    score_some<Product, row_count, count - 1>(wanted, x, x_row, met, dim, scale, bias, result, result_row);
  }
}

// The products of `row_count` rows of a tile with `count` offsets, in blocks of about equal size.
template <class Product = Floats, class Met>
void scores(int row_count, int64_t count, const float* x, int64_t x_row, Met met, int64_t dim, float scale,
            const Bias* bias, float* result, int64_t result_row) {
  const int64_t blocks = (count + offsets - 1) / offsets;
  Bias moved[rows];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = count * block / blocks;
    const int wanted = static_cast<int>(count * (block + 1) / blocks - first);
    for (int r = 0; bias && r < row_count; ++r) moved[r] = {bias[r].data + first * bias[r].step, bias[r].step};
    const Bias* added = bias ? moved : nullptr;
    float* to = result + first * lanes;
    const auto some = [&](auto number) {
      score_some<Product, decltype(number)::value, offsets>(wanted, x, x_row, met.from(first), dim, scale, added, to,
                                                            result_row);
    };
    if (row_count == 1) some(std::integral_constant<int, 1>{});
    if (row_count == 2) some(std::integral_constant<int, 2>{});
    if constexpr (rows > 2) {
      if (row_count == 3) some(std::integral_constant<int, 3>{});
    }
  }
}

// sum[row][channel] += sum_offset weights[row][offset] met[channel][offset], for `channel_count` channels
template <class Product, int row_count, int channel_count, class Met>
void add_block(int64_t count, const float* weights, int64_t weights_row, Met met, int64_t channel, float* sum,
               int64_t sum_row) {
  vec total[row_count][channel_count];
  for (int r = 0; r < row_count; ++r) {
    for (int c = 0; c < channel_count; ++c) total[r][c] = load(sum + r * sum_row + (channel + c) * lanes);
  }
  const auto step = [&](int64_t o, auto chosen) {
    vec weight[row_count];
    for (int r = 0; r < row_count; ++r) weight[r] = load(weights + r * weights_row + o * lanes);
    for (int c = 0; c < channel_count; ++c) {
      vec other = chosen(met.at(channel + c, o * Product::together));
      hold(other);
      for (int r = 0; r < row_count; ++r) total[r][c] = Product::add(total[r][c], weight[r], other);
    }
  };
  const int64_t whole = count / Product::together;
  for (int64_t o = 0; o < whole; ++o) step(o, [](vec x) { return x; });
  // What lies beyond the last offset has no weight, but may be infinite.
  if (whole * Product::together < count) {
    step(whole, [](vec x) { return simd::bits<vec>(simd::bits<uvec>(x) & 0xffff); });
  }
  for (int r = 0; r < row_count; ++r) {
    for (int c = 0; c < channel_count; ++c) store(sum + r * sum_row + (channel + c) * lanes, total[r][c]);
  }
}

template <class Product, int row_count, class Met>
void add_rows(int64_t count, const float* weights, int64_t weights_row, Met met, int64_t dim, float* sum,
              int64_t sum_row) {
  int64_t channel = 0;
  for (; channel + channels <= dim; channel += channels) {
    add_block<Product, row_count, channels>(count, weights, weights_row, met, channel, sum, sum_row);
  }
  for (; channel < dim; ++channel) {
    add_block<Product, row_count, 1>(count, weights, weights_row, met, channel, sum, sum_row);
  }
}

// The weighted sums of the tokens met, added to the sums of `row_count` rows of a tile. Pairs are of neighbouring
// offsets: `weights` has a vector for each pair, `count` are the offsets.
template <class Product = Floats, class Met>
void add_weighted(int row_count, int64_t count, const float* weights, int64_t weights_row, Met met, int64_t dim,
                  float* sum, int64_t sum_row) {
  if (row_count == 1) add_rows<Product, 1>(count, weights, weights_row, met, dim, sum, sum_row);
  if (row_count == 2) add_rows<Product, 2>(count, weights, weights_row, met, dim, sum, sum_row);
  if constexpr (rows > 2) {
    if (row_count == 3) add_rows<Product, 3>(count, weights, weights_row, met, dim, sum, sum_row);
  }
}

}  // namespace tile
