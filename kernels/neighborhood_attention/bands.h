// How a call is cut up: bands of the map shared among the threads, their tiles, and the runs of scores that a tile meets.
#pragma once

#include <omp.h>

#include <atomic>
#include <limits>

#include "window.h"

namespace tile {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int64_t score_row = slots * lanes;

struct Sizes {
  int64_t dk, dv;  // padded to whole blocks of channels
  int64_t tokens, bias;
  explicit Sizes(const Problem& p)
      : dk(round_up(p.dk, channels)),
        dv(round_up(p.dv, channels)),
        tokens(p.grid[0] * p.grid[1] * p.grid[2]),
        bias((2 * p.kernel_size[0] - 1) * (2 * p.kernel_size[1] - 1) * (2 * p.kernel_size[2] - 1)) {}
};

// Run `work(band, image, head, memory)` for every band of every head; each thread has `floats` of memory.
template <class Work>
bool each_band(const Problem& p, const Side& side, int64_t heads, int64_t floats, Work work) {
  const int64_t bands = side.bands.size(), tasks = p.batch * heads * bands;
  std::atomic<bool> enough{true};
#pragma omp parallel num_threads(static_cast<int>(std::max<int64_t>(1, std::min(p.threads, tasks))))
  {
    const Scratch memory = scratch(floats);
    if (!memory) enough = false;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      if (memory) work(task % bands, task / bands / heads, task / bands % heads, memory.get());
    }
  }
  return enough;
}

// Run `work(columns, first row, row count)` for every tile of a band.
template <class Work>
void each_tile(const Side& side, const Band& band, Work work) {
  for (int64_t row = 0; row < band.row_count; row += rows) {
    const int count = static_cast<int>(std::min<int64_t>(rows, band.row_count - row));
    for (int64_t i = 0; i < band.column_count; ++i) work(side.columns[band.column + i], row, count);
  }
}

inline int64_t row_of(const Problem& p, const Band& band, int64_t row) { return band.row + row * p.dilation[1]; }

inline int64_t token(const Problem& p, const Band& band, int64_t row, const Columns& c) {
  return (band.level * p.grid[1] + row_of(p, band, row)) * p.grid[2] + c.x;
}

// The rows of `dim` elements that one head has in a dense result of `kind`, from token x head `at` on.
inline Tokens dense(void* data, int64_t kind, int64_t at, int64_t dim, int64_t heads) {
  const int64_t size = simd::size_of(kind) * dim;
  return {static_cast<char*>(data) + at * size, kind, heads * size};
}

// Scores of one run: where they lie among a chunk's slots, and the additional tokens that they stand for, if any.
struct Part {
  Run run;
  int64_t slot;
  const float *extra_key, *extra_value;
};

inline Run run_of_extra(int tile_rows, int64_t count) {
  Run run{nullptr, 0, tile_rows, 0, static_cast<int32_t>(count), {}, {}, {}};
  std::fill(run.row_last, run.row_last + rows, run.count);
  return run;
}

// The slots that row r of a tile meets in a run.
struct Span {
  int64_t first, last;
};

inline Span span_of(const Run& run, int r) {
  const int i = r - run.first_row;
  if (i < 0 || i >= run.row_count) return {0, 0};
  const int64_t first = std::max(run.row_first[i] - run.first, 0);
  return {first, std::max<int64_t>(first, std::min(run.row_last[i] - run.first, run.count))};
}

inline void clear_outside(const Run& run, Span span, float* x) {
  std::fill(x, x + span.first * lanes, 0.0f);
  std::fill(x + span.last * lanes, x + run.count * lanes, 0.0f);
}

struct Biases {
  Bias row[rows];
  const Bias* data;
  Biases(const float* table, const Run& run, int64_t step) : data(table ? row : nullptr) {
    for (int i = 0; table && i < run.row_count; ++i) row[i] = {table + run.bias[i], step};
  }
};

struct Extra {
  const float *key, *value;  // (batch, extra, key heads, dim)
  const float* keys_of(const Problem& p, int64_t b, int64_t h, int64_t i) const {
    return key + ((b * p.extra + i) * p.key_heads + h) * p.dk;
  }
  const float* values_of(const Problem& p, int64_t b, int64_t h, int64_t i) const {
    return value + ((b * p.extra + i) * p.key_heads + h) * p.dv;
  }
};

}  // namespace tile
