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

#include "../memory.h"
#include "../simd.h"

namespace tile {

using memory::round_up;
using simd::broadcast;
using simd::ivec;
using simd::lanes;
using simd::load;
using simd::store;
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

inline vec load_part(const float* p, int64_t count) {
  if (count >= lanes) return load(p);
  float part[lanes] = {};
  std::memcpy(part, p, std::max<int64_t>(count, 0) * sizeof(float));
  return load(part);
}

inline void store_part(float* p, vec x, int64_t count) {
  if (count >= lanes) return store(p, x);
  float part[lanes];
  store(part, x);
  std::memcpy(p, part, count * sizeof(float));
}

// Copy `count` tokens of `dim` channels, `step` floats apart, times `factor`, to one line of tokens a channel, `line`
// floats apart. Writes `padded` channels and a whole number of vectors of tokens, with zeros where there is nothing.
inline void pack(const float* from, int64_t step, int64_t count, int64_t dim, int64_t padded, float factor, float* to,
                 int64_t line) {
  vec x[lanes];
  for (int64_t token = 0; token < count; token += lanes) {
    for (int64_t channel = 0; channel < padded; channel += lanes) {
      const float* first = from + token * step + channel;
      if (token + lanes <= count && channel + lanes <= dim) {
        for (int i = 0; i < lanes; ++i) {
          __builtin_prefetch(first + (lanes + i) * step);  // a stride that the machine does not foresee
          x[i] = load(first + i * step) * factor;
        }
      } else {
        for (int i = 0; i < lanes; ++i) {
          x[i] = token + i < count ? load_part(first + i * step, dim - channel) * factor : vec{};
        }
      }
      transpose(x);
      const int last = static_cast<int>(std::min<int64_t>(lanes, padded - channel));
      for (int i = 0; i < last; ++i) store(to + (channel + i) * line + token, x[i]);
    }
  }
}

// Undo `pack` for one vector of tokens.
inline void unpack(const float* from, int64_t count, int64_t dim, float* to, int64_t step) {
  vec x[lanes];
  for (int64_t channel = 0; channel < dim; channel += lanes) {
    const float* first = from + channel * lanes;
    if (count == lanes && channel + lanes <= dim) {
      for (int i = 0; i < lanes; ++i) x[i] = load(first + i * lanes);
      transpose(x);
      for (int i = 0; i < lanes; ++i) store(to + i * step + channel, x[i]);
    } else {
      for (int i = 0; i < lanes; ++i) x[i] = channel + i < dim ? load(first + i * lanes) : vec{};
      transpose(x);
      for (int i = 0; i < count; ++i) store_part(to + i * step + channel, x[i], dim - channel);
    }
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

// result[row][offset] = bias[row][offset] + sum_channel tile[row][channel] met[channel][offset]
template <int row_count, int count, class Met>
void score_block(const float* x, int64_t x_row, Met met, int64_t dim, const Bias* bias, float* result,
                 int64_t result_row) {
  vec sum[row_count][count];
  for (int r = 0; r < row_count; ++r) {
    for (int o = 0; o < count; ++o) sum[r][o] = bias ? broadcast(bias[r].data[o * bias[r].step]) : vec{};
  }
  for (int64_t channel = 0; channel < dim; ++channel) {
    vec own[row_count];
    for (int r = 0; r < row_count; ++r) own[r] = load(x + r * x_row + channel * lanes);
    for (int o = 0; o < count; ++o) {
      vec other = met.at(channel, o);
      hold(other);
      for (int r = 0; r < row_count; ++r) sum[r][o] += own[r] * other;
    }
  }
  for (int r = 0; r < row_count; ++r) {
    for (int o = 0; o < count; ++o) store(result + r * result_row + o * lanes, sum[r][o]);
  }
}

template <int row_count, int count, class Met>
void score_some(int wanted, const float* x, int64_t x_row, Met met, int64_t dim, const Bias* bias, float* result,
                int64_t result_row) {
  if constexpr (count > 0) {
    if (wanted == count) return score_block<row_count, count>(x, x_row, met, dim, bias, result, result_row);
    score_some<row_count, count - 1>(wanted, x, x_row, met, dim, bias, result, result_row);
  }
}

// The products of `row_count` rows of a tile with `count` offsets, in blocks of about equal size.
template <class Met>
void scores(int row_count, int64_t count, const float* x, int64_t x_row, Met met, int64_t dim, const Bias* bias,
            float* result, int64_t result_row) {
  const int64_t blocks = (count + offsets - 1) / offsets;
  Bias moved[rows];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = count * block / blocks;
    const int wanted = static_cast<int>(count * (block + 1) / blocks - first);
    for (int r = 0; bias && r < row_count; ++r) moved[r] = {bias[r].data + first * bias[r].step, bias[r].step};
    const Bias* added = bias ? moved : nullptr;
    float* to = result + first * lanes;
    if (row_count == 1) score_some<1, offsets>(wanted, x, x_row, met.from(first), dim, added, to, result_row);
    if (row_count == 2) score_some<2, offsets>(wanted, x, x_row, met.from(first), dim, added, to, result_row);
    if constexpr (rows > 2) {
      if (row_count == 3) score_some<3, offsets>(wanted, x, x_row, met.from(first), dim, added, to, result_row);
    }
  }
}

// sum[row][channel] += sum_offset weights[row][offset] met[channel][offset], for `channel_count` channels
template <int row_count, int channel_count, class Met>
void add_block(int64_t count, const float* weights, int64_t weights_row, Met met, int64_t channel, float* sum,
               int64_t sum_row) {
  vec total[row_count][channel_count];
  for (int r = 0; r < row_count; ++r) {
    for (int c = 0; c < channel_count; ++c) total[r][c] = load(sum + r * sum_row + (channel + c) * lanes);
  }
  for (int64_t o = 0; o < count; ++o) {
    vec weight[row_count];
    for (int r = 0; r < row_count; ++r) weight[r] = load(weights + r * weights_row + o * lanes);
    for (int c = 0; c < channel_count; ++c) {
      vec other = met.at(channel + c, o);
      hold(other);
      for (int r = 0; r < row_count; ++r) total[r][c] += weight[r] * other;
    }
  }
  for (int r = 0; r < row_count; ++r) {
    for (int c = 0; c < channel_count; ++c) store(sum + r * sum_row + (channel + c) * lanes, total[r][c]);
  }
}

template <int row_count, class Met>
void add_rows(int64_t count, const float* weights, int64_t weights_row, Met met, int64_t dim, float* sum,
              int64_t sum_row) {
  int64_t channel = 0;
  for (; channel + channels <= dim; channel += channels) {
    add_block<row_count, channels>(count, weights, weights_row, met, channel, sum, sum_row);
  }
  for (; channel < dim; ++channel) add_block<row_count, 1>(count, weights, weights_row, met, channel, sum, sum_row);
}

// The weighted sums of the tokens met, added to the sums of `row_count` rows of a tile.
template <class Met>
void add_weighted(int row_count, int64_t count, const float* weights, int64_t weights_row, Met met, int64_t dim,
                  float* sum, int64_t sum_row) {
  if (row_count == 1) add_rows<1>(count, weights, weights_row, met, dim, sum, sum_row);
  if (row_count == 2) add_rows<2>(count, weights, weights_row, met, dim, sum, sum_row);
  if constexpr (rows > 2) {
    if (row_count == 3) add_rows<3>(count, weights, weights_row, met, dim, sum, sum_row);
  }
}

}  // namespace tile
