// The gradients, by gathering: see cpu.cpp.
#pragma once

#include "bands.h"

namespace tile {

struct Gradients {
  const Problem& p;
  const View &query, &key, &value, &grad_out;
  Extra extra;
  const float* bias;
  // (batch, heads, tokens): log-sum-exp of each query, and sum(grad_out * out) - grad_lse.
  const float *lse, *mean;
  Sizes sizes;

  int64_t group() const { return p.heads / p.key_heads; }
  float scale() const { return static_cast<float>(p.scale); }

  // The sums of one row of a tile that are gradients of queries or keys.
  void times_scale(float* sums) const {
    for (int64_t i = 0; i < sizes.dk * lanes; ++i) sums[i] *= scale();
  }

  // With queries in the lanes: gradients of the query and, a table a band, of the bias.
  bool of_query(void* grad_query, float* bias_parts) const {
    const Side side(p, false);
    const int64_t lines = sizes.dk + sizes.dv, x_row = lines * lanes, bands = side.bands.size();
    const int64_t packed_floats = side.row_limit * lines * side.line, bias_floats = bias ? sizes.bias * lanes : 0;
    const int64_t floats = packed_floats + rows * (x_row + sizes.dk * lanes + 2 * score_row) + bias_floats;
    return each_band(p, side, p.heads, floats, [&](int64_t number, int64_t b, int64_t h, float* packed) {
      const Band& band = side.bands[number];
      const int64_t kh = h / group();
      float* x = packed + packed_floats;
      float* sum = x + rows * x_row;
      float* s = sum + rows * sizes.dk * lanes;
      float* t = s + rows * score_row;
      float* bias_sum = t + rows * score_row;
      std::fill(bias_sum, bias_sum + bias_floats, 0.0f);
      side.each_row(band, packed, lines, [&](int64_t z, int64_t y, int64_t column, int64_t count, float* to) {
        pack(key.at(b, z, y, column, kh), count, p.dk, sizes.dk, to, side.line);
        pack(value.at(b, z, y, column, kh), count, p.dv, sizes.dv, to + sizes.dk * side.line, side.line);
      });
      const float* table = bias ? bias + h * sizes.bias : nullptr;
      each_tile(side, band, [&](const Columns& c, int64_t row, int count) {
        vec own_lse[rows], own_mean[rows];
        for (int r = 0; r < count; ++r) {
          const int64_t y = row_of(p, band, row + r);
          const int64_t at = (b * p.heads + h) * sizes.tokens + token(p, band, row + r, c);
          pack(query.at(b, band.level, y, c.x, h), c.count, p.dk, sizes.dk, x + r * x_row, lanes);
          pack(grad_out.at(b, band.level, y, c.x, h), c.count, p.dv, sizes.dv, x + r * x_row + sizes.dk * lanes, lanes);
          own_mean[r] = load_part(mean + at, c.count);
          float part[lanes];
          // Lanes past the map's end weigh nothing: the bias sums over all lanes.
          std::fill(part, part + lanes, infinity);
          std::copy(lse + at, lse + at + c.count, part);
          own_lse[r] = load(part);
        }
        std::fill(sum, sum + count * sizes.dk * lanes, 0.0f);
        // Turn the products s = q.k and t = grad_out.v of a run into the scores' gradients, in s.
        auto differentiate = [&](const Run& run, bool masked, bool biased) {
          for (int i = 0; i < run.row_count; ++i) {
            const int r = run.first_row + i;
            const Span span = span_of(run, r);
            float *sr = s + r * score_row, *tr = t + r * score_row;
            for (int64_t j = span.first; j < span.last; ++j) {
              const vec weight = simd::exp_negative(load(sr + j * lanes) - own_lse[r]);
              vec grad = weight * (load(tr + j * lanes) - own_mean[r]);
              if (masked) grad = c.meet(static_cast<int32_t>(run.first + j)) ? grad : vec{};
              store(sr + j * lanes, grad);
              if (biased) {
                float* to = bias_sum + (run.bias[i] + j) * lanes;
                store(to, load(to) + grad);
              }
            }
            clear_outside(run, span, sr);
          }
        };
        each_run(side, band, c, row, count, packed, lines, [&](const Run& run) {
          const Lines keys{run.met, side.line, p.dilation[2]};
          const Lines values{run.met + sizes.dk * side.line, side.line, p.dilation[2]};
          const float* xr = x + run.first_row * x_row;
          const int64_t at = run.first_row * score_row;
          scores(run.row_count, run.count, xr, x_row, keys, p.dk, scale(), Biases(table, run, 1).data, s + at,
                 score_row);
          scores(run.row_count, run.count, xr + sizes.dk * lanes, x_row, values, p.dv, 1, nullptr, t + at, score_row);
          differentiate(run, c.masked, bias);
          add_weighted(run.row_count, run.count, s + at, score_row, keys, sizes.dk,
                       sum + run.first_row * sizes.dk * lanes, sizes.dk * lanes);
        });
        for (int64_t i = 0; i < p.extra; i += slots) {
          const int64_t step = std::min(slots, p.extra - i);
          const Shared keys{extra.keys_of(p, b, kh, i), p.key_heads * p.dk};
          const Shared values{extra.values_of(p, b, kh, i), p.key_heads * p.dv};
          scores(count, step, x, x_row, keys, p.dk, scale(), nullptr, s, score_row);
          scores(count, step, x + sizes.dk * lanes, x_row, values, p.dv, 1, nullptr, t, score_row);
          differentiate(run_of_extra(count, step), false, false);
          add_weighted(count, step, s, score_row, keys, p.dk, sum, sizes.dk * lanes);
        }
        for (int r = 0; r < count; ++r) {
          float* from = sum + r * sizes.dk * lanes;
          times_scale(from);
          const int64_t at = (b * sizes.tokens + token(p, band, row + r, c)) * p.heads + h;
          unpack(from, c.count, p.dk, dense(grad_query, query.kind, at, p.dk, p.heads));
        }
      });
      if (!bias) return;
      float* part = bias_parts + ((b * p.heads + h) * bands + number) * sizes.bias;
      for (int64_t i = 0; i < sizes.bias; ++i) {
        part[i] = 0;
        for (int lane = 0; lane < lanes; ++lane) part[i] += bias_sum[i * lanes + lane];
      }
    });
  }

  // With keys in the lanes, which meet the queries that see them: gradients of key and value.
  bool of_key(void* grad_key, void* grad_value) const {
    const Side side(p, true);
    const int64_t own = sizes.dk + sizes.dv, lines = own + 2, row_floats = own * lanes;
    const int64_t packed_floats = side.row_limit * lines * side.line;
    int64_t tiles = 0;
    for (const Band& band : side.bands) tiles = std::max(tiles, round_up(band.row_count, rows) * band.column_count);
    const int64_t floats = packed_floats + rows * (row_floats + 2 * score_row) + tiles * row_floats;
    return each_band(p, side, p.key_heads, floats, [&](int64_t number, int64_t b, int64_t kh, float* packed) {
      const Band& band = side.bands[number];
      float* x = packed + packed_floats;
      float* s = x + rows * row_floats;
      float* t = s + rows * score_row;
      float* sums = t + rows * score_row;
      std::fill(sums, sums + tiles * row_floats, 0.0f);
      for (int64_t h = kh * group(); h < (kh + 1) * group(); ++h) {
        side.each_row(band, packed, lines, [&](int64_t z, int64_t y, int64_t column, int64_t count, float* to) {
          const int64_t at = (b * p.heads + h) * sizes.tokens + (z * p.grid[1] + y) * p.grid[2] + column;
          pack(query.at(b, z, y, column, h), count, p.dk, sizes.dk, to, side.line);
          pack(grad_out.at(b, z, y, column, h), count, p.dv, sizes.dv, to + sizes.dk * side.line, side.line);
          std::copy(lse + at, lse + at + count, to + own * side.line);
          std::copy(mean + at, mean + at + count, to + (own + 1) * side.line);
        });
        const float* table = bias ? bias + h * sizes.bias : nullptr;
        float* sum = sums;
        each_tile(side, band, [&](const Columns& c, int64_t row, int count) {
          for (int r = 0; r < count; ++r) {
            const int64_t y = row_of(p, band, row + r);
            pack(key.at(b, band.level, y, c.x, kh), c.count, p.dk, sizes.dk, x + r * row_floats, lanes);
            pack(value.at(b, band.level, y, c.x, kh), c.count, p.dv, sizes.dv, x + r * row_floats + sizes.dk * lanes,
                 lanes);
          }
          each_run(side, band, c, row, count, packed, lines, [&](const Run& run) {
            const Lines queries{run.met, side.line, p.dilation[2]};
            const Lines grads{run.met + sizes.dk * side.line, side.line, p.dilation[2]};
            const Lines rest{run.met + own * side.line, side.line, p.dilation[2]};
            const float* xr = x + run.first_row * row_floats;
            const int64_t at = run.first_row * score_row;
            scores(run.row_count, run.count, xr, row_floats, queries, p.dk, scale(), Biases(table, run, -1).data,
                   s + at, score_row);
            scores(run.row_count, run.count, xr + sizes.dk * lanes, row_floats, grads, p.dv, 1, nullptr, t + at,
                   score_row);
            for (int r = run.first_row; r < run.first_row + run.row_count; ++r) {
              const Span span = span_of(run, r);
              float *sr = s + r * score_row, *tr = t + r * score_row;
              for (int64_t j = span.first; j < span.last; ++j) {
                vec weight = simd::exp_negative(load(sr + j * lanes) - rest.at(0, j));
                vec grad = weight * (load(tr + j * lanes) - rest.at(1, j));
                if (c.masked) {
                  const ivec meet = c.meet(static_cast<int32_t>(run.first + j));
                  weight = meet ? weight : vec{};
                  grad = meet ? grad : vec{};
                }
                store(sr + j * lanes, weight);
                store(tr + j * lanes, grad);
              }
              clear_outside(run, span, sr);
              clear_outside(run, span, tr);
            }
            float* to = sum + run.first_row * row_floats;
            add_weighted(run.row_count, run.count, t + at, score_row, queries, sizes.dk, to, row_floats);
            add_weighted(run.row_count, run.count, s + at, score_row, grads, sizes.dv, to + sizes.dk * lanes,
                         row_floats);
          });
          sum += rows * row_floats;
        });
      }
      float* sum = sums;
      each_tile(side, band, [&](const Columns& c, int64_t row, int count) {
        for (int r = 0; r < count; ++r) {
          const int64_t at = (b * sizes.tokens + token(p, band, row + r, c)) * p.key_heads + kh;
          float* from = sum + r * row_floats;
          times_scale(from);
          unpack(from, c.count, p.dk, dense(grad_key, key.kind, at, p.dk, p.key_heads));
          unpack(from + sizes.dk * lanes, c.count, p.dv, dense(grad_value, value.kind, at, p.dv, p.key_heads));
        }
        sum += rows * row_floats;
      });
    });
  }

  // With additional keys in the lanes, which meet every query; query and grad_out are float32.
  bool of_extra(float* grad_key, float* grad_value) const {
    const int64_t row_floats = (sizes.dk + sizes.dv) * lanes, blocks = (p.extra + rows * lanes - 1) / (rows * lanes);
    const int64_t tasks = p.batch * p.key_heads * blocks;
    std::atomic<bool> enough{true};
#pragma omp parallel num_threads(static_cast<int>(std::max<int64_t>(1, std::min(p.threads, tasks))))
    {
      const Scratch memory = scratch(rows * (2 * row_floats + 2 * score_row));
      if (!memory) enough = false;
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; ++task) {
        if (!memory) continue;
        const int64_t b = task / blocks / p.key_heads, kh = task / blocks % p.key_heads;
        const int64_t first = task % blocks * rows * lanes;
        float *x = memory.get(), *sum = x + rows * row_floats, *s = sum + rows * row_floats, *t = s + rows * score_row;
        const int count = static_cast<int>(std::min<int64_t>(rows, (p.extra - first + lanes - 1) / lanes));
        for (int r = 0; r < count; ++r) {
          const int64_t at = first + r * lanes, some = std::min<int64_t>(lanes, p.extra - at);
          pack(floats(extra.keys_of(p, b, kh, at), p.key_heads * p.dk), some, p.dk, sizes.dk, x + r * row_floats,
               lanes);
          pack(floats(extra.values_of(p, b, kh, at), p.key_heads * p.dv), some, p.dv, sizes.dv,
               x + r * row_floats + sizes.dk * lanes, lanes);
        }
        std::fill(sum, sum + rows * row_floats, 0.0f);
        for (int64_t h = kh * group(); h < (kh + 1) * group(); ++h) {
          for (int64_t row = 0; row < p.grid[0] * p.grid[1]; ++row) {
            const int64_t z = row / p.grid[1], y = row % p.grid[1];
            const int64_t at = (b * p.heads + h) * sizes.tokens + row * p.grid[2];
            for (int64_t column = 0; column < p.grid[2]; column += slots) {
              const int64_t some = std::min(slots, p.grid[2] - column);
              const Shared queries{query.at(b, z, y, column, h).at<float>(0), query.axis[2]};
              const Shared grads{grad_out.at(b, z, y, column, h).at<float>(0), grad_out.axis[2]};
              scores(count, some, x, row_floats, queries, p.dk, scale(), nullptr, s, score_row);
              scores(count, some, x + sizes.dk * lanes, row_floats, grads, p.dv, 1, nullptr, t, score_row);
              for (int r = 0; r < count; ++r) {
                float *sr = s + r * score_row, *tr = t + r * score_row;
                for (int64_t j = 0; j < some; ++j) {
                  const vec weight = simd::exp_negative(load(sr + j * lanes) - broadcast(lse[at + column + j]));
                  store(sr + j * lanes, weight);
                  store(tr + j * lanes, weight * (load(tr + j * lanes) - broadcast(mean[at + column + j])));
                }
              }
              add_weighted(count, some, t, score_row, queries, p.dk, sum, row_floats);
              add_weighted(count, some, s, score_row, grads, p.dv, sum + sizes.dk * lanes, row_floats);
            }
          }
        }
        for (int r = 0; r < count; ++r) {
          const int64_t at = first + r * lanes, some = std::min<int64_t>(lanes, p.extra - at);
          float* from = sum + r * row_floats;
          times_scale(from);
          const int64_t to = (b * p.extra + at) * p.key_heads + kh;
          unpack(from, some, p.dk, dense(grad_key, simd::float32, to, p.dk, p.key_heads));
          unpack(from + sizes.dk * lanes, some, p.dv, dense(grad_value, simd::float32, to, p.dv, p.key_heads));
        }
      }
    }
    return enough;
  }
};

// Bring the queries' numbers to (batch, heads, tokens): the log-sum-exp, and sum(grad_out * out) - grad_lse. `Element` is
// that of grad_out, `Output` that of out.
template <class Element, class Output>
void prepare(const Problem& p, const View& grad_out, const void* out, const float* lse, const float* grad_lse,
             float* own_lse, float* mean) {
  const int64_t columns = p.grid[2], row_count = p.grid[0] * p.grid[1];
#pragma omp parallel for num_threads(static_cast<int>(p.threads)) schedule(static)
  for (int64_t i = 0; i < p.batch * row_count; ++i) {
    const int64_t b = i / row_count, row = i % row_count;
    for (int64_t x = 0; x < columns; ++x) {
      for (int64_t h = 0; h < p.heads; ++h) {
        const int64_t from = (i * columns + x) * p.heads + h, to = ((b * p.heads + h) * row_count + row) * columns + x;
        const Element* grad = grad_out.at(b, row / p.grid[1], row % p.grid[1], x, h).at<Element>(0);
        const Output* given = static_cast<const Output*>(out) + from * p.dv;
        vec sum{};
        for (int64_t channel = 0; channel < p.dv; channel += lanes) {
          sum += load_part(grad + channel, p.dv - channel) * load_part(given + channel, p.dv - channel);
        }
        float total = 0;
        for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
        own_lse[to] = lse[from];
        mean[to] = total - grad_lse[from];
      }
    }
  }
}

}  // namespace tile
