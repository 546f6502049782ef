// What the selective scans share: a tile of `lanes` channels walks through a chunk of steps, forward and backward.
//
//   h_t = exp(delta_t A) h_(t-1) + x_t B_t,  y_t = sum_n C_t h_t,  x = delta u
//
// Vectors lie along channels, so that nothing is summed over lanes but the gradients of B and C; a step's B and C are
// read as scalars. The states stay in registers over the chunk. Decays are powers of two: A comes times 1 / ln 2.
#pragma once

#include <omp.h>

#include <cstdint>
#include <utility>

#include "../exponentials.h"
#include "../memory.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace scan {

using memory::Arena;
using memory::round_up;
using memory::Scratch;
using simd::broadcast;
using simd::exp2;
using simd::exp_negative;
using simd::lanes;
using simd::log2_e;
using simd::vec;
using std::int64_t;

constexpr float ln_2 = 0.693147180559945f;

constexpr int widest = simd::registers / 2;  // states in registers at a time

// ---- Elementary functions --------------------------------------------------------------------------------------------

// log(1 + exp(x)) = max(x, 0) + log1p(w), w = exp(-|x|): x itself above 20 in float32, as PyTorch has it. log1p(w) is w
// times a minimax polynomial, so that small steps keep their relative accuracy (5e-9 before rounding).
inline vec softplus(vec x, vec w) {
  const vec zero{};
  vec p = w * -3.244023366e-03f + 1.985145419e-02f;
  p = p * w - 5.695951890e-02f;
  p = p * w + 1.060365333e-01f;
  p = p * w - 1.530559165e-01f;
  p = p * w + 1.967593894e-01f;
  p = p * w - 2.495413359e-01f;
  p = p * w + 3.332996241e-01f;
  p = p * w - 4.999990242e-01f;
  p = p * w + 1.0f;
  return p * w + (x > 0.0f ? x : zero);
}

inline vec sigmoid(vec x, vec w) { return (x < 0.0f ? w : broadcast(1.0f)) / (w + 1.0f); }

// exp(-|x|), of which softplus and sigmoid are made.
inline vec falling(vec x) { return exp_negative(x < 0.0f ? x : -x); }

inline vec sigmoid(vec x) { return sigmoid(x, falling(x)); }

// ---- Moving between lanes --------------------------------------------------------------------------------------------

template <int... index>
inline vec shuffle(vec a, vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, simd::ivec{index...});
#endif
}

using every_lane = std::make_integer_sequence<int, lanes>;

// The even blocks of lanes of a and of b in one vector, or the odd ones; within 128 bits where blocks are that small.
// Machines have a single instruction for each.
template <int block, bool odd, int... i>
inline vec blocks(vec a, vec b, std::integer_sequence<int, i...>) {
  constexpr int span = block < 4 ? 4 : lanes;
  constexpr auto from = [](int to) {
    const int beside = to % span / (span / 2) * lanes, place = to % (span / 2) / block * 2 * block + to % block;
    return beside + to / span * span + place + odd * block;
  };
  return shuffle<from(i)...>(a, b);
}

template <int block>
inline void exchange(vec* rows, int distance) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & distance) continue;
    const vec a = rows[i], b = rows[i + distance];
    rows[i] = blocks<block, false>(a, b, every_lane{}), rows[i + distance] = blocks<block, true>(a, b, every_lane{});
  }
}

// Transpose `lanes` vectors. Each step takes a bit of the lane's number to the vector's, where they land swapped in
// pairs, and one back.
inline void transpose(vec* rows) {
  if constexpr (lanes == 16) exchange<8>(rows, 4), exchange<4>(rows, 8);
  if constexpr (lanes == 8) exchange<4>(rows, 4);
  exchange<2>(rows, 1), exchange<1>(rows, 2);
  constexpr auto swapped = [](int i) {
    return (i & 1) << 1 | (i & 2) >> 1 | (lanes == 16 ? (i & 4) << 1 | (i & 8) >> 1 : i & 4);
  };
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
    if (i < swapped(i)) std::swap(rows[i], rows[swapped(i)]);
}

// Add the odd blocks of lanes to the even ones: half of the vectors that are not `done` remain.
template <int block>
inline void add_blocks(vec* x, int distance, int done) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & (distance | done)) continue;
    const vec a = x[i], b = x[i + distance];
    x[i] = blocks<block, false>(a, b, every_lane{}) + blocks<block, true>(a, b, every_lane{});
  }
}

// sums[i] = the sum over the lanes of x[i], for `count` vectors; reads and writes up to a multiple of `lanes`.
inline void sum_lanes(const vec* x, int64_t count, float* sums) {
  for (int64_t from = 0; from < count; from += lanes) {
    vec level[lanes];
    for (int i = 0; i < lanes; ++i) level[i] = x[from + i];
    if constexpr (lanes == 16) add_blocks<8>(level, 4, 0), add_blocks<4>(level, 8, 4);
    if constexpr (lanes == 8) add_blocks<4>(level, 4, 0);
    add_blocks<2>(level, 1, lanes - 4), add_blocks<1>(level, 2, lanes - 3);
    simd::store(sums + from, level[0]);
  }
}

// ---- Tasks -----------------------------------------------------------------------------------------------------------

// Runs `run(task, arena)` for every task of a job, threads side by side. Returns 0, or 1 where memory is short.
template <class Job, class Run>
int run_tasks(const Job& job, int threads, Run run) {
  const Scratch scratch(job.floats(), threads);
  if (!scratch.data) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < job.tasks(); ++i) run(job.task(i), scratch.of(omp_get_thread_num()));
  return 0;
}

// How many tiles of channels one task walks through side by side: they share what is read of B and C and the sums over
// lanes of their gradients. It depends on the sizes alone, so that the sums have one order whatever the threads.
inline int64_t tiles_together(int64_t sequences, int64_t channels) {
  const int64_t tiles = (channels + lanes - 1) / lanes, all = sequences * tiles;
  return all >= 96 ? 4 : all >= 24 ? 3 : all >= 12 ? 2 : 1;
}

// The first `width` of a row's floats, at most a vector; zeros beyond.
inline vec load_row(const float* p, int64_t width) {
  if (width >= lanes) return simd::load(p);
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << width) - 1), p);
#else
  vec x{};
  std::memcpy(&x, p, width * sizeof(float));
  return x;
#endif
}

inline void store_row(vec x, float* p, int64_t width) {
  if (width >= lanes) return simd::store(p, x);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << width) - 1), (__m512)x);
#else
  std::memcpy(p, &x, width * sizeof(float));
#endif
}

// Rows of a tensor (..., states, channels) from and to a tile's vectors, one a state.
inline void load_states(const float* from, int64_t channels, int64_t width, int64_t states, vec* into) {
  for (int64_t n = 0; n < states; ++n) into[n] = load_row(from + n * channels, width);
}

inline void store_states(const vec* from, int64_t channels, int64_t width, int64_t states, float* into) {
  for (int64_t n = 0; n < states; ++n) store_row(from[n], into + n * channels, width);
}

// `width` rows of a matrix (rows, columns) as vectors over rows, one a column, times a factor; zeros beyond the width.
inline void load_columns(const float* matrix, int64_t columns, int64_t width, float factor, vec* into) {
  for (int64_t j = 0; j < columns; ++j) {
    into[j] = vec{};
    for (int64_t i = 0; i < width; ++i) into[j][i] = matrix[i * columns + j] * factor;
  }
}

inline void store_columns(const vec* from, int64_t columns, int64_t width, float factor, float* matrix) {
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < width; ++i) matrix[i * columns + j] = from[j][i] * factor;
}

// ---- A chunk ---------------------------------------------------------------------------------------------------------

// B or C over a chunk: a scalar a step and state, or, constant, a vector a state.
struct Projection {
  const float* rows = nullptr;
  int64_t pitch = 0;
  const vec* constant = nullptr;
};

template <bool constant>
inline vec at(const Projection& p, int64_t step, int64_t state) {
  return constant ? p.constant[state] : broadcast(p.rows[step * p.pitch + state]);
}

template <int width, bool constant_B, bool constant_C>
inline void advance(int count, int64_t n, const vec* delta, const vec* x, const vec* A, const Projection& B,
                    const Projection& C, vec* state, vec* y) {
  vec h[width];
  for (int i = 0; i < width; ++i) h[i] = state[n + i];
  for (int t = 0; t < count; ++t) {
    const vec step = delta[t], in = x[t];
    vec sum[2] = {};
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) {
      h[i] = exp2(step * A[n + i]) * h[i] + in * at<constant_B>(B, t, n + i);
      sum[i % 2] += h[i] * at<constant_C>(C, t, n + i);
    }
    y[t] += sum[0] + sum[1];
  }
  for (int i = 0; i < width; ++i) state[n + i] = h[i];
}

// Carry the states of a tile over `count` steps; add sum_n C h to y.
inline void forward(int count, int64_t states, const vec* delta, const vec* x, const vec* A, const Projection& B,
                    const Projection& C, vec* state, vec* y) {
  const auto walk = [&](auto function, int64_t n) { function(count, n, delta, x, A, B, C, state, y); };
  int64_t n = 0;
  if (B.constant || C.constant) {
    for (; n < states; ++n) {
      if (!B.constant) walk(advance<1, false, true>, n);
      else if (C.constant) walk(advance<1, true, true>, n);
      else walk(advance<1, true, false>, n);
    }
    return;
  }
  for (; n + widest <= states; n += widest) walk(advance<widest, false, false>, n);
  for (; n + 4 <= states; n += 4) walk(advance<4, false, false>, n);
  for (; n < states; ++n) walk(advance<1, false, false>, n);
}

constexpr int longest_chunk = 64;

// A tile's backward pass through a chunk. Everything but the first line is added to.
struct Backward {
  const vec *delta, *x, *grad_y, *A, *entering;  // the last: (states,)
  vec *grad_state;            // (states,), of the state leaving the chunk, and on return of that entering it
  vec *grad_x, *grad_rate;    // (steps,); the rate is of log2(decay) / A
  vec *grad_A;                // (states,), of A itself
  vec *grad_B, *grad_C;       // (states,), of constant ones
  vec *y;                     // (steps,), or null
  Projection B, C;
};

// The gradients of B and C over a chunk, (steps, width) for some of the states, not yet summed over lanes.
template <int width>
struct Spread {
  vec B[longest_chunk][width], C[longest_chunk][width];
};

// The first tile fills `spread`, the next ones add to it.
template <int width, bool constant_B, bool constant_C, bool first>
inline void retreat(int count, int64_t n, const Backward& c, Spread<width>& spread) {
  // `left` is decay times the state before. The decay behind the end makes the last step like any other.
  vec decay[longest_chunk + 1][width], left[longest_chunk][width];
  vec h[width], grad_C[width] = {};
  for (int i = 0; i < width; ++i) h[i] = c.entering[n + i], decay[count][i] = broadcast(1.0f);
  for (int t = 0; t < count; ++t) {
    const vec step = c.delta[t], in = c.x[t], grad_y = c.grad_y[t];
#pragma GCC unroll 4
    for (int i = 0; i < width; ++i) {
      decay[t][i] = exp2(step * c.A[n + i]);
      left[t][i] = decay[t][i] * h[i];
      h[i] = in * at<constant_B>(c.B, t, n + i) + left[t][i];
      if (constant_C) grad_C[i] += grad_y * h[i];
      else if (first) spread.C[t][i] = grad_y * h[i];
      else spread.C[t][i] += grad_y * h[i];
    }
    if (c.y) {
      vec sum{};
      for (int i = 0; i < width; ++i) sum += h[i] * at<constant_C>(c.C, t, n + i);
      c.y[t] += sum;
    }
  }
  // Sums over time are taken chunk by chunk: a long one would lose the last digits.
  vec grad[width], grad_A[width] = {}, grad_B[width] = {};
  for (int i = 0; i < width; ++i) grad[i] = c.grad_state[n + i];
  for (int t = count - 1; t >= 0; --t) {
    const vec step = c.delta[t], in = c.x[t], grad_y = c.grad_y[t];
    vec grad_x = c.grad_x[t], grad_rate = c.grad_rate[t];
#pragma GCC unroll 4
    for (int i = 0; i < width; ++i) {
      // One operation from step to step: a recurrence over few states waits for nothing else.
      grad[i] = decay[t + 1][i] * grad[i] + grad_y * at<constant_C>(c.C, t, n + i);
      if (constant_B) grad_B[i] += in * grad[i];
      else if (first) spread.B[t][i] = in * grad[i];
      else spread.B[t][i] += in * grad[i];
      grad_x += grad[i] * at<constant_B>(c.B, t, n + i);
      const vec through = grad[i] * left[t][i];
      grad_rate += through * c.A[n + i];
      grad_A[i] += through * step;
    }
    c.grad_x[t] = grad_x, c.grad_rate[t] = grad_rate;
  }
  for (int i = 0; i < width; ++i) {
    c.grad_state[n + i] = decay[0][i] * grad[i], c.grad_A[n + i] += grad_A[i];
    if (constant_B) c.grad_B[n + i] += grad_B[i];
    if (constant_C) c.grad_C[n + i] += grad_C[i];
  }
}

// Rows of floats, one a step.
struct Rows {
  float* data;
  int64_t pitch;
};

// Sum a spread gradient over its lanes, into rows of all states.
template <int width>
inline void gather_sums(int count, const vec (*spread)[width], int64_t n, Rows rows) {
  alignas(64) float sums[longest_chunk * width];  // whole vectors, though the chunk may be short
  sum_lanes(&spread[0][0], count * width, sums);
  for (int t = 0; t < count; ++t) std::memcpy(rows.data + t * rows.pitch + n, sums + t * width, width * sizeof(float));
}

template <int width, bool constant_B, bool constant_C>
inline void retreat(int count, int64_t n, const Backward* tiles, int64_t number, Rows grad_B, Rows grad_C) {
  Spread<width> spread;
  retreat<width, constant_B, constant_C, true>(count, n, tiles[0], spread);
  for (int64_t i = 1; i < number; ++i) retreat<width, constant_B, constant_C, false>(count, n, tiles[i], spread);
  if (!constant_B) gather_sums(count, spread.B, n, grad_B);
  if (!constant_C) gather_sums(count, spread.C, n, grad_C);
}

// Tiles that share B and C take a chunk back side by side, a few states at a time: what is kept of these stays in the
// first cache. grad_B and grad_C, rows of states, are the sums over the tiles' channels, unless constant.
inline void backward(int count, int64_t states, const Backward* tiles, int64_t number, Rows grad_B, Rows grad_C) {
  const auto walk = [&](auto function, int64_t n) { function(count, n, tiles, number, grad_B, grad_C); };
  int64_t n = 0;
  if (tiles->B.constant || tiles->C.constant) {
    for (; n < states; ++n) {
      if (!tiles->B.constant) walk(retreat<1, false, true>, n);
      else if (tiles->C.constant) walk(retreat<1, true, true>, n);
      else walk(retreat<1, true, false>, n);
    }
    return;
  }
  for (; n + 4 <= states; n += 4) walk(retreat<4, false, false>, n);
  for (; n < states; ++n) walk(retreat<1, false, false>, n);
}

// softplus(delta) if asked for, and its derivative where there is a place for it.
inline vec activate(vec delta, bool through_softplus, vec* slope) {
  if (!through_softplus) return delta;
  const vec w = falling(delta);
  if (slope) *slope = sigmoid(delta, w);
  return softplus(delta, w);
}

// The end of a tile's backward pass: grad_x, of delta u, becomes the gradient of u, and grad_rate that of delta before the
// bias and the softplus.
struct Ends {
  vec D, bias, grad_D, grad_bias;
};

inline void finish(int count, const vec* u, const vec* slope, const vec* delta, bool through_softplus,
                   const vec* grad_y, vec* grad_x, vec* grad_rate, Ends& ends) {
  vec grad_bias{}, grad_D{};
  for (int t = 0; t < count; ++t) {
    vec grad_delta = grad_rate[t] * ln_2 + grad_x[t] * u[t];
    if (through_softplus) grad_delta *= slope[t];
    grad_bias += grad_delta;
    grad_D += grad_y[t] * u[t];
    grad_x[t] = grad_x[t] * delta[t] + grad_y[t] * ends.D;
    grad_rate[t] = grad_delta;
  }
  ends.grad_bias += grad_bias;
  ends.grad_D += grad_D;
}

}  // namespace scan
