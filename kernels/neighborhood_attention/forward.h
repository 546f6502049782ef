// The output and the log-sum-exp, by a softmax over chunks of scores.
#pragma once

#include <cmath>

#include "bands.h"

namespace tile {

// Softmax of a tile, a chunk of scores at a time.
template <class Product>
struct Online {
  const Problem& p;
  const Sizes& sizes;
  const Columns& columns;
  const int tile_rows;
  const int64_t line, key_lines;
  float *scores, *most, *total, *out;  // (rows, slots, lanes), (rows, lanes) twice, (rows, dv, lanes)
  Part* parts;  // of `slots` places
  int64_t used = 0, count = 0;
  bool first = true;

  void push(const Part& part) {
    parts[count++] = part;
    used += part.run.count;
  }

  void flush() {
    for (int r = 0; r < tile_rows; ++r) weigh(r);
    for (int64_t i = 0; i < count; ++i) {
      const Part& part = parts[i];
      const Run& run = part.run;
      const float* weights = scores + run.first_row * score_row + part.slot * lanes;
      float* sum = out + run.first_row * sizes.dv * lanes;
      const int64_t row = sizes.dv * lanes;
      if (part.extra_value) {
        const Shared met{part.extra_value, p.key_heads * p.dv};
        add_weighted(run.row_count, run.count, weights, score_row, met, p.dv, sum, row);
      } else {
        const Lines met{run.met + key_lines * line, line, p.dilation[2]};
        add_weighted<Product>(run.row_count, run.count, weights, score_row, met, sizes.dv, sum, row);
      }
    }
    used = count = 0;
    first = false;
  }

  // Turn one row's scores into weights, relative to the largest score so far.
  void weigh(int r) {
    const vec former = load(most + r * lanes);
    vec largest = former;
    for (int64_t i = 0; i < count; ++i) {
      const Run& run = parts[i].run;
      const Span span = span_of(run, r);
      float* x = scores + r * score_row + parts[i].slot * lanes;
      if (columns.masked && !parts[i].extra_value) {
        for (int64_t j = span.first; j < span.last; ++j) {
          const ivec meet = columns.meet(static_cast<int32_t>(run.first + j));
          store(x + j * lanes, meet ? load(x + j * lanes) : broadcast(-infinity));
        }
      }
      for (int64_t j = span.first; j < span.last; ++j) {
        const vec score = load(x + j * lanes);
        largest = score > largest ? score : largest;
      }
    }
    // While every score is -inf, nothing is to be subtracted.
    const vec shift = largest == broadcast(-infinity) ? vec{} : largest;
    const vec scale = simd::exp_negative(former - shift);
    vec sum = load(total + r * lanes) * scale;
    for (int64_t i = 0; i < count; ++i) {
      const Run& run = parts[i].run;
      if (r < run.first_row || r >= run.first_row + run.row_count) continue;
      const Span span = span_of(run, r);
      float* x = scores + r * score_row + parts[i].slot * lanes;
      for (int64_t j = span.first; j < span.last; ++j) {
        const vec weight = simd::exp_negative(load(x + j * lanes) - shift);
        store(x + j * lanes, weight);
        sum += weight;
      }
      clear_outside(run, span, x);
      for (int64_t j = 0; Product::together == 2 && j < run.count; j += 2) {
        const vec second = j + 1 < run.count ? load(x + (j + 1) * lanes) : vec{};
        store(x + j / 2 * lanes, pair(load(x + j * lanes), second));
      }
    }
    store(most + r * lanes, largest);
    store(total + r * lanes, sum);
    if (first) return;
    float* x = out + r * sizes.dv * lanes;
    for (int64_t channel = 0; channel < sizes.dv; ++channel) {
      store(x + channel * lanes, load(x + channel * lanes) * scale);
    }
  }
};

template <class Product>
bool forward_by(const Problem& p, const View& query, const View& key, const View& value, Extra extra, const float* bias,
                void* out, float* lse) {
  const Sizes sizes(p);
  const Side side(p, false);
  // Pairs are of a token's channels in queries and keys, of neighbouring tokens in values.
  constexpr int together = Product::together;
  const int64_t dk = p.dk / together, key_lines = sizes.dk / together, lines = key_lines + sizes.dv;
  const int64_t tile_floats = rows * ((key_lines + sizes.dv) * lanes + score_row + 2 * lanes);
  const int64_t floats = side.row_limit * lines * side.line + tile_floats;
  const auto pack_keys = [&](const Tokens& from, int64_t count, float* to, int64_t line) {
    if constexpr (together == 2) pack_elements<Pair>(from, count, dk, key_lines, to, line);
    else pack(from, count, dk, key_lines, to, line);
  };
  return each_band(p, side, p.heads, floats, [&](int64_t number, int64_t b, int64_t h, float* memory) {
    const Band& band = side.bands[number];
    const int64_t kh = h / (p.heads / p.key_heads), q_row = key_lines * lanes;
    float* packed = memory;
    float* q = packed + side.row_limit * lines * side.line;
    float* scores_at = q + rows * q_row;
    float* most = scores_at + rows * score_row;
    float* sum = most + 2 * rows * lanes;
    side.each_row(band, packed, lines, [&](int64_t z, int64_t y, int64_t x, int64_t count, float* to) {
      pack_keys(key.at(b, z, y, x, kh), count, to, side.line);
      pack(value.at(b, z, y, x, kh), count, p.dv, sizes.dv, to + key_lines * side.line, side.line);
    });
    if constexpr (together == 2) {
      for (int64_t i = 0; i < side.rows_packed(band) * lines; ++i) {
        if (i % lines >= key_lines) pair_up(packed + i * side.line, side.line, p.dilation[2]);
      }
    }
    const float* table = bias ? bias + h * sizes.bias : nullptr;
    const float scale = static_cast<float>(p.scale);
    each_tile(side, band, [&](const Columns& c, int64_t row, int count) {
      for (int r = 0; r < count; ++r) {
        pack_keys(query.at(b, band.level, row_of(p, band, row + r), c.x, h), c.count, q + r * q_row, lanes);
        store(most + r * lanes, broadcast(-infinity));
        store(most + (rows + r) * lanes, vec{});
      }
      std::fill(sum, sum + count * sizes.dv * lanes, 0.0f);
      Part parts[slots];
      Online<Product> online{p, sizes, c, count, side.line, key_lines, scores_at, most, most + rows * lanes, sum, parts};
      each_run(side, band, c, row, count, packed, lines, [&](const Run& run) {
        if (online.used + run.count > slots) online.flush();
        const Lines keys{run.met, side.line, p.dilation[2]};
        scores<Product>(run.row_count, run.count, q + run.first_row * q_row, q_row, keys, dk, scale,
                        Biases(table, run, 1).data, scores_at + run.first_row * score_row + online.used * lanes,
                        score_row);
        online.push({run, online.used, nullptr, nullptr});
      });
      for (int64_t i = 0, step; i < p.extra; i += step) {
        if (online.used == slots) online.flush();
        step = std::min(p.extra - i, slots - online.used);
        const float* keys = extra.keys_of(p, b, kh, i);
        scores(count, step, q, q_row, Shared{keys, p.key_heads * p.dk}, p.dk, scale, nullptr,
               scores_at + online.used * lanes, score_row);
        online.push({run_of_extra(count, step), online.used, keys, extra.values_of(p, b, kh, i)});
      }
      online.flush();
      for (int r = 0; r < count; ++r) {
        float* x = sum + r * sizes.dv * lanes;
        const vec inverse = 1.0f / load(most + (rows + r) * lanes);
        for (int64_t channel = 0; channel < p.dv; ++channel) {
          store(x + channel * lanes, load(x + channel * lanes) * inverse);
        }
        const int64_t at = (b * sizes.tokens + token(p, band, row + r, c)) * p.heads + h;
        unpack(x, c.count, p.dv, dense(out, value.kind, at, p.dv, p.heads));
        for (int64_t i = 0; i < c.count; ++i) {
          lse[at + i * p.heads] = most[r * lanes + i] + std::log(most[(rows + r) * lanes + i]);
        }
      }
    });
  });
}

inline bool forward(const Problem& p, const View& query, const View& key, const View& value, Extra extra,
                    const float* bias, void* out, float* lse) {
#ifdef TILE_PAIRS
  const bool halves = query.kind == simd::bfloat16 && key.kind == simd::bfloat16 && value.kind == simd::bfloat16;
  if (halves && p.dk % 2 == 0 && p.extra == 0) {
    return forward_by<Pairs>(p, query, key, value, extra, bias, out, lse);
  }
#endif
  return forward_by<Floats>(p, query, key, value, extra, bias, out, lse);
}

}  // namespace tile
