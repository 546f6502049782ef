// Which tokens meet: windows and their inverse, the bands of a map that are worked on at once, and walks over them.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "tile.h"

namespace tile {

extern "C" {

// The call's sizes and window; a map of fewer than three axes has leading axes of one token.
struct Problem {
  int64_t batch, heads, key_heads, dk, dv, extra;
  int64_t grid[3], kernel_size[3], stride[3], dilation[3], is_causal[3];
  int64_t circular, threads;
  double scale;
};

// A tensor (batch, levels, rows, columns, heads, dim) of a `simd::Kind`: strides in elements, the last one 1.
struct View {
  void* data;
  int64_t kind, batch, axis[3], head;

  // A row's tokens from a place on.
  Tokens at(int64_t b, int64_t z, int64_t y, int64_t x, int64_t h) const {
    const int64_t size = simd::size_of(kind), place = b * batch + z * axis[0] + y * axis[1] + x * axis[2] + h * head;
    return {static_cast<char*>(data) + place * size, kind, axis[2] * size};
  }
};
}

// Scores a tile's row holds at once.
constexpr int64_t slots = 128;
// Rows and columns of a band, about: enough that the rows around it, which its neighbours pack too, weigh little.
constexpr int64_t band_rows = 16, band_columns = 128;

// Memory that may fail to come without an exception, which could not leave a parallel region.
using Scratch = std::unique_ptr<float, decltype(&std::free)>;

inline Scratch scratch(int64_t floats) {
  const size_t bytes = round_up(std::max<int64_t>(floats, 1) * sizeof(float), 64);
  return Scratch(static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free);
}

// Along one axis, the tokens met by the token at each position: [first, last), counted within its residue class.
struct Range {
  std::vector<int32_t> first, last;
};

inline Range windows(const Problem& p, int axis) {
  const int64_t size = p.grid[axis], k = p.kernel_size[axis], s = p.stride[axis], d = p.dilation[axis];
  Range range{std::vector<int32_t>(size), std::vector<int32_t>(size)};
  for (int64_t x = 0; x < size; ++x) {
    const int64_t length = (size - x % d + d - 1) / d, i = x / d;
    int64_t first, last = length;
    if (p.circular) {
      first = std::max<int64_t>(i - k / 2, 0);
      last = std::min(i + k / 2 + 1, length);
    } else if (p.is_causal[axis]) {
      first = std::max<int64_t>(std::min(i / s * s + s - 1, length - 1) - k + 1, 0);
    } else {
      const int64_t leader = std::min(i / s * s + s / 2, length - 1);
      first = std::max<int64_t>(std::min(leader - k / 2, length - k), 0);
      last = first + k;
    }
    range.first[x] = static_cast<int32_t>(first);
    range.last[x] = static_cast<int32_t>(p.is_causal[axis] ? std::min(last, i + 1) : last);
  }
  return range;
}

// The queries that see each key: both ends of the windows grow with the query, so they are consecutive too.
inline Range inverse(const Problem& p, int axis) {
  const int64_t size = p.grid[axis], d = p.dilation[axis];
  const Range seen = windows(p, axis);
  Range range{std::vector<int32_t>(size, 0), std::vector<int32_t>(size, 0)};
  for (int64_t residue = 0; residue < std::min(size, d); ++residue) {
    const int64_t length = (size - residue + d - 1) / d;
    int64_t first = 0, last = 0;
    for (int64_t j = 0; j < length; ++j) {
      while (first < length && seen.last[residue + first * d] <= j) ++first;
      while (last < length && seen.first[residue + last * d] <= j) ++last;
      range.first[residue + j * d] = static_cast<int32_t>(first);
      range.last[residue + j * d] = static_cast<int32_t>(std::max(first, last));
    }
  }
  return range;
}

// A vector of neighbouring columns: which offsets, in steps of the dilation, its lanes meet.
struct Columns {
  int64_t x, count;
  int32_t first, last;  // of all lanes
  bool masked;          // whether lanes differ
  ivec lane_first, lane_last;
  ivec meet(int32_t offset) const { return (lane_first <= offset) & (lane_last > offset); }
};

struct Band {
  int64_t level, row, row_count, column, column_count;  // rows of one residue class; columns count vectors
  int64_t left, right;  // columns that its packed lines hold; some may lie outside the map
};

// One side of the pairs in lanes (queries, or keys where their gradients are gathered), and what it meets.
struct Side {
  const Problem& p;
  bool keys;
  Range range[3];
  std::vector<Columns> columns;
  std::vector<Band> bands;
  std::vector<int32_t> reach;  // of a circular window: the farthest offset at each distance in levels and rows, or -1
  int64_t left = 0, line = 0, row_limit = 0;

  Side(const Problem& problem, bool keys) : p(problem), keys(keys) {
    for (int axis = 0; axis < 3; ++axis) range[axis] = keys ? inverse(p, axis) : windows(p, axis);
    make_columns();
    make_bands();
    if (p.circular) make_reach();
  }

  void make_columns() {
    const int64_t width = p.grid[2], d = p.dilation[2];
    for (int64_t x = 0; x < width; x += lanes) {
      Columns c{x, std::min<int64_t>(lanes, width - x), 0, 0, false, {}, {}};
      for (int i = 0; i < lanes; ++i) {
        // Lanes past the map's end repeat the last column; what they give is dropped.
        const int64_t own = std::min(x + i, width - 1);
        c.lane_first[i] = static_cast<int32_t>(range[2].first[own] - own / d);
        c.lane_last[i] = static_cast<int32_t>(range[2].last[own] - own / d);
        c.first = i ? std::min<int32_t>(c.first, c.lane_first[i]) : c.lane_first[i];
        c.last = i ? std::max<int32_t>(c.last, c.lane_last[i]) : c.lane_last[i];
      }
      for (int i = 0; i < lanes; ++i) c.masked |= c.lane_first[i] != c.first || c.lane_last[i] != c.last;
      columns.push_back(c);
    }
  }

  void make_bands() {
    const int64_t vectors = columns.size(), strips = (p.grid[2] + band_columns - 1) / band_columns;
    for (int64_t level = 0; level < p.grid[0]; ++level) {
      for (int64_t residue = 0; residue < std::min(p.grid[1], p.dilation[1]); ++residue) {
        const int64_t length = (p.grid[1] - residue + p.dilation[1] - 1) / p.dilation[1];
        const int64_t count = (length + band_rows - 1) / band_rows;
        for (int64_t i = 0; i < count * strips; ++i) {
          const int64_t first = length * (i / strips) / count, strip = i % strips;
          int64_t column = vectors * strip / strips;
          const int64_t last_column = vectors * (strip + 1) / strips;
          Band band{level, residue + first * p.dilation[1], length * (i / strips + 1) / count - first, column,
                    last_column - column, columns[column].x, 0};
          for (; band.column_count && column < last_column; ++column) {
            const Columns& c = columns[column];
            band.left = std::min(band.left, c.x + c.first * p.dilation[2]);
            band.right = std::max(band.right, c.x + lanes + std::max<int64_t>(c.last - 1, 0) * p.dilation[2]);
          }
          bands.push_back(band);
        }
      }
    }
    for (const Band& band : bands) {
      line = std::max(line, round_up(band.right - band.left, lanes) + lanes);
      row_limit = std::max(row_limit, rows_packed(band));
    }
  }

  void make_reach() {
    int64_t radius[3], whole = 1;
    for (int axis = 0; axis < 3; ++axis) whole *= radius[axis] = (p.kernel_size[axis] + 1) / 2;
    for (int64_t z = 0; z < radius[0]; ++z) {
      for (int64_t y = 0; y < radius[1]; ++y) {
        auto square = [&](int64_t o, int axis) { return o * (whole / radius[axis]) * o * (whole / radius[axis]); };
        int64_t x = radius[2] - 1;
        while (x >= 0 && square(z, 0) + square(y, 1) + square(x, 2) >= whole * whole) --x;
        reach.push_back(static_cast<int32_t>(x));
      }
    }
  }

  // The levels and rows that a band meets: the first, and how many.
  int64_t first_level(const Band& b) const { return range[0].first[b.level]; }
  int64_t levels_of(const Band& b) const { return range[0].last[b.level] - first_level(b); }
  int64_t first_row(const Band& b) const { return range[1].first[b.row]; }
  int64_t rows_of(const Band& b) const {
    return range[1].last[b.row + (b.row_count - 1) * p.dilation[1]] - first_row(b);
  }

  int64_t rows_packed(const Band& b) const { return levels_of(b) * rows_of(b); }

  // Pack the rows that a band meets of one head of `from`, each to `channel` and the following lines of its place.
  template <class Copy>
  void each_row(const Band& b, float* to, int64_t lines, Copy copy) const {
    const int64_t left = b.left, first = std::max<int64_t>(left, 0);
    const int64_t count = std::min(b.right, p.grid[2]) - first;
    for (int64_t i = 0; i < rows_packed(b); ++i) {
      const int64_t z = (first_level(b) + i / rows_of(b)) * p.dilation[0] + b.level % p.dilation[0];
      const int64_t y = (first_row(b) + i % rows_of(b)) * p.dilation[1] + b.row % p.dilation[1];
      float* row = to + i * lines * line;
      for (int64_t channel = 0; channel < lines; ++channel) {
        float* begin = row + channel * line;
        std::fill(begin, begin + (first - left), 0.0f);
        std::fill(begin + (first - left) + count, begin + line, 0.0f);
      }
      copy(z, y, first, count, row + (first - left));
    }
  }
};

// A run of neighbouring offsets on one row that some rows of a tile meet.
struct Run {
  const float* met;  // packed lines at the first lane and offset
  int first_row, row_count;
  int32_t first, count;                     // offsets
  int32_t row_first[rows], row_last[rows];  // of each of those rows
  int64_t bias[rows];                       // place in a head's bias table at the first offset
};

// Call `f` with every run that a tile meets: `tile_row` is its first row within the band.
template <class F>
void each_run(const Side& side, const Band& band, const Columns& c, int64_t tile_row, int tile_rows,
              const float* packed, int64_t lines, F f) {
  const Problem& p = side.p;
  const int64_t* d = p.dilation;
  const int64_t* k = p.kernel_size;
  const int64_t first_y = band.row + tile_row * d[1], last_y = first_y + (tile_rows - 1) * d[1];
  const int64_t sign = side.keys ? -1 : 1;
  for (int64_t level = 0; level < side.levels_of(band); ++level) {
    const int64_t dz = side.first_level(band) + level - band.level / d[0];
    for (int64_t met_y = side.range[1].first[first_y]; met_y < side.range[1].last[last_y]; ++met_y) {
      Run run{nullptr, 0, 0, 0, 0, {}, {}, {}};
      int32_t first = c.last, last = c.first;
      for (int r = 0; r < tile_rows; ++r) {
        const int64_t y = first_y + r * d[1], dy = met_y - y / d[1];
        if (met_y < side.range[1].first[y] || met_y >= side.range[1].last[y]) continue;
        int32_t row_first = c.first, row_last = c.last;
        if (p.circular) {
          const int32_t reach = side.reach[std::abs(dz) * ((k[1] + 1) / 2) + std::abs(dy)];
          row_first = std::max(row_first, -reach);
          row_last = std::min(row_last, reach + 1);
          if (reach < 0 || row_first >= row_last) continue;
        }
        if (run.row_count == 0) run.first_row = r;
        const int i = run.row_count++;
        run.row_first[i] = row_first;
        run.row_last[i] = row_last;
        run.bias[i] = ((sign * dz + k[0] - 1) * (2 * k[1] - 1) + sign * dy + k[1] - 1) * (2 * k[2] - 1) + k[2] - 1;
        first = std::min(first, row_first);
        last = std::max(last, row_last);
      }
      const int64_t row = level * side.rows_of(band) + met_y - side.first_row(band);
      const float* line = packed + row * lines * side.line + c.x - band.left;
      for (run.first = first; run.row_count && run.first < last; run.first += slots) {
        Run part = run;
        part.count = std::min<int32_t>(slots, last - run.first);
        part.met = line + run.first * d[2];
        for (int i = 0; i < run.row_count; ++i) part.bias[i] += sign * run.first;
        f(part);
      }
    }
  }
}

}  // namespace tile
