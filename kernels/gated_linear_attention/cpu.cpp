// Gated linear attention and its gradients, computed in float32.
//
//   h_t = diag(exp(g_t)) h_(t-1) + k_t^T v_t        (dk, dv)
//   o_t = scale q_t h_t
//
// The recurrence itself is run, a tile of the state in registers over a chunk of tokens: three operations an element
// of the state, which no chunked form beats in float32. A chunk's rows are first copied beside each other (strides,
// padding, exp, half precision to float32), so that the tiles read from the first cache. Every sum has one order,
// whatever the number of threads, and is rounded to half precision once.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../elements.h"
#include "../memory.h"
#include "../simd.h"
#include "../structures.h"

namespace {

using memory::Arena;
using memory::round_up;
using memory::Scratch;
using simd::lanes;
using simd::load;
using simd::load_part;
using simd::store;
using simd::store_part;
using simd::vec;
using std::int64_t;

// Registers hold the state's tile: 16 of 32, or 8 of 16.
constexpr int rows = simd::registers / 4;                   // forward: rows of a tile, of 2 vectors each
constexpr int row_vectors = simd::registers == 32 ? 2 : 1;  // backward: vectors of a tile's columns
constexpr int columns = 4;                                  // backward: columns of a tile
constexpr int forward_chunk = 32;
constexpr int backward_chunk = 32;

}  // namespace

extern "C" {

// A tensor (batch, length, heads, dim) of elements of a `Kind`: strides in elements, the last one 1.
struct View {
  void* data;
  int64_t kind, batch, length, head;
};

struct Sizes {
  int64_t batch, length, heads, dk, dv;
};
}

namespace {

// The tokens of one head from `column` on, in the order in which a direction reads them.
struct Rows {
  char* data;
  int64_t kind, step, length;

  Rows(const View& x, int64_t batch, int64_t head, int64_t column, int64_t length, bool reverse)
      : data(static_cast<char*>(x.data)), kind(x.kind), step(reverse ? -x.length : x.length), length(length) {
    const int64_t first = reverse ? (length - 1) * x.length : 0;
    if (data) data += (batch * x.batch + head * x.head + first + column) * simd::size_of(kind);
  }

  template <class Element>
  Element* at(int64_t token) const {
    return reinterpret_cast<Element*>(data) + token * step;
  }
};

// The last vector of a row begins here, and may overlap the one before.
int64_t last_vector(int64_t width) { return std::max<int64_t>(width - lanes, 0); }

// `gather` and `scatter` of one type of elements. They take all by value: a compiler that cannot tell whether a store
// changes what it is given reads it again after each.

template <class Element>
void gather_wide(const Rows x, int64_t token, int count, int64_t width, int64_t pitch, float factor, float* into) {
  const int64_t last = last_vector(width);
  for (int t = 0; t < count; ++t, into += pitch) {
    const Element* row = x.at<Element>(token + t);
    const int64_t ahead = token + t + count < x.length ? count * x.step : 0;
    for (int64_t i = 0; i < last; i += lanes) {
      __builtin_prefetch(row + ahead + i);
      store(into + i, load(row + i) * factor);
    }
    __builtin_prefetch(row + ahead + last);
    store(into + last, load(row + last) * factor);
    for (int64_t i = width; i < pitch; ++i) into[i] = 0.0f;
  }
}

// Rows of less than a vector. All are copied before the first is read again as a whole, since the machine makes such a
// read wait until what was written in pieces is in memory.
template <class Element>
void gather_narrow(const Rows x, int64_t token, int count, int64_t width, int64_t pitch, float factor, float* into) {
  constexpr int most = std::max(forward_chunk, backward_chunk);
  Element parts[most][lanes] = {};
  for (int t = 0; t < count; ++t) simd::copy_part(parts[t], x.at<Element>(token + t), width);
  for (int t = 0; t < count; ++t, into += pitch) store_part(into, load(parts[t]) * factor, pitch);
}

template <class Element, bool add>
void scatter_as(const float* from, int64_t pitch, int64_t width, float factor, const Rows added, const Rows x,
                int64_t token, int count) {
  const int64_t last = last_vector(width);
  for (int t = 0; t < count; ++t, from += pitch) {
    Element* row = x.at<Element>(token + t);
    const auto sum = [=](int64_t i) {
      const vec y = load(from + i) * factor;
      return add ? load_part(added.at<float>(token + t) + i, width) + y : y;
    };
    const vec end = sum(last);  // before others are written: what is added may be the row itself
    for (int64_t i = 0; i < last; i += lanes) store(row + i, sum(i));
    store_part(row + last, end, width);
  }
}

// Copy `width` elements of `count` rows times `factor`, and zeros up to `pitch`; fetch the next chunk's rows meanwhile:
// they lie too far apart for the machine to foresee them.
void gather(const Rows& x, int64_t token, int count, int64_t width, int64_t pitch, float factor, float* into) {
  simd::with_kind(x.kind, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    (width < lanes ? gather_narrow<Element> : gather_wide<Element>)(x, token, count, width, pitch, factor, into);
  });
}

// Write `count` rows times `factor`, plus those of `added`, in float32, unless it is null. `from` is in scratch, which
// may be read a vector beyond a row.
void scatter(const float* from, int64_t pitch, int64_t width, float factor, const Rows* added, const Rows& x,
             int64_t token, int count) {
  simd::with_kind(x.kind, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    const auto write = added ? scatter_as<Element, true> : scatter_as<Element, false>;
    write(from, pitch, width, factor, added ? *added : x, x, token, count);
  });
}

void exponentiate(float* x, int64_t size) {
  for (int64_t i = 0; i < size; i += lanes) store(x + i, simd::exp(load(x + i)));
}

// Starting a thread costs as much as some 10^5 updates of an element of the state.
int useful_threads(int threads, const Sizes& s, int passes) {
  const int64_t updates = s.batch * s.heads * s.length * s.dk * s.dv * passes;
  return static_cast<int>(std::clamp<int64_t>(updates >> 17, 1, threads));
}

// ---- Forward ---------------------------------------------------------------------------------------------------------

// `rows` rows of the state times `vectors` vectors of its columns, over a chunk: vectors lie along dv.
template <int vectors>
void forward_tile(int count, const float* q, const float* k, const float* decay, int64_t pitch, const float* v,
                  float* out, int64_t v_pitch, float* state, int64_t state_pitch) {
  vec h[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < vectors; ++c) h[r][c] = load(state + r * state_pitch + c * lanes);
  for (int t = 0; t < count; ++t, q += pitch, k += pitch, decay += pitch, v += v_pitch, out += v_pitch) {
    vec value[vectors], sum[vectors];
    for (int c = 0; c < vectors; ++c) value[c] = load(v + c * lanes), sum[c] = load(out + c * lanes);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < vectors; ++c) {
        h[r][c] = h[r][c] * decay[r] + value[c] * k[r];
        sum[c] += h[r][c] * q[r];
      }
    for (int c = 0; c < vectors; ++c) store(out + c * lanes, sum[c]);
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < vectors; ++c) store(state + r * state_pitch + c * lanes, h[r][c]);
}

struct Forward {
  View q, k, v, g[2], out;
  const float* initial;
  float* last;
  Sizes sizes;
  float scale;
  int directions;

  int64_t dk_pitch() const { return round_up(sizes.dk, std::max(rows, lanes)); }
  // Whether the first direction's output waits in float32 for the second's.
  bool keeps() const { return directions == 2 && out.kind != simd::float32; }
  int64_t floats(int64_t width) const {
    const int64_t v_pitch = round_up(width, lanes), kept = keeps() ? sizes.length * v_pitch : 0;
    return 3 * forward_chunk * dk_pitch() + 2 * forward_chunk * v_pitch + dk_pitch() * v_pitch + kept + 7 * 16;
  }

  // Columns [from, from + width) of one head's output.
  void run(int64_t batch, int64_t head, int64_t from, int64_t width, Arena arena) const {
    const int64_t pitch = dk_pitch(), v_pitch = round_up(width, lanes);
    float* queries = arena.floats(forward_chunk * pitch);
    float* keys = arena.floats(forward_chunk * pitch);
    float* decays = arena.floats(forward_chunk * pitch);
    float* values = arena.floats(forward_chunk * v_pitch);
    float* sums = arena.floats(forward_chunk * v_pitch);
    float* state = arena.floats(pitch * v_pitch);
    float* kept = keeps() ? arena.floats(sizes.length * v_pitch) : nullptr;
    for (int direction = 0; direction < directions; ++direction) {
      const bool reverse = direction == 1;
      const auto rows_of = [&](const View& x, int64_t column) {
        return Rows(x, batch, head, column, sizes.length, reverse);
      };
      const Rows query = rows_of(q, 0), key = rows_of(k, 0), gate = rows_of(g[direction], 0), value = rows_of(v, from);
      const Rows output = rows_of(out, from);
      const View kept_view{kept, simd::float32, 0, v_pitch, 0};
      const Rows first_output = kept ? Rows(kept_view, 0, 0, 0, sizes.length, reverse) : output;
      std::fill(state, state + pitch * v_pitch, 0.0f);
      const int64_t first = (batch * sizes.heads + head) * sizes.dk * sizes.dv + from;
      if (initial)
        for (int64_t i = 0; i < sizes.dk; ++i)
          std::copy_n(initial + first + i * sizes.dv, width, state + i * v_pitch);
      for (int64_t token = 0; token < sizes.length; token += forward_chunk) {
        const int count = static_cast<int>(std::min<int64_t>(forward_chunk, sizes.length - token));
        gather(query, token, count, sizes.dk, pitch, scale, queries);
        gather(key, token, count, sizes.dk, pitch, 1.0f, keys);
        gather(gate, token, count, sizes.dk, pitch, 1.0f, decays);
        exponentiate(decays, count * pitch);
        gather(value, token, count, width, v_pitch, 1.0f, values);
        std::fill(sums, sums + count * v_pitch, 0.0f);
        for (int64_t j = 0; j < v_pitch; j += 2 * lanes)
          for (int64_t i = 0; i < sizes.dk; i += rows) {
            const auto tile = j + lanes < v_pitch ? forward_tile<2> : forward_tile<1>;
            tile(count, queries + i, keys + i, decays + i, pitch, values + j, sums + j, v_pitch,
                 state + i * v_pitch + j, v_pitch);
          }
        scatter(sums, v_pitch, width, 1.0f, reverse ? &first_output : nullptr, reverse ? output : first_output, token,
                count);
      }
      if (last)
        for (int64_t i = 0; i < sizes.dk; ++i)
          std::copy_n(state + i * v_pitch, width, last + first + i * sizes.dv);
    }
  }
};

// ---- Backward --------------------------------------------------------------------------------------------------------

template <int... index>
vec pick(vec a, vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, simd::ivec{index...});
#endif
}

// Add neighbouring lanes: in every group of four, a's two sums, then b's.
vec add_pairs(vec a, vec b) {
#if defined(__AVX512F__)
  return pick<0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30>(a, b) +
         pick<1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31>(a, b);
#elif defined(__AVX__)
  return pick<0, 2, 8, 10, 4, 6, 12, 14>(a, b) + pick<1, 3, 9, 11, 5, 7, 13, 15>(a, b);
#else
  return pick<0, 2, 4, 6>(a, b) + pick<1, 3, 5, 7>(a, b);
#endif
}

// Add the sums over the lanes of x[0..3] to p[0..3].
void add_sums(const vec (&x)[4], float* p) {
  const vec z = add_pairs(add_pairs(x[0], x[1]), add_pairs(x[2], x[3]));
  typedef float quad __attribute__((vector_size(16)));
  quad part[lanes / 4], sum;
  std::memcpy(part, &z, sizeof(z));
  std::memcpy(&sum, p, sizeof(sum));
  for (int i = 0; i < lanes / 4; ++i) sum += part[i];
  std::memcpy(p, &sum, sizeof(sum));
}

static_assert(columns % 4 == 0, "add_sums takes four columns");

// One chunk, with its rows in a fixed pitch: vectors lie along dk, so that the gradients of q, k and g need no sums
// over lanes. States are held transposed, a column after the other. The tiles take it by value: a compiler that cannot
// tell whether a store changes these pointers reads them again after each.
struct Chunk {
  int count;
  int64_t pitch, v_pitch;
  float *q, *k, *decay, *to_end, *total, *v, *grad_out;
  float *grad_q, *grad_k, *grad_g, *grad_v, *states;
};

// The state at the chunk's end from that at its start: each key is decayed from its token to the end beforehand.
template <int vectors>
void state_tile(const Chunk c, int64_t column, float* state) {
  vec h[columns][vectors];
  for (int j = 0; j < columns; ++j)
    for (int i = 0; i < vectors; ++i) h[j][i] = load(state + j * c.pitch + i * lanes) * load(c.total + i * lanes);
  const float* k = c.to_end;
  const float* v = c.v + column;
  for (int t = 0; t < c.count; ++t, k += c.pitch, v += c.v_pitch)
    for (int j = 0; j < columns; ++j)
      for (int i = 0; i < vectors; ++i) h[j][i] += load(k + i * lanes) * v[j];
  for (int j = 0; j < columns; ++j)
    for (int i = 0; i < vectors; ++i) store(state + j * c.pitch + i * lanes, h[j][i]);
}

// Forward through the chunk for the states and dq_t = h_t do_t, then back through it with the state's gradient:
//   dh_t = q_t^T do_t + a_(t+1) dh_(t+1),  dk_t = dh_t v_t,  dv_t = k_t dh_t,  dg_t = a_t sum_j (dh_t h_(t-1))
template <int vectors>
void backward_tile(const Chunk c, int64_t column, const float* state, float* grad_state) {
  constexpr int tile = columns * vectors * lanes;
  {
    vec h[columns][vectors];
    for (int j = 0; j < columns; ++j)
      for (int i = 0; i < vectors; ++i) h[j][i] = load(state + j * c.pitch + i * lanes);
    for (int t = 0; t < c.count; ++t) {
      const float* v = c.v + t * c.v_pitch + column;
      const float* grad_out = c.grad_out + t * c.v_pitch + column;
      for (int i = 0; i < vectors; ++i) {
        const int64_t at = t * c.pitch + i * lanes;
        const vec decay = load(c.decay + at), k = load(c.k + at);
        vec grad_q = load(c.grad_q + at);
        for (int j = 0; j < columns; ++j) {
          store(c.states + t * tile + (j * vectors + i) * lanes, h[j][i]);
          h[j][i] = h[j][i] * decay + k * v[j];
          grad_q += h[j][i] * grad_out[j];
        }
        store(c.grad_q + at, grad_q);
      }
    }
  }
  vec d[columns][vectors];
  for (int j = 0; j < columns; ++j)
    for (int i = 0; i < vectors; ++i) d[j][i] = load(grad_state + j * c.pitch + i * lanes);
  for (int t = c.count - 1; t >= 0; --t) {
    const float* v = c.v + t * c.v_pitch + column;
    const float* grad_out = c.grad_out + t * c.v_pitch + column;
    vec grad_v[columns];
    for (int i = 0; i < vectors; ++i) {
      const int64_t at = t * c.pitch + i * lanes;
      const vec q = load(c.q + at), k = load(c.k + at), decay = load(c.decay + at);
      vec grad_k = load(c.grad_k + at), grad_g = load(c.grad_g + at);
      for (int j = 0; j < columns; ++j) {
        d[j][i] += q * grad_out[j];
        grad_k += d[j][i] * v[j];
        grad_v[j] = i ? grad_v[j] + d[j][i] * k : d[j][i] * k;
        d[j][i] *= decay;
        grad_g += d[j][i] * load(c.states + t * tile + (j * vectors + i) * lanes);
      }
      store(c.grad_k + at, grad_k);
      store(c.grad_g + at, grad_g);
    }
    for (int j = 0; j < columns; j += 4)
      add_sums({grad_v[j], grad_v[j + 1], grad_v[j + 2], grad_v[j + 3]}, c.grad_v + t * c.v_pitch + column + j);
  }
  for (int j = 0; j < columns; ++j)
    for (int i = 0; i < vectors; ++i) store(grad_state + j * c.pitch + i * lanes, d[j][i]);
}

struct Backward {
  View grad_out, q, k, v, g[2], grad_q, grad_k, grad_v, grad_g[2];
  const float *initial, *grad_last;
  float* grad_initial;
  Sizes sizes;
  float scale;
  int directions;

  static constexpr int64_t block = row_vectors * lanes;  // rows of the state walked through at a time
  int64_t v_pitch() const { return round_up(sizes.dv, columns); }
  int64_t chunks() const { return (sizes.length + backward_chunk - 1) / backward_chunk; }
  int64_t floats() const {
    return 8 * backward_chunk * block + 3 * backward_chunk * v_pitch() + backward_chunk * block * columns +
           (chunks() + 1) * block * v_pitch() + 15 * 16;
  }

  void run(int64_t batch, int64_t head, Arena arena) const {
    Chunk chunk;
    chunk.pitch = block;
    chunk.v_pitch = v_pitch();
    for (float** rows : {&chunk.q, &chunk.k, &chunk.decay, &chunk.to_end, &chunk.grad_q, &chunk.grad_k, &chunk.grad_g})
      *rows = arena.floats(backward_chunk * block);
    for (float** rows : {&chunk.v, &chunk.grad_out, &chunk.grad_v}) *rows = arena.floats(backward_chunk * v_pitch());
    chunk.total = arena.floats(block);
    chunk.states = arena.floats(backward_chunk * block * columns);
    float* grad_state = arena.floats(block * v_pitch());
    float* states = arena.floats(chunks() * block * v_pitch());
    for (int direction = 0; direction < directions; ++direction)
      for (int64_t from = 0; from < sizes.dk; from += block)
        run_block(chunk, batch, head, direction, from, states, grad_state);
  }

  void read(Chunk& c, const Rows& key, const Rows& value, const Rows& gate, int64_t token, int64_t width) const {
    c.count = static_cast<int>(std::min<int64_t>(backward_chunk, sizes.length - token));
    gather(key, token, c.count, width, c.pitch, 1.0f, c.k);
    gather(value, token, c.count, sizes.dv, c.v_pitch, 1.0f, c.v);
    gather(gate, token, c.count, width, c.pitch, 1.0f, c.decay);
    exponentiate(c.decay, c.count * c.pitch);
  }

  void run_block(Chunk& c, int64_t batch, int64_t head, int direction, int64_t from, float* states,
                 float* grad_state) const {
    const bool reverse = direction == 1;
    const auto rows_of = [&](const View& x, int64_t column) {
      return Rows(x, batch, head, column, sizes.length, reverse);
    };
    const Rows query = rows_of(q, from), key = rows_of(k, from), gate = rows_of(g[direction], from);
    const Rows grad_query = rows_of(grad_q, from), grad_key = rows_of(grad_k, from);
    const Rows grad_gate = rows_of(grad_g[direction], from);
    const Rows value = rows_of(v, 0), grad_output = rows_of(grad_out, 0), grad_value = rows_of(grad_v, 0);
    const int64_t width = std::min(block, sizes.dk - from), size = block * c.v_pitch;
    const bool narrow = width <= lanes;
    const int64_t first = ((batch * sizes.heads + head) * sizes.dk + from) * sizes.dv;

    transpose(initial ? initial + first : nullptr, width, states);
    for (int64_t n = 0; n + 1 < chunks(); ++n) {
      read(c, key, value, gate, n * backward_chunk, width);
      decay_to_end(c);
      float* next = states + (n + 1) * size;
      std::copy_n(states + n * size, size, next);
      for (int64_t j = 0; j < c.v_pitch; j += columns)
        (narrow ? state_tile<1> : state_tile<row_vectors>)(c, j, next + j * c.pitch);
    }

    transpose(grad_last ? grad_last + first : nullptr, width, grad_state);
    for (int64_t n = chunks() - 1; n >= 0; --n) {
      const int64_t token = n * backward_chunk;
      read(c, key, value, gate, token, width);
      gather(query, token, c.count, width, c.pitch, scale, c.q);
      gather(grad_output, token, c.count, sizes.dv, c.v_pitch, 1.0f, c.grad_out);
      for (float* rows : {c.grad_q, c.grad_k, c.grad_g}) std::fill_n(rows, c.count * c.pitch, 0.0f);
      std::fill_n(c.grad_v, c.count * c.v_pitch, 0.0f);
      for (int64_t j = 0; j < c.v_pitch; j += columns)
        (narrow ? backward_tile<1> : backward_tile<row_vectors>)(c, j, states + n * size + j * c.pitch,
                                                                 grad_state + j * c.pitch);
      // These are sums over directions, and that of v over blocks, and float32 therefore.
      scatter(c.grad_q, c.pitch, width, scale, reverse ? &grad_query : nullptr, grad_query, token, c.count);
      scatter(c.grad_k, c.pitch, width, 1.0f, reverse ? &grad_key : nullptr, grad_key, token, c.count);
      scatter(c.grad_v, c.v_pitch, sizes.dv, 1.0f, reverse || from > 0 ? &grad_value : nullptr, grad_value, token,
              c.count);
      scatter(c.grad_g, c.pitch, width, 1.0f, nullptr, grad_gate, token, c.count);
    }
    if (grad_initial)
      for (int64_t i = 0; i < width; ++i)
        for (int64_t j = 0; j < sizes.dv; ++j) grad_initial[first + i * sizes.dv + j] = grad_state[j * c.pitch + i];
  }

  // A block of a state (dk, dv) as columns of `block` rows; zeros where there is none.
  void transpose(const float* from, int64_t width, float* into) const {
    std::fill_n(into, block * v_pitch(), 0.0f);
    if (from)
      for (int64_t i = 0; i < width; ++i)
        for (int64_t j = 0; j < sizes.dv; ++j) into[j * block + i] = from[i * sizes.dv + j];
  }

  static void decay_to_end(Chunk& c) {
    for (int64_t i = 0; i < c.pitch; i += lanes) {
      vec product = simd::broadcast(1.0f);
      for (int t = c.count - 1; t >= 0; --t) {
        store(c.to_end + t * c.pitch + i, load(c.k + t * c.pitch + i) * product);
        product *= load(c.decay + t * c.pitch + i);
      }
      store(c.total + i, product);
    }
  }
};

}  // namespace

extern "C" {

EXPORT_SIZE(View)
EXPORT_SIZE(Sizes)

// Both return 0, or 1 where memory is short. `g_backward` has no data for one direction; states, (batch, heads, dk, dv)
// without gaps, may be null. The gradients of q, k and v are float32; all else that has a view may be of any kind.
int gla_forward(const View* q, const View* k, const View* v, const View* g, const View* g_backward,
                const float* initial, const View* out, float* last, const Sizes* sizes, float scale, int threads) {
  const int directions = g_backward->data ? 2 : 1;
  const Forward job{*q, *k, *v, {*g, *g_backward}, *out, initial, last, *sizes, scale, directions};
  const int64_t heads = sizes->batch * sizes->heads;
  threads = useful_threads(threads, *sizes, directions);
  // Where heads are few, their columns are split, at the tiles' borders, so that no sum changes.
  const int64_t width = heads % threads == 0 || heads >= 4 * threads ? sizes->dv : 2 * lanes;
  const int64_t parts = (sizes->dv + width - 1) / width;
  const Scratch scratch(job.floats(std::min(width, sizes->dv)), threads);
  if (!scratch.data) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t unit = 0; unit < heads * parts; ++unit) {
    const int64_t head = unit / parts, from = unit % parts * width;
    job.run(head / sizes->heads, head % sizes->heads, from, std::min(width, sizes->dv - from),
            scratch.of(omp_get_thread_num()));
  }
  return 0;
}

int gla_backward(const View* grad_out, const float* grad_last, const View* q, const View* k, const View* v,
                 const View* g, const View* g_backward, const float* initial, const View* grad_q, const View* grad_k,
                 const View* grad_v, const View* grad_g, const View* grad_g_backward, float* grad_initial,
                 const Sizes* sizes, float scale, int threads) {
  const int directions = g_backward->data ? 2 : 1;
  const Backward job{*grad_out, *q,      *k,        *v,           {*g, *g_backward}, *grad_q, *grad_k,   *grad_v,
                     {*grad_g, *grad_g_backward}, initial, grad_last, grad_initial, *sizes,  scale,    directions};
  const int64_t heads = sizes->batch * sizes->heads;
  threads = static_cast<int>(std::clamp<int64_t>(heads, 1, useful_threads(threads, *sizes, 3 * directions)));
  const Scratch scratch(job.floats(), threads);
  if (!scratch.data) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t head = 0; head < heads; ++head)
    job.run(head / sizes->heads, head % sizes->heads, scratch.of(omp_get_thread_num()));
  return 0;
}
}
