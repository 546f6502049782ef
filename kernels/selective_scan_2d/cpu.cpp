// The selective scan over several orders of a map, and its gradients, in float32: channels are dense.
//
// A task is a few tiles of channels of one map, and walks through the orders one after another: it reads each cell where
// it lies and adds to its own channels of the output, so that no permuted copy, no full delta of a low-rank one and no
// order's own output is ever written.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "../selective_scan/scan.h"

namespace {

using scan::Arena;
using scan::lanes;
using scan::vec;
using std::int32_t;
using std::int64_t;

constexpr int forward_chunk = 64;

}  // namespace

extern "C" {

// A tensor (batch, cells, orders, features) or (batch, cells, features): strides in elements, features dense.
struct Map {
  float* data;
  int64_t batch, cell, order;
};

struct Arguments {
  Map x, delta, B, C, grad_out, out, grad_x, grad_delta;
  const float *weight, *A, *D, *bias;
  // Gradients of parameters have a leading batch axis. Those of B, C and a low-rank delta's first factor are (parts,
  // batch, cells, orders, features), to be summed over the parts of the channels that tasks walk through.
  float *grad_weight, *grad_A, *grad_D, *grad_bias, *grad_B, *grad_C, *grad_rank;
  // (orders, steps): the cell of x read at each step, that of delta, B and C, and the row of the output written; -1 for
  // none. An order has counts[order] steps.
  const int32_t *read, *place, *target;
  const int64_t* counts;
  int64_t batch, cells, channels, states, rank, orders, steps, rows, softplus, threads;
  float scale;  // of the output
};
}

namespace {

vec load_row(const float* p, int width) {
  if (width == lanes) return simd::load(p);
  vec x{};
  std::memcpy(&x, p, std::min(width, lanes) * sizeof(float));
  return x;
}

void store_row(vec x, float* p, int width) {
  if (width == lanes) simd::store(p, x);
  else std::memcpy(p, &x, std::min(width, lanes) * sizeof(float));
}

// Rows of features, one a step, beside each other; zeros for a padded step.
void gather(const float* from, int64_t cell, const int32_t* cells, int count, int64_t features, float* rows) {
  for (int t = 0; t < count; ++t, rows += features) {
    if (cells[t] < 0) std::fill_n(rows, features, 0.0f);
    else if (features == 1) *rows = from[cells[t] * cell];
    else std::copy_n(from + cells[t] * cell, features, rows);
  }
}

void gather(const float* from, int64_t cell, const int32_t* cells, int count, int width, vec* rows) {
  for (int t = 0; t < count; ++t) rows[t] = cells[t] < 0 ? vec{} : load_row(from + cells[t] * cell, width);
}

void scatter(const vec* rows, float factor, const int32_t* cells, int count, int width, float* into, int64_t cell) {
  for (int t = 0; t < count; ++t) {
    if (cells[t] < 0) continue;
    float* row = into + cells[t] * cell;
    store_row(load_row(row, width) + rows[t] * factor, row, width);
  }
}

// The channels [first, first + channels) of one map.
struct Task {
  int64_t batch, part, first, channels;
};

struct Tile {
  int64_t channel;
  int width;
  vec *A, *state, *weight, *entering, *grad_A, *grad_weight;
  scan::Ends ends;
};

// The buffers of a task.
struct Chunk {
  int64_t order, start;
  int count;
  const int32_t *read, *place, *target;
  float *B, *C, *rank, *sums;
  vec *u, *raw, *delta, *x, *y, *grad_y, *grad_x, *grad_rate, *grad_B, *grad_C, *grad_rank;
};

struct Job {
  const Arguments& a;
  bool back;
  int chunk;
  int64_t tiles, parts;

  Job(const Arguments& arguments, bool back)
      : a(arguments), back(back), chunk(back ? scan::backward_chunk(a.states) : forward_chunk) {
    tiles = scan::tiles_together(a.batch, a.channels);
    parts = (a.channels + tiles * lanes - 1) / (tiles * lanes);
  }

  int64_t tasks() const { return a.batch * parts; }
  int64_t chunks(int64_t order) const { return (a.counts[order] + chunk - 1) / chunk; }
  int64_t most_features() const { return std::max(a.states, a.rank); }

  int64_t floats() const {
    const int64_t common = chunk * (2 * a.states + a.rank) + 64 + (4 * chunk + tiles * (2 * a.states + a.rank)) * lanes;
    const int64_t boundaries = tiles * ((a.steps + chunk - 1) / chunk) * a.states;
    const int64_t rest = (4 * chunk + boundaries + tiles * (a.states + a.rank) + chunk * (2 * a.states + a.rank) +
                          3 * lanes) * lanes + chunk * most_features() + lanes + 64;
    return common + (back ? rest : 0);
  }

  Task task(int64_t number) const {
    const int64_t part = number % parts, first = part * tiles * lanes;
    return {number / parts, part, first, std::min(tiles * lanes, a.channels - first)};
  }

  Chunk buffers(Arena& arena) const {
    Chunk c{};
    c.B = arena.floats(chunk * a.states), c.C = arena.floats(chunk * a.states), c.rank = arena.floats(chunk * a.rank);
    for (vec** x : {&c.u, &c.delta, &c.x, &c.y}) *x = arena.vectors(chunk);
    if (!back) return c;
    for (vec** x : {&c.raw, &c.grad_y, &c.grad_x, &c.grad_rate}) *x = arena.vectors(chunk);
    for (vec** x : {&c.grad_B, &c.grad_C}) *x = cleared(arena, chunk * a.states + lanes);
    c.grad_rank = cleared(arena, chunk * a.rank + lanes);
    c.sums = arena.floats(chunk * most_features() + lanes);
    return c;
  }

  static vec* cleared(Arena& arena, int64_t size) {
    vec* x = arena.vectors(size);
    std::fill_n(x, size, vec{});
    return x;
  }

  void move(Chunk& c, int64_t order, int64_t start) const {
    c.order = order, c.start = start;
    c.count = static_cast<int>(std::min<int64_t>(chunk, a.counts[order] - start));
    const int64_t at = order * a.steps + start;
    c.read = a.read + at, c.place = a.place + at, c.target = a.target + at;
  }

  Tile tile(const Task& task, int64_t order, int64_t from, Arena& arena) const {
    Tile t{};
    t.channel = task.first + from;
    t.width = static_cast<int>(std::min<int64_t>(lanes, task.channels - from));
    t.A = arena.vectors(a.states), t.weight = arena.vectors(a.rank);
    t.state = cleared(arena, a.states);
    const int64_t row = order * a.channels + t.channel;
    scan::load_columns(a.A + row * a.states, a.states, t.width, scan::log2_e, t.A);
    if (a.rank) scan::load_columns(a.weight + row * a.rank, a.rank, t.width, 1.0f, t.weight);
    if (a.D) scan::load_columns(a.D + row, 1, t.width, 1.0f, &t.ends.D);
    if (a.bias) scan::load_columns(a.bias + row, 1, t.width, 1.0f, &t.ends.bias);
    if (!back) return t;
    t.grad_A = cleared(arena, a.states), t.grad_weight = cleared(arena, a.rank);
    t.entering = arena.vectors(chunks(order) * a.states);
    return t;
  }

  // The address of a task's first row of `x`.
  static float* base(const Map& x, const Task& task, int64_t order) {
    return x.data + task.batch * x.batch + order * x.order;
  }

  void clear(const Map& x, const Task& task, int64_t order, int64_t rows) const {
    float* row = base(x, task, order) + task.first;
    for (int64_t i = 0; i < rows; ++i, row += x.cell) std::fill_n(row, task.channels, 0.0f);
  }

  // What all tiles share of a chunk.
  void read_rows(const Task& task, Chunk& c, bool with_C) const {
    gather(base(a.B, task, c.order), a.B.cell, c.place, c.count, a.states, c.B);
    if (with_C) gather(base(a.C, task, c.order), a.C.cell, c.place, c.count, a.states, c.C);
    if (a.rank) gather(base(a.delta, task, c.order), a.delta.cell, c.place, c.count, a.rank, c.rank);
  }

  void read_tile(const Task& task, const Chunk& c, const Tile& t, vec* delta) const {
    gather(base(a.x, task, 0) + t.channel, a.x.cell, c.read, c.count, t.width, c.u);
    if (!a.rank) {
      gather(base(a.delta, task, c.order) + t.channel, a.delta.cell, c.place, c.count, t.width, delta);
      return;
    }
    int s = 0;
    for (; s + 4 <= c.count; s += 4) {
      vec sum[4] = {};
      const float* rows = c.rank + s * a.rank;
      for (int64_t r = 0; r < a.rank; ++r)
        for (int i = 0; i < 4; ++i) sum[i] += t.weight[r] * rows[i * a.rank + r];
      for (int i = 0; i < 4; ++i) delta[s + i] = sum[i];
    }
    for (; s < c.count; ++s) {
      delta[s] = vec{};
      for (int64_t r = 0; r < a.rank; ++r) delta[s] += t.weight[r] * c.rank[s * a.rank + r];
    }
  }

  void forward(const Task& task, Arena arena) const {
    Chunk c = buffers(arena);
    clear(a.out, task, 0, a.rows);
    for (int64_t order = 0; order < a.orders; ++order) {
      Tile side[4];
      Arena rest = arena;
      for (int64_t i = 0; i * lanes < task.channels; ++i) side[i] = tile(task, order, i * lanes, rest);
      for (int64_t start = 0; start < a.counts[order]; start += chunk) {
        move(c, order, start);
        read_rows(task, c, true);
        for (int64_t i = 0; i * lanes < task.channels; ++i) {
          const Tile& t = side[i];
          read_tile(task, c, t, c.delta);
          scan::activate(c.count, c.delta, t.ends.bias, a.softplus);
          for (int s = 0; s < c.count; ++s) c.y[s] = t.ends.D * c.u[s], c.x[s] = c.delta[s] * c.u[s];
          scan::forward<true>(c.count, a.states, c.delta, c.x, t.A, {c.B, a.states, nullptr},
                              {c.C, a.states, nullptr}, t.state, c.y);
          scatter(c.y, a.scale, c.target, c.count, t.width, base(a.out, task, 0) + t.channel, a.out.cell);
        }
      }
    }
  }

  void backward(const Task& task, Arena arena) const {
    Chunk c = buffers(arena);
    clear(a.grad_x, task, 0, a.cells);
    clear_sums(task, a.grad_B, a.states);
    clear_sums(task, a.grad_C, a.states);
    if (a.rank) clear_sums(task, a.grad_rank, a.rank);
    for (int64_t order = 0; order < a.orders; ++order) {
      if (!a.rank) clear(a.grad_delta, task, order, a.cells);
      Tile side[4];
      Arena rest = arena;
      const int64_t count = (task.channels + lanes - 1) / lanes;
      for (int64_t i = 0; i < count; ++i) side[i] = tile(task, order, i * lanes, rest);
      enter(task, c, order, side, count);
      for (int64_t n = chunks(order) - 1; n >= 0; --n) {
        move(c, order, n * chunk);
        read_rows(task, c, true);
        for (int64_t i = 0; i < count; ++i) retreat(task, c, side[i], n);
        reduce(task, c, c.grad_B, a.states, a.grad_B);
        reduce(task, c, c.grad_C, a.states, a.grad_C);
        if (a.rank) reduce(task, c, c.grad_rank, a.rank, a.grad_rank);
      }
      for (int64_t i = 0; i < count; ++i) {
        const Tile& t = side[i];
        const int64_t row = (task.batch * a.orders + order) * a.channels + t.channel;
        scan::store_columns(t.grad_A, a.states, t.width, 1.0f, a.grad_A + row * a.states);
        if (a.rank) scan::store_columns(t.grad_weight, a.rank, t.width, 1.0f, a.grad_weight + row * a.rank);
        if (a.D) scan::store_columns(&t.ends.grad_D, 1, t.width, 1.0f, a.grad_D + row);
        if (a.bias) scan::store_columns(&t.ends.grad_bias, 1, t.width, 1.0f, a.grad_bias + row);
      }
    }
  }

  // Walk forward to note the state at each chunk's start; the states are cleared at the end.
  void enter(const Task& task, Chunk& c, int64_t order, Tile* side, int64_t count) const {
    for (int64_t n = 0; n < chunks(order); ++n) {
      const bool last = n + 1 == chunks(order);
      move(c, order, n * chunk);
      if (!last) read_rows(task, c, false);
      for (int64_t i = 0; i < count; ++i) {
        const Tile& t = side[i];
        std::copy_n(t.state, a.states, t.entering + n * a.states);
        if (last) {
          std::fill_n(t.state, a.states, vec{});
          continue;
        }
        read_tile(task, c, t, c.delta);
        scan::activate(c.count, c.delta, t.ends.bias, a.softplus);
        for (int s = 0; s < c.count; ++s) c.x[s] = c.delta[s] * c.u[s];
        scan::forward<false>(c.count, a.states, c.delta, c.x, t.A, {c.B, a.states, nullptr}, {}, t.state, nullptr);
      }
    }
  }

  void retreat(const Task& task, Chunk& c, Tile& t, int64_t n) const {
    read_tile(task, c, t, c.raw);
    gather(base(a.grad_out, task, 0) + t.channel, a.grad_out.cell, c.target, c.count, t.width, c.grad_y);
    std::copy_n(c.raw, c.count, c.delta);
    scan::activate(c.count, c.delta, t.ends.bias, a.softplus);
    for (int s = 0; s < c.count; ++s) {
      c.x[s] = c.delta[s] * c.u[s], c.grad_y[s] *= a.scale;
      c.grad_x[s] = vec{}, c.grad_rate[s] = vec{};
    }
    scan::backward(c.count, a.states,
                   {c.delta, c.x, c.grad_y, t.A, t.entering + n * a.states, t.state, c.grad_x, c.grad_rate, t.grad_A,
                    c.grad_B, c.grad_C, nullptr, {c.B, a.states, nullptr}, {c.C, a.states, nullptr}});
    scan::finish(c.count, c.u, c.raw, c.delta, a.softplus, c.grad_y, c.grad_x, c.grad_rate, t.ends);
    scatter(c.grad_x, 1.0f, c.read, c.count, t.width, base(a.grad_x, task, 0) + t.channel, a.grad_x.cell);
    if (!a.rank) {
      scatter(c.grad_rate, 1.0f, c.place, c.count, t.width, base(a.grad_delta, task, c.order) + t.channel,
              a.grad_delta.cell);
      return;
    }
    for (int64_t r = 0; r < a.rank; ++r) {
      const vec weight = t.weight[r];
      vec grad = t.grad_weight[r];
      for (int s = 0; s < c.count; ++s) {
        c.grad_rank[s * a.rank + r] += c.grad_rate[s] * weight;
        grad += c.grad_rate[s] * c.rank[s * a.rank + r];
      }
      t.grad_weight[r] = grad;
    }
  }

  float* sums_of(const Task& task, float* x, int64_t features) const {
    return x + (task.part * a.batch + task.batch) * a.cells * a.orders * features;
  }

  void clear_sums(const Task& task, float* x, int64_t features) const {
    std::fill_n(sums_of(task, x, features), a.cells * a.orders * features, 0.0f);
  }

  // Add the sums over the task's channels to the cells, and clear them for the next chunk.
  void reduce(const Task& task, const Chunk& c, vec* grad, int64_t features, float* into) const {
    scan::sum_lanes(grad, c.count * features, c.sums);
    std::fill_n(grad, c.count * features, vec{});
    into = sums_of(task, into, features) + c.order * features;
    for (int t = 0; t < c.count; ++t) {
      if (c.place[t] < 0) continue;
      float* row = into + c.place[t] * a.orders * features;
      for (int64_t i = 0; i < features; ++i) row[i] += c.sums[t * features + i];
    }
  }
};

}  // namespace

extern "C" {

// The number of parts that the gradients of B, C and a low-rank delta's first factor come in.
int64_t selective_scan_2d_parts(const Arguments* arguments) { return Job(*arguments, true).parts; }

// Returns 0, or 1 where memory is short.
int selective_scan_2d_forward(const Arguments* arguments) {
  const Job job(*arguments, false);
  const int threads = static_cast<int>(arguments->threads);
  const scan::Scratch scratch(job.floats(), threads);
  if (!scratch.data) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < job.tasks(); ++i)
    job.forward(job.task(i), Arena{scratch.data + omp_get_thread_num() * scratch.each});
  return 0;
}

int selective_scan_2d_backward(const Arguments* arguments) {
  const Job job(*arguments, true);
  const int threads = static_cast<int>(arguments->threads);
  const scan::Scratch scratch(job.floats(), threads);
  if (!scratch.data) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < job.tasks(); ++i)
    job.backward(job.task(i), Arena{scratch.data + omp_get_thread_num() * scratch.each});
  return 0;
}
}
