// The selective scan and its gradients, computed in float32, on tensors (batch, dim, length) of any strides.
//
// A task is a few tiles of channels of one sequence. A chunk of each input, of whatever type, is brought into vectors
// of floats over channels (transposed where time is dense), so that everything is read and written once. The forward
// pass notes the state at each chunk's start for the backward pass, which goes through the chunks from the last, all
// tiles of a task side by side.
#include <algorithm>
#include <cstring>

#include "../structures.h"
#include "scan.h"

namespace {

using scan::Arena;
using scan::lanes;
using scan::vec;
using std::int64_t;

constexpr int forward_chunk = 64;  // a multiple of the backward pass's

}  // namespace

extern "C" {

// A tensor (batch, channels, time): strides in elements, and what these are, a simd::Kind; no data where an option is
// not given.
struct Signal {
  void* data;
  int64_t batch, channel, time, kind;
};

// B or C, (batch, groups, states, time); or, where constant, floats (channels, states) without gaps.
struct Input {
  void* data;
  int64_t batch, group, state, time, kind, constant;
};

struct Arguments {
  Signal u, delta, z, gap, grad_out, out, grad_u, grad_delta, grad_z, grad_gap;
  Input B, C;
  const float *A, *D, *delta_bias, *grad_state;
  // The gradients of B and C are (parts, batch, groups, states, time), to be summed over the parts of a group's channels
  // that tasks walk through; those of parameters, constant B and C among them, have a leading batch axis.
  // `entering`, (batch, chunks, states, dim): the states at the starts of chunks, noted by the forward pass where there is
  // a place for them; the backward pass needs them.
  float *state, *entering, *grad_A, *grad_B, *grad_C, *grad_D, *grad_delta_bias;
  int64_t batch, dim, length, states, groups, chunk, softplus, threads;  // chunk: of the backward pass
};
}

namespace {

// Read `count` steps of `width` channels as rows of `lanes`, zeros beyond the width, and fetch what lies `ahead` steps
// further meanwhile: so many rows, so far apart, are not foreseen by the machine.
template <class Element>
void load_block(const Element* p, int64_t channel, int64_t time, int width, int count, int ahead, int64_t pitch,
                float* rows) {
  if (time == 1) {
    for (int t = 0; t < count; t += lanes) {
      const int steps = std::min(lanes, count - t);
      vec square[lanes];
      if (width == lanes && steps == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = simd::load(p + i * channel + t);
      } else {
        for (int i = 0; i < lanes; ++i) square[i] = i < width ? simd::load_part(p + i * channel + t, steps) : vec{};
      }
      for (int i = 0; i < width; ++i) __builtin_prefetch(p + i * channel + t + ahead);
      scan::transpose(square);
      if (steps == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) simd::store(rows + (t + i) * pitch, square[i]);
      } else {
        for (int i = 0; i < steps; ++i) simd::store(rows + (t + i) * pitch, square[i]);
      }
    }
  } else {
    for (int t = 0; t < count; ++t) {
      const Element* from = p + t * time;
      float* row = rows + t * pitch;
      if (channel == 1) {
        simd::store(row, scan::load_row(from, width));
        __builtin_prefetch(from + ahead * time);
      } else {
        scan::load_elements(lanes, [&](int i) { return i < width ? from[i * channel] : Element{}; }, row);
      }
    }
  }
}

// Write rows of `lanes` to `count` steps of `width` channels; time is dense.
template <class Element>
void store_block(const float* rows, int64_t pitch, int width, int count, Element* p, int64_t channel) {
  for (int t = 0; t < count; t += lanes) {
    const int steps = std::min(lanes, count - t);
    vec square[lanes];
    if (width == lanes && steps == lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) square[i] = simd::load(rows + (t + i) * pitch);
      scan::transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) simd::store(p + i * channel + t, square[i]);
    } else {
      for (int i = 0; i < lanes; ++i) square[i] = i < steps ? simd::load(rows + (t + i) * pitch) : vec{};
      scan::transpose(square);
      for (int i = 0; i < width; ++i) simd::store_part(p + i * channel + t, square[i], steps);
    }
  }
}

// The channels [first, first + channels) of one sequence, all of one group, and what lies beside them.
struct Task {
  int64_t batch, group, part, first, channels;
};

struct Tile {
  int64_t channel;
  int width;
  vec *A, *B, *C, *state, *entering, *grad_A, *grad_B, *grad_C;
  vec *u, *slope, *delta, *whole, *x, *y, *grad_y, *grad_x, *grad_rate;  // of a chunk of the backward pass
  scan::Ends ends;
};

struct Job {
  const Arguments& a;
  bool back;
  int chunk;
  int64_t tiles, parts, pitch;

  Job(const Arguments& arguments, bool back)
      : a(arguments), back(back), chunk(back ? static_cast<int>(a.chunk) : forward_chunk) {
    const int64_t channels = a.dim / a.groups;
    tiles = scan::tiles_together(a.batch * a.groups, channels);
    parts = (channels + tiles * lanes - 1) / (tiles * lanes);
    pitch = a.states == 1 ? 1 : scan::round_up(a.states, lanes);
  }

  int64_t tasks() const { return a.batch * a.groups * parts; }
  int64_t chunks() const { return (a.length + a.chunk - 1) / a.chunk; }

  // Where a tile's states lie at the start of a step's chunk.
  float* noted(const Task& task, const Tile& t, int64_t step) const {
    return a.entering + (task.batch * chunks() + step / a.chunk) * a.states * a.dim + t.channel;
  }

  int64_t floats() const {
    const int64_t common = 2 * chunk * pitch + (4 * chunk + 4 * tiles * a.states) * lanes;
    const int64_t rest = tiles * (4 * a.states + 9 * chunk) * lanes + 2 * chunk * pitch;
    return common + (back ? rest : 0);
  }

  Task task(int64_t number) const {
    const int64_t channels = a.dim / a.groups, sequence = number / parts, part = number % parts;
    const int64_t from = part * tiles * lanes, group = sequence % a.groups;
    return {sequence / a.groups, group, part, group * channels + from, std::min(tiles * lanes, channels - from)};
  }

  Tile tile(const Task& task, int64_t from, Arena& arena) const {
    Tile t{};
    t.channel = task.first + from;
    t.width = static_cast<int>(std::min<int64_t>(lanes, task.channels - from));
    t.A = arena.vectors(a.states), t.state = arena.vectors(a.states);
    scan::load_columns(a.A + t.channel * a.states, a.states, t.width, scan::log2_e, t.A);
    std::fill_n(t.state, a.states, vec{});
    const auto constant = [&](const Input& input) -> vec* {
      vec* columns = arena.vectors(a.states);
      if (!input.constant) return nullptr;
      const float* first = static_cast<const float*>(input.data);
      scan::load_columns(first + t.channel * a.states, a.states, t.width, 1.0f, columns);
      return columns;
    };
    t.B = constant(a.B), t.C = constant(a.C);
    if (a.D) scan::load_columns(a.D + t.channel, 1, t.width, 1.0f, &t.ends.D);
    if (a.delta_bias) scan::load_columns(a.delta_bias + t.channel, 1, t.width, 1.0f, &t.ends.bias);
    return t;
  }

  // Call `f` with the address of a tile's chunk of `x`, a pointer to what its elements are.
  template <class F>
  static void with_chunk(const Signal& x, const Task& task, const Tile& tile, int64_t start, const F& f) {
    simd::with_kind(x.kind, [&](auto* element) {
      f(static_cast<decltype(element)>(x.data) + task.batch * x.batch + tile.channel * x.channel + start * x.time);
    });
  }

  void read(const Signal& x, const Task& task, const Tile& tile, int64_t start, int count, int ahead,
            vec* into) const {
    with_chunk(x, task, tile, start, [&](const auto* from) {
      load_block(from, x.channel, x.time, tile.width, count, ahead, lanes, reinterpret_cast<float*>(into));
    });
  }

  // The steps that states decay by: with gaps, longer than those that inputs come with, and put into `whole`.
  const vec* decaying(const Task& task, const Tile& tile, int64_t start, int count, int ahead, const vec* delta,
                      vec* whole) const {
    if (!a.gap.data) return delta;
    read(a.gap, task, tile, start, count, ahead, whole);
    for (int s = 0; s < count; ++s) whole[s] += delta[s];
    return whole;
  }

  void write(const vec* from, const Task& task, const Tile& tile, int64_t start, int count, const Signal& x) const {
    with_chunk(x, task, tile, start, [&](auto* into) {
      store_block(reinterpret_cast<const float*>(from), lanes, tile.width, count, into, x.channel);
    });
  }

  // Fetch where a chunk is going to be written, for the machine does not foresee that either.
  void expect(const Signal& x, const Task& task, const Tile& tile, int64_t start) const {
    const int64_t first = task.batch * x.batch + tile.channel * x.channel + start, size = simd::size_of(x.kind);
    const char* into = static_cast<const char*>(x.data) + first * size;
    for (int i = 0; i < tile.width; ++i) __builtin_prefetch(into + i * x.channel * size, 1);
  }

  // A chunk of B or C as rows of states; `ahead` as above.
  void read(const Input& x, const Task& task, int64_t start, int count, int ahead, float* rows) const {
    if (x.constant) return;
    simd::with_kind(x.kind, [&](auto* element) {
      const auto* from = static_cast<decltype(element)>(x.data) + task.batch * x.batch + task.group * x.group;
      from += start * x.time;
      if (a.states == 1) return scan::load_elements(count, [&](int t) { return from[t * x.time]; }, rows);
      for (int64_t n = 0; n < a.states; n += lanes) {
        const int width = static_cast<int>(std::min<int64_t>(lanes, a.states - n));
        load_block(from + n * x.state, x.state, x.time, width, count, ahead, pitch, rows + n);
      }
    });
  }

  void forward(const Task& task, Arena arena) const {
    Tile side[4];
    for (int64_t i = 0; i * lanes < task.channels; ++i) side[i] = tile(task, i * lanes, arena);
    float *B = arena.floats(chunk * pitch), *C = arena.floats(chunk * pitch);
    vec *u = arena.vectors(chunk), *delta = arena.vectors(chunk), *y = arena.vectors(chunk);
    vec* z = arena.vectors(chunk);
    for (int64_t start = 0; start < a.length; start += chunk) {
      const int count = static_cast<int>(std::min<int64_t>(chunk, a.length - start));
      read(a.B, task, start, count, chunk, B);
      read(a.C, task, start, count, chunk, C);
      for (int64_t i = 0; i * lanes < task.channels; ++i) {
        const Tile& t = side[i];
        read(a.u, task, t, start, count, chunk, u);
        read(a.delta, task, t, start, count, chunk, delta);
        for (int s = 0; s < count; ++s) {
          delta[s] = scan::activate(delta[s] + t.ends.bias, a.softplus, nullptr);
          y[s] = t.ends.D * u[s], u[s] *= delta[s];
        }
        const vec* whole = decaying(task, t, start, count, chunk, delta, z);
        const int part = static_cast<int>(a.entering ? a.chunk : chunk);
        for (int s = 0; s < count; s += part) {
          if (a.entering) scan::store_states(t.state, a.dim, t.width, a.states, noted(task, t, start + s));
          scan::forward(std::min(part, count - s), a.states, whole + s, u + s, t.A, {B + s * pitch, pitch, t.B},
                        {C + s * pitch, pitch, t.C}, t.state, y + s);
        }
        if (a.z.data) {
          read(a.z, task, t, start, count, chunk, z);
          for (int s = 0; s < count; ++s) y[s] *= z[s] * scan::sigmoid(z[s]);
        }
        write(y, task, t, start, count, a.out);
      }
    }
    if (a.state)
      for (int64_t i = 0; i * lanes < task.channels; ++i) {
        float* into = a.state + (task.batch * a.dim + side[i].channel) * a.states;
        scan::store_columns(side[i].state, a.states, side[i].width, 1.0f, into);
      }
  }

  void backward(const Task& task, Arena arena) const {
    const int64_t count_tiles = (task.channels + lanes - 1) / lanes, states = a.states;
    Tile side[4];
    for (int64_t i = 0; i < count_tiles; ++i) {
      Tile& t = side[i] = tile(task, i * lanes, arena);
      for (vec** x : {&t.grad_A, &t.grad_B, &t.grad_C}) std::fill_n(*x = arena.vectors(states), states, vec{});
      for (vec** x : {&t.u, &t.slope, &t.delta, &t.whole, &t.x, &t.y, &t.grad_y, &t.grad_x, &t.grad_rate})
        *x = arena.vectors(chunk);
      t.entering = arena.vectors(states);
    }
    float *B = arena.floats(chunk * pitch), *C = arena.floats(chunk * pitch);
    float *grad_B = arena.floats(chunk * pitch), *grad_C = arena.floats(chunk * pitch);

    for (int64_t i = 0; i < count_tiles; ++i) {
      Tile& t = side[i];
      const int64_t at = (task.batch * a.dim + t.channel) * states;
      if (a.grad_state) scan::load_columns(a.grad_state + at, states, t.width, 1.0f, t.state);
      else std::fill_n(t.state, states, vec{});
    }
    for (int64_t n = chunks() - 1; n >= 0; --n) {
      const int64_t start = n * chunk;
      const int count = static_cast<int>(std::min<int64_t>(chunk, a.length - start));
      read(a.B, task, start, count, -chunk, B);
      read(a.C, task, start, count, -chunk, C);
      scan::Backward ways[4];
      for (int64_t i = 0; i < count_tiles; ++i) {
        const Tile& t = side[i];
        read(a.u, task, t, start, count, -chunk, t.u);
        read(a.delta, task, t, start, count, -chunk, t.delta);
        read(a.grad_out, task, t, start, count, -chunk, t.grad_y);
        for (int s = 0; s < count; ++s) {
          t.delta[s] = scan::activate(t.delta[s] + t.ends.bias, a.softplus, t.slope + s);
          t.x[s] = t.delta[s] * t.u[s], t.grad_x[s] = vec{}, t.grad_rate[s] = vec{};
        }
        expect(a.grad_u, task, t, start);
        expect(a.grad_delta, task, t, start);
        scan::load_states(noted(task, t, start), a.dim, t.width, states, t.entering);
        if (a.z.data) open(task, t, start, count);
        const vec* whole = decaying(task, t, start, count, -chunk, t.delta, t.whole);
        ways[i] = {whole, t.x, t.grad_y, t.A, t.entering, t.state, t.grad_x, t.grad_rate, t.grad_A,
                   t.grad_B, t.grad_C, a.z.data ? t.y : nullptr, {B, pitch, t.B}, {C, pitch, t.C}};
      }
      scan::backward(count, states, ways, count_tiles, {grad_B, pitch}, {grad_C, pitch});
      for (int64_t i = 0; i < count_tiles; ++i) {
        Tile& t = side[i];
        if (a.z.data) close(task, t, start, count);
        if (a.gap.data) {
          for (int s = 0; s < count; ++s) t.whole[s] = t.grad_rate[s] * scan::ln_2;
          write(t.whole, task, t, start, count, a.grad_gap);
        }
        scan::finish(count, t.u, t.slope, t.delta, a.softplus, t.grad_y, t.grad_x, t.grad_rate, t.ends);
        write(t.grad_x, task, t, start, count, a.grad_u);
        write(t.grad_rate, task, t, start, count, a.grad_delta);
      }
      if (!a.B.constant) write_rows(task, start, count, grad_B, a.grad_B);
      if (!a.C.constant) write_rows(task, start, count, grad_C, a.grad_C);
    }

    for (int64_t i = 0; i < count_tiles; ++i) {
      const Tile& t = side[i];
      const int64_t channel = task.batch * a.dim + t.channel;
      scan::store_columns(t.grad_A, states, t.width, 1.0f, a.grad_A + channel * states);
      if (a.B.constant) scan::store_columns(t.grad_B, states, t.width, 1.0f, a.grad_B + channel * states);
      if (a.C.constant) scan::store_columns(t.grad_C, states, t.width, 1.0f, a.grad_C + channel * states);
      if (a.D) scan::store_columns(&t.ends.grad_D, 1, t.width, 1.0f, a.grad_D + channel);
      if (a.delta_bias) scan::store_columns(&t.ends.grad_bias, 1, t.width, 1.0f, a.grad_delta_bias + channel);
    }
  }

  // The gradient before the gate, and the skip of y. `close` needs the gradient of the output and the gate again: both
  // are read a second time, which is cheaper than to keep them.
  void open(const Task& task, const Tile& t, int64_t start, int count) const {
    read(a.z, task, t, start, count, -chunk, t.y);
    for (int s = 0; s < count; ++s) {
      t.grad_y[s] *= t.y[s] * scan::sigmoid(t.y[s]);
      t.y[s] = t.ends.D * t.u[s];
    }
  }

  // The gradient of z from y, in its place.
  void close(const Task& task, const Tile& t, int64_t start, int count) const {
    vec z[scan::longest_chunk], grad_out[scan::longest_chunk];
    read(a.z, task, t, start, count, 0, z);
    read(a.grad_out, task, t, start, count, 0, grad_out);
    for (int s = 0; s < count; ++s) {
      const vec opening = scan::sigmoid(z[s]);
      t.y[s] *= grad_out[s] * opening * (1.0f + z[s] * (1.0f - opening));
    }
    write(t.y, task, t, start, count, a.grad_z);
  }

  // Write the gradient of B or C over a chunk, summed over the task's channels.
  void write_rows(const Task& task, int64_t start, int count, const float* rows, float* into) const {
    into += ((task.part * a.batch + task.batch) * a.groups + task.group) * a.states * a.length + start;
    if (a.states == 1) {
      std::copy_n(rows, count, into);
      return;
    }
    for (int64_t n = 0; n < a.states; n += lanes) {
      const int width = static_cast<int>(std::min<int64_t>(lanes, a.states - n));
      store_block(rows + n, pitch, width, count, into + n * a.length, a.length);
    }
  }
};

}  // namespace

extern "C" {

EXPORT_SIZE(Signal)
EXPORT_SIZE(Input)
EXPORT_SIZE(Arguments)

// The number of parts that the gradients of B and C come in.
int64_t selective_scan_parts(const Arguments* arguments) { return Job(*arguments, true).parts; }

// Returns 0, or 1 where memory is short.
int selective_scan_forward(const Arguments* arguments) {
  const Job job(*arguments, false);
  const auto run = [&](const auto& task, Arena arena) { job.forward(task, arena); };
  return scan::run_tasks(job, static_cast<int>(arguments->threads), run);
}

int selective_scan_backward(const Arguments* arguments) {
  const Job job(*arguments, true);
  const auto run = [&](const auto& task, Arena arena) { job.backward(task, arena); };
  return scan::run_tasks(job, static_cast<int>(arguments->threads), run);
}
}
