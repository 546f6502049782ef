// The selective scan over several orders of a map, and its gradients, computed in float32: channels are dense.
//
// A task is a few tiles of channels of one map, and walks through the orders one after another: it reads each cell
// where it lies and adds to its own channels of the output, so that no permuted copy, no full delta of a low-rank one
// and no order's own output is ever written. Maps of half precision are read where they lie; one that orders add to is
// added up beside it in float32, by each task for its own channels, and rounded at the end.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "../selective_scan/scan.h"
#include "../structures.h"

namespace {

using scan::Arena;
using scan::lanes;
using scan::load_row;
using scan::store_row;
using scan::vec;
using std::int32_t;
using std::int64_t;

constexpr int forward_chunk = 64;
constexpr int64_t most_sums = 2 << 20;  // floats of all orders' sums over channels; beyond, orders go one by one
constexpr int ranks_together = 4;       // so that four tiles' factors of them fit the registers
constexpr int64_t piece = 4096;         // floats of them that are added up at a time

}  // namespace

extern "C" {

// A tensor (batch, cells, orders, features), or (batch, cells, features) with 0 for the orders: strides in elements,
// and what these are, a simd::Kind; features are dense.
struct Map {
  void* data;
  int64_t batch, cell, order, kind;
};

struct Arguments {
  Map x, delta, B, C, grad_out, out, grad_x, grad_delta;
  const float *delta_weight, *A, *D, *delta_bias;
  // Gradients of parameters have a leading batch axis. Those of B, C and a low-rank delta's first factor are (batch,
  // cells, orders, features), dense, and added to.
  float *grad_weight, *grad_A, *grad_D, *grad_bias, *grad_B, *grad_C, *grad_rank;
  // (batch, orders, chunks of the longest order, states, channels): the states at the starts of chunks, which the forward
  // pass notes where there is a place for them and the backward pass needs.
  float* entering;
  // (orders, steps), or (batch, orders, steps) with `tables`, what lies between two images' steps: the cell of x read at
  // each step, that of delta, B and C, and the row of the output written; -1 for none. An order has counts[order] steps.
  const int32_t *read, *place, *target;
  // (batch, orders, steps): how many places of zeros the state crosses before each step; null for none.
  const float* gaps;
  const int64_t* counts;
  // (3, orders): whether an order is the first at every cell of x, of its own maps and every row of the output, and at
  // each of them once, so that these need not be zeros before.
  const int32_t* first;
  int64_t batch, cells, channels, states, rank, orders, steps, rows, tables, chunk, softplus,
      threads;  // chunk: of the backward pass
  float scale;  // of the output
};
}

namespace {

// Rows of features, one a step, beside each other in a pitch; zeros for a padded step and beyond the features.
template <class Element>
void gather(const Element* from, int64_t cell, const int32_t* cells, int count, int64_t features, int64_t pitch,
            float* rows) {
  if (pitch == 1) {
    scan::load_elements(count, [&](int t) { return cells[t] < 0 ? Element{} : from[cells[t] * cell]; }, rows);
    return;
  }
  for (int t = 0; t < count; ++t, rows += pitch)
    for (int64_t i = 0; i < pitch; i += lanes)
      simd::store(rows + i, cells[t] < 0 ? vec{} : load_row(from + cells[t] * cell + i, features - i));
}

// A tile's row at a step, zeros for a padded step. That of the chunk that comes `next` is fetched meanwhile: an order's
// cells may lie pages apart.
template <class Element>
vec fetch(const Element* from, int64_t cell, const int32_t* step, int64_t next, int width) {
  __builtin_prefetch(from + step[next] * cell);
  return *step < 0 ? vec{} : load_row(from + *step * cell, width);
}

// Add rows to their cells; `store` them where nothing was written before.
template <class Element>
void scatter(const vec* rows, float factor, const int32_t* cells, int64_t next, int count, int width, bool store,
             Element* into, int64_t cell) {
  for (int t = 0; t < count; ++t) {
    __builtin_prefetch(into + cells[t + next] * cell, 1);
    if (cells[t] < 0) continue;
    Element* row = into + cells[t] * cell;
    store_row(store ? rows[t] * factor : load_row(row, width) + rows[t] * factor, row, width);
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
  vec *u, *slope, *delta, *whole, *x, *grad_y, *grad_x, *grad_rate;  // of a chunk of the backward pass
  scan::Ends ends;
  vec zero_step, zero_slope, grad_gap;  // the step size of a token of zeros
};

// The buffers of a task.
struct Chunk {
  int64_t order;
  int count;
  int64_t start;
  int64_t next;  // from a step to that of the chunk that follows, in the direction of the pass
  const int32_t *read, *place, *target;
  const float* gaps;
  float *B, *C, *rank, *grad_B, *grad_C, *grad_rank;
  vec *u, *delta, *whole, *x, *y, *spread;  // of one tile, and the gradients of a few ranks not yet summed over lanes
};

enum Table { reads, places, targets };

// What a task writes of a map: its rows of channels.
struct Target {
  const Map& map;
  Table table;
  float* sums;    // where they are added up, in the map or, to be rounded, beside it; null: each is written once
  int64_t pitch;  // between the sums of two cells
};

struct Job {
  const Arguments& a;
  bool back;
  int chunk;
  int64_t tiles, parts, pitch, rank_pitch;

  Job(const Arguments& arguments, bool back)
      : a(arguments), back(back), chunk(back ? static_cast<int>(a.chunk) : forward_chunk) {
    tiles = scan::tiles_together(a.batch, a.channels);
    parts = (a.channels + tiles * lanes - 1) / (tiles * lanes);
    pitch = a.states == 1 ? 1 : scan::round_up(a.states, lanes);
    rank_pitch = scan::round_up(a.rank, lanes);
  }

  int64_t tasks() const { return a.batch * parts; }
  int64_t chunks(int64_t order) const { return (a.counts[order] + chunk - 1) / chunk; }

  int64_t floats() const {
    const int64_t common = chunk * (2 * pitch + rank_pitch) + (5 * chunk + tiles * (2 * a.states + a.rank)) * lanes;
    const int64_t rest = tiles * (2 * a.states + a.rank + 8 * chunk) * lanes + chunk * ranks_together * lanes +
                         chunk * (2 * pitch + a.rank);
    return common + (back ? rest + beside(a.grad_delta, places, a.cells) : beside(a.out, targets, a.rows));
  }

  Task task(int64_t number) const {
    const int64_t part = number % parts, first = part * tiles * lanes;
    return {number / parts, part, first, std::min(tiles * lanes, a.channels - first)};
  }

  Chunk buffers(Arena& arena) const {
    Chunk c{};
    c.B = arena.floats(chunk * pitch), c.C = arena.floats(chunk * pitch), c.rank = arena.floats(chunk * rank_pitch);
    for (vec** x : {&c.u, &c.delta, &c.whole, &c.x, &c.y}) *x = arena.vectors(chunk);
    if (!back) return c;
    c.grad_B = arena.floats(chunk * pitch), c.grad_C = arena.floats(chunk * pitch);
    c.grad_rank = arena.floats(chunk * a.rank), c.spread = arena.vectors(chunk * ranks_together);
    return c;
  }

  static vec* cleared(Arena& arena, int64_t size) {
    vec* x = arena.vectors(size);
    std::fill_n(x, size, vec{});
    return x;
  }

  void move(Chunk& c, int64_t batch, int64_t order, int64_t start, bool backwards) const {
    c.order = order, c.start = start;
    c.next = backwards ? (start > 0 ? -chunk : 0) : (start + chunk < a.counts[order] ? chunk : 0);
    c.count = static_cast<int>(std::min<int64_t>(chunk, a.counts[order] - start));
    const int64_t at = batch * a.tables + order * a.steps + start;
    if (a.gaps) c.gaps = a.gaps + at;
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
    if (a.rank) scan::load_columns(a.delta_weight + row * a.rank, a.rank, t.width, 1.0f, t.weight);
    if (a.D) scan::load_columns(a.D + row, 1, t.width, 1.0f, &t.ends.D);
    if (a.delta_bias) scan::load_columns(a.delta_bias + row, 1, t.width, 1.0f, &t.ends.bias);
    if (a.gaps) t.zero_step = scan::activate(t.ends.bias, a.softplus, &t.zero_slope);
    if (!back) return t;
    t.grad_A = cleared(arena, a.states);
    for (vec** x : {&t.u, &t.slope, &t.delta, &t.whole, &t.x, &t.grad_y, &t.grad_x, &t.grad_rate})
      *x = arena.vectors(chunk);
    t.grad_weight = cleared(arena, a.rank);
    t.entering = arena.vectors(a.states);
    return t;
  }

  // Where a tile's states lie at the start of a step's chunk.
  float* noted(const Task& task, int64_t order, const Tile& t, int64_t step) const {
    const int64_t each = (a.steps + a.chunk - 1) / a.chunk;
    const int64_t chunk = (task.batch * a.orders + order) * each + step / a.chunk;
    return a.entering + chunk * a.states * a.channels + t.channel;
  }

  // Call `f` with the address of a task's first row of `x`, a pointer to what its elements are.
  template <class F>
  static void with_rows(const Map& x, const Task& task, int64_t order, const F& f) {
    simd::with_kind(x.kind, [&](auto* element) {
      f(static_cast<decltype(element)>(x.data) + task.batch * x.batch + order * x.order);
    });
  }

  bool first(Table table, int64_t order) const { return a.first[table * a.orders + order]; }

  // Whether rows are added up beside a map, in float32: where it is of half precision and not every row of it is known
  // to be written once. Orders have maps of their own in `places`.
  bool rounded(const Map& x, Table table) const {
    const int32_t* flags = a.first + table * a.orders;
    return x.kind != simd::float32 && std::count(flags, flags + a.orders, 0);
  }

  // The floats of a task's sums beside a map of so many rows.
  int64_t beside(const Map& x, Table table, int64_t rows) const { return rounded(x, table) ? rows * tiles * lanes : 0; }

  // What a task writes of a map; `sums` is room for those beside it.
  Target target(const Map& x, Table table, const Task& task, int64_t order, float* sums) const {
    if (rounded(x, table)) return {x, table, sums, tiles * lanes};
    if (!x.data || x.kind != simd::float32) return {x, table, nullptr, 0};
    return {x, table, static_cast<float*>(x.data) + task.batch * x.batch + order * x.order + task.first, x.cell};
  }

  // Sums are zeros before the first order's, unless that reaches every row.
  void clear(const Target& to, const Task& task, int64_t order, int64_t rows) const {
    if (!to.sums || first(to.table, order)) return;
    float* row = to.sums;
    for (int64_t i = 0; i < rows; ++i, row += to.pitch)
      for (int64_t j = 0; j < task.channels; j += lanes) store_row(vec{}, row + j, task.channels - j);
  }

  // Add a tile's rows of a chunk to those of a map.
  void write(const vec* rows, float factor, const Task& task, const Chunk& c, const int32_t* cells, const Tile& t,
             const Target& to) const {
    const auto put = [&](auto* into, int64_t cell, bool store) {
      scatter(rows, factor, cells, c.next, c.count, t.width, store, into, cell);
    };
    if (to.sums) return put(to.sums + t.channel - task.first, to.pitch, first(to.table, c.order));
    with_rows(to.map, task, c.order, [&](auto* into) { put(into + t.channel, to.map.cell, true); });
  }

  // Round what was added up beside a map into it.
  void round(const Target& from, const Task& task, int64_t order, int64_t rows) const {
    if (!rounded(from.map, from.table)) return;
    with_rows(from.map, task, order, [&](auto* into) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < task.channels; j += lanes)
          store_row(simd::load(from.sums + i * from.pitch + j), into + i * from.map.cell + task.first + j,
                    task.channels - j);
    });
  }

  // What all tiles share of a chunk.
  void read_rows(const Task& task, Chunk& c) const {
    const auto read = [&](const Map& x, int64_t features, int64_t pitch, float* rows) {
      with_rows(x, task, c.order,
                [&](const auto* from) { gather(from, x.cell, c.place, c.count, features, pitch, rows); });
    };
    read(a.B, a.states, pitch, c.B);
    read(a.C, a.states, pitch, c.C);
    if (a.rank) read(a.delta, a.rank, rank_pitch, c.rank);
  }

  // u, delta and their product over a chunk, and the derivative of softplus where there is a place for it.
  void read_tile(const Task& task, const Chunk& c, const Tile& t, vec* u, vec* delta, vec* x, vec* slope) const {
    if (a.rank) multiply_rank(c, t, delta);
    with_rows(a.x, task, c.order, [&](const auto* input) {
      if (a.rank) return read_steps(input, static_cast<const float*>(nullptr), c, t, u, delta, x, slope);
      with_rows(a.delta, task, c.order,
                [&](const auto* full) { read_steps(input, full, c, t, u, delta, x, slope); });
    });
  }

  // One loop, so that cells are fetched while delta is computed, and not all at once.
  template <class Input, class Full>
  void read_steps(const Input* input, const Full* full, const Chunk& c, const Tile& t, vec* u, vec* delta, vec* x,
                  vec* slope) const {
    for (int s = 0; s < c.count; ++s) {
      u[s] = fetch(input + t.channel, a.x.cell, c.read + s, c.next, t.width);
      if (!a.rank) delta[s] = fetch(full + t.channel, a.delta.cell, c.place + s, c.next, t.width);
      delta[s] = scan::activate(delta[s] + t.ends.bias, a.softplus, slope ? slope + s : nullptr);
      x[s] = delta[s] * u[s];
    }
  }

  // The steps that states decay by: with gaps, longer than those that inputs come with, and put into `whole`.
  const vec* decaying(const Chunk& c, const Tile& t, const vec* delta, vec* whole) const {
    if (!a.gaps) return delta;
    for (int s = 0; s < c.count; ++s) whole[s] = delta[s] + c.gaps[s] * t.zero_step;
    return whole;
  }

  // The full delta from the low-rank one.
  void multiply_rank(const Chunk& c, const Tile& t, vec* delta) const {
    int s = 0;
    for (; s + 4 <= c.count; s += 4) {
      vec sum[4] = {};
      const float* rows = c.rank + s * rank_pitch;
      for (int64_t r = 0; r < a.rank; ++r)
        for (int i = 0; i < 4; ++i) sum[i] += t.weight[r] * rows[i * rank_pitch + r];
      for (int i = 0; i < 4; ++i) delta[s + i] = sum[i];
    }
    for (; s < c.count; ++s) {
      delta[s] = vec{};
      for (int64_t r = 0; r < a.rank; ++r) delta[s] += t.weight[r] * c.rank[s * rank_pitch + r];
    }
  }

  void forward(const Task& task, Arena arena) const {
    Chunk c = buffers(arena);
    const Target out = target(a.out, targets, task, 0, arena.floats(beside(a.out, targets, a.rows)));
    clear(out, task, 0, a.rows);
    for (int64_t order = 0; order < a.orders; ++order) {
      Tile side[4];
      Arena rest = arena;
      for (int64_t i = 0; i * lanes < task.channels; ++i) side[i] = tile(task, order, i * lanes, rest);
      for (int64_t start = 0; start < a.counts[order]; start += chunk) {
        move(c, task.batch, order, start, false);
        read_rows(task, c);
        for (int64_t i = 0; i * lanes < task.channels; ++i) {
          const Tile& t = side[i];
          read_tile(task, c, t, c.u, c.delta, c.x, nullptr);
          for (int s = 0; s < c.count; ++s) c.y[s] = t.ends.D * c.u[s];
          const vec* whole = decaying(c, t, c.delta, c.whole);
          const int part = static_cast<int>(a.entering ? a.chunk : chunk);
          for (int s = 0; s < c.count; s += part) {
            if (a.entering)
              scan::store_states(t.state, a.channels, t.width, a.states, noted(task, order, t, start + s));
            scan::forward(std::min(part, c.count - s), a.states, whole + s, c.x + s, t.A,
                          {c.B + s * pitch, pitch, nullptr}, {c.C + s * pitch, pitch, nullptr}, t.state, c.y + s);
          }
          write(c.y, a.scale, task, c, c.target, t, out);
        }
      }
    }
    round(out, task, 0, a.rows);
  }

  // One order; `sums` is the task's own of the rows' gradients, and `sums_x` that of x's gradient, over all orders.
  void backward(const Task& task, int64_t order, Arena arena, float* sums, float* sums_x) const {
    Chunk c = buffers(arena);
    const Target grad_x = target(a.grad_x, reads, task, 0, sums_x);
    float* sums_delta = arena.floats(beside(a.grad_delta, places, a.cells));
    const Target grad_delta = target(a.grad_delta, places, task, order, sums_delta);
    if (order == 0) clear(grad_x, task, 0, a.cells);
    if (!a.rank) clear(grad_delta, task, order, a.cells);
    Tile side[4];
    const int64_t count = (task.channels + lanes - 1) / lanes;
    for (int64_t i = 0; i < count; ++i) side[i] = tile(task, order, i * lanes, arena);
    for (int64_t n = chunks(order) - 1; n >= 0; --n) {
      move(c, task.batch, order, n * chunk, true);
      read_rows(task, c);
      scan::Backward ways[4];
      for (int64_t i = 0; i < count; ++i) ways[i] = prepare(task, c, side[i]);
      scan::backward(c.count, a.states, ways, count, {c.grad_B, pitch}, {c.grad_C, pitch});
      for (int64_t i = 0; i < count; ++i) finish(task, c, side[i], grad_x, grad_delta);
      if (a.rank) retreat_rank(c, side, count);
      float* rows = sums + c.start * a.states;
      copy_rows(c.count, a.states, c.grad_B, pitch, rows);
      copy_rows(c.count, a.states, c.grad_C, pitch, rows + a.counts[order] * a.states);
      rows = sums + a.counts[order] * 2 * a.states + c.start * a.rank;
      std::copy_n(c.grad_rank, c.count * a.rank, rows);
    }
    if (order == a.orders - 1) round(grad_x, task, 0, a.cells);
    if (!a.rank) round(grad_delta, task, order, a.cells);
    for (int64_t i = 0; i < count; ++i) {
      Tile& t = side[i];
      if (a.gaps) t.ends.grad_bias += t.grad_gap * scan::ln_2 * (a.softplus ? t.zero_slope : scan::broadcast(1.0f));
      const int64_t row = (task.batch * a.orders + order) * a.channels + t.channel;
      scan::store_columns(t.grad_A, a.states, t.width, 1.0f, a.grad_A + row * a.states);
      if (a.rank) scan::store_columns(t.grad_weight, a.rank, t.width, 1.0f, a.grad_weight + row * a.rank);
      if (a.D) scan::store_columns(&t.ends.grad_D, 1, t.width, 1.0f, a.grad_D + row);
      if (a.delta_bias) scan::store_columns(&t.ends.grad_bias, 1, t.width, 1.0f, a.grad_bias + row);
    }
  }

  scan::Backward prepare(const Task& task, const Chunk& c, const Tile& t) const {
    scan::load_states(noted(task, c.order, t, c.start), a.channels, t.width, a.states, t.entering);
    read_tile(task, c, t, t.u, t.delta, t.x, t.slope);
    with_rows(a.grad_out, task, c.order, [&](const auto* grad_out) {
      for (int s = 0; s < c.count; ++s) {
        t.grad_y[s] = fetch(grad_out + t.channel, a.grad_out.cell, c.target + s, c.next, t.width) * a.scale;
        t.grad_x[s] = vec{}, t.grad_rate[s] = vec{};
      }
    });
    const vec* whole = decaying(c, t, t.delta, t.whole);
    return {whole, t.x, t.grad_y, t.A, t.entering, t.state, t.grad_x, t.grad_rate, t.grad_A,
            nullptr, nullptr, nullptr, {c.B, pitch, nullptr}, {c.C, pitch, nullptr}};
  }

  void finish(const Task& task, const Chunk& c, Tile& t, const Target& grad_x, const Target& grad_delta) const {
    if (a.gaps) {
      vec grad_gap{};
      for (int s = 0; s < c.count; ++s) grad_gap += c.gaps[s] * t.grad_rate[s];
      t.grad_gap += grad_gap;
    }
    scan::finish(c.count, t.u, t.slope, t.delta, a.softplus, t.grad_y, t.grad_x, t.grad_rate, t.ends);
    write(t.grad_x, 1.0f, task, c, c.read, t, grad_x);
    if (!a.rank) write(t.grad_rate, 1.0f, task, c, c.place, t, grad_delta);
  }

  // The gradients of a low-rank delta's factors from that of the full one, all tiles and a few ranks at a time.
  void retreat_rank(const Chunk& c, const Tile* side, int64_t count) const {
    const auto walk = [&](auto number) {
      int64_t r = 0;
      for (; r + ranks_together <= a.rank; r += ranks_together) retreat_ranks<number, ranks_together>(c, side, r);
      for (; r < a.rank; ++r) retreat_ranks<number, 1>(c, side, r);
    };
    if (count == 4) walk(std::integral_constant<int, 4>{});
    else if (count == 3) walk(std::integral_constant<int, 3>{});
    else if (count == 2) walk(std::integral_constant<int, 2>{});
    else walk(std::integral_constant<int, 1>{});
  }

  template <int number, int width>
  void retreat_ranks(const Chunk& c, const Tile* side, int64_t r) const {
    vec factor[number][width];
    for (int i = 0; i < number; ++i)
      for (int j = 0; j < width; ++j) factor[i][j] = side[i].weight[r + j];
    for (int s = 0; s < c.count; ++s) {
      vec sum[width] = {};
      for (int i = 0; i < number; ++i)
        for (int j = 0; j < width; ++j) sum[j] += factor[i][j] * side[i].grad_rate[s];
      for (int j = 0; j < width; ++j) c.spread[s * width + j] = sum[j];
    }
    alignas(64) float sums[scan::longest_chunk * width];  // whole vectors, though the chunk may be short
    scan::sum_lanes(c.spread, c.count * width, sums);
    for (int i = 0; i < number; ++i)
      for (int j = 0; j < width; ++j) factor[i][j] = side[i].grad_weight[r + j];
    for (int s = 0; s < c.count; ++s) {
      for (int i = 0; i < number; ++i)
        for (int j = 0; j < width; ++j) factor[i][j] += side[i].grad_rate[s] * c.rank[s * rank_pitch + r + j];
      for (int j = 0; j < width; ++j) c.grad_rank[s * a.rank + r + j] = sums[s * width + j];
    }
    for (int i = 0; i < number; ++i)
      for (int j = 0; j < width; ++j) side[i].grad_weight[r + j] = factor[i][j];
  }

  // Rows without their pitch.
  static void copy_rows(int count, int64_t width, const float* from, int64_t pitch, float* rows) {
    if (width == pitch) std::copy_n(from, count * width, rows);
    else
      for (int t = 0; t < count; ++t) std::copy_n(from + t * pitch, width, rows + t * width);
  }

  // The floats of a task's sums over one order: those of B, C and the low-rank delta, (steps, features) each.
  int64_t sums(int64_t steps) const { return steps * (2 * a.states + a.rank); }

  // Add the sums of all parts to those of a map's first, from one float to another.
  void add_parts(float* first, int64_t each, int64_t from, int64_t to) const {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = from; i < to; ++i) first[i] += first[part * each + i];
  }

  // Add the sums of one order, (steps, features), to the cells of a map.
  void add_rows(const float* rows, int64_t batch, int64_t order, int64_t features, float* into) const {
    const int32_t* place = a.place + batch * a.tables + order * a.steps;
    into += (batch * a.cells * a.orders + order) * features;
    for (int64_t t = 0; t < a.counts[order]; ++t, rows += features) {
      if (place[t] < 0) continue;
      float* row = into + place[t] * a.orders * features;
      for (int64_t i = 0; i < features; ++i) row[i] += rows[i];
    }
  }
};

}  // namespace

extern "C" {

EXPORT_SIZE(Map)
EXPORT_SIZE(Arguments)

// Returns 0, or 1 where memory is short.
int selective_scan_2d_forward(const Arguments* arguments) {
  const Job job(*arguments, false);
  const auto run = [&](const auto& task, Arena arena) { job.forward(task, arena); };
  return scan::run_tasks(job, static_cast<int>(arguments->threads), run);
}

int selective_scan_2d_backward(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const Job job(a, true);
  const int threads = static_cast<int>(a.threads);
  const scan::Scratch scratch(job.floats(), threads);
  // A task that takes all orders at once finds its map in the cache; where the sums of all would not fit there, orders
  // go one by one, and the memory serves again.
  const int64_t of_order = job.tasks() * job.sums(a.steps);
  const int64_t together = of_order * a.orders <= most_sums ? a.orders : 1;
  const scan::Scratch sums(of_order * together, 1);
  // A task's sums of x's gradient are needed until its last order.
  const int64_t holders = together > 1 ? threads : std::max<int64_t>(job.tasks(), 1);
  const scan::Scratch sums_x(job.beside(a.grad_x, reads, a.cells), static_cast<int>(holders));
  if (!scratch.data || !sums.data || !sums_x.data) return 1;
  for (int64_t order = 0; order < a.orders; ++order) {
    float* of_tasks = sums.data + order % together * of_order;
    const int64_t each = job.sums(a.counts[order]), of_map = job.parts * each;
    if (order % together == 0) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int64_t i = 0; i < job.tasks(); ++i)
        for (int64_t k = 0; k < together; ++k)
          job.backward(job.task(i), order + k, scratch.of(omp_get_thread_num()),
                       sums.data + k * of_order + i * job.sums(a.counts[order + k]),
                       sums_x.of(together > 1 ? omp_get_thread_num() : i).next);
    }
    const int64_t pieces = (each + piece - 1) / piece;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < a.batch * pieces; ++i) {
      const int64_t from = i % pieces * piece;
      job.add_parts(of_tasks + i / pieces * of_map, each, from, std::min(from + piece, each));
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t batch = 0; batch < a.batch; ++batch) {
      const float* rows = of_tasks + batch * of_map;
      job.add_rows(rows, batch, order, a.states, a.grad_B);
      job.add_rows(rows + a.counts[order] * a.states, batch, order, a.states, a.grad_C);
      if (a.rank) job.add_rows(rows + a.counts[order] * 2 * a.states, batch, order, a.rank, a.grad_rank);
    }
  }
  return 0;
}
}
