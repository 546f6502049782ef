// What the CPU kernels share: vectors of floats as wide as the machine's, and an exponential on them.
//
// The types are the vector extensions of GCC and Clang, so that no target's intrinsics are needed; no file that
// includes this one needs a header of torch's.
#pragma once

#include <cstdint>
#include <cstring>

namespace simd {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

// Vector registers that a loop can hold its sums in.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int registers = 32;
#else
constexpr int registers = 16;
#endif

typedef float vec __attribute__((vector_size(lanes * sizeof(float))));
typedef std::int32_t ivec __attribute__((vector_size(lanes * sizeof(std::int32_t))));

inline vec load(const float* p) {
  vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof(x)); }

inline vec broadcast(float x) { return x - vec{}; }  // not `vec{} + x`, which would turn -0 into 0

template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// exp(x) for every float: 0 and infinity beyond the range, denormal results, NaN for NaN; relative error below 1e-7
// for normal results.
//
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2. ln 2 is taken off in two parts, of which the first has
// 14 bits, so that n times it is exact. 2^n is applied as two factors, because 2^-150 and 2^128 are no normal floats.
inline vec exp(vec x) {
  const vec low = broadcast(-104.0f), high = broadcast(89.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vec rounder = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds, and leaves n in the low bits
  const vec shifted = x * 1.44269504088896341f + rounder;
  const vec whole = shifted - rounder;
  vec r = x - whole * 0.693115234375f;
  r = r - whole * 3.194618329871e-05f;
  // Minimax on the interval, relative error 4.4e-9 with the coefficients as floats.
  vec p = r * 1.3814467238e-03f + 8.3687808365e-03f;
  p = p * r + 4.1668392718e-02f;
  p = p * r + 1.6666519642e-01f;
  p = p * r + 4.9999994040e-01f;
  p = p * (r * r) + r + 1.0f;
  const ivec n = bits<ivec>(shifted) - bits<ivec>(rounder);
  const ivec half = n >> 1;
  return p * bits<vec>((half + 127) << 23) * bits<vec>((n - half + 127) << 23);
}

}  // namespace simd
