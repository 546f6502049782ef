// Powers of two and of e that cost little: of numbers that are never far above 0, as decays and softmax weights have them.
#pragma once

#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace simd {

constexpr float log2_e = 1.44269504088896341f;

#if defined(__AVX512F__) && defined(__AVX512DQ__)

inline vec at_least(vec x, float low) { return (vec)_mm512_maskz_max_ps(0xffff, (__m512)broadcast(low), (__m512)x); }

// x less the nearest multiple of 2^-bits, and 0 for the infinities.
template <int bits>
inline vec remainder(vec x) {
  return (vec)_mm512_maskz_reduce_ps(0xffff, (__m512)x, bits << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline vec scale(vec x, vec exponent) { return (vec)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)exponent); }

// 2^(k / 16) (1 + growth), where `shifted` is x + rounder and k = round(16 x): its last four bits choose a root of two
// from a register, `scale` takes the floor of k / 16. Fewer multiplications than a polynomial on [-1/2, 1/2], on whose
// units the scans wait. Relative error 1.1e-7; decays near 1, which compound over many steps, are rounded once (k = 0).
constexpr float rounder = 786432.0f;  // 1.5 * 2^19

inline vec grow(vec shifted, vec growth) {
  const vec roots = {1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                     1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                     1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};
  const vec root = (vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)shifted, (__m512)roots);
  return scale(root + root * growth, shifted - rounder);
}

inline vec exp2(vec x) {
  const vec rest = remainder<4>(x);
  vec p = rest * 5.550213531e-02f + 2.402342856e-01f;  // minimax on [-1/32, 1/32], error 2e-9
  p = p * rest + 6.931471825e-01f;
  return grow(x + rounder, p * rest);
}

// exp(x) for x <= 0.
inline vec exp_negative(vec x) {
  x = at_least(x, -110.0f);
  const vec shifted = x * log2_e + rounder, whole = shifted - rounder;
  // ln 2 in two parts, of which the first has 14 bits, so that nothing is rounded when `whole` times it is taken off.
  const vec rest = (x - whole * 0.693115234375f) - whole * 3.194618329871e-05f;
  return grow(shifted, (rest * 1.666605771e-01f + 5.000160933e-01f) * (rest * rest) + rest);
}

#else

inline vec at_least(vec x, float low) { return x < low ? broadcast(low) : x; }

// Exponents beyond [-160, 140] make no other float; the sum keeps none of the fraction, and NaN stays.
inline vec round(vec x) {
  x = at_least(x, -160.0f);
  x = x > 140.0f ? broadcast(140.0f) : x;
  const vec rounder = broadcast(12582912.0f);  // 1.5 * 2^23
  return (x + rounder) - rounder;
}

inline vec remainder(vec x) {
  x = at_least(x, -160.0f);
  x = x > 140.0f ? broadcast(140.0f) : x;
  return x - round(x);
}

// Two factors, because 2^-149 and 2^128 are no normal floats.
inline vec scale(vec x, vec exponent) {
  const ivec n = __builtin_convertvector(exponent, ivec), half = n >> 1;
  return x * bits<vec>((half + 127) << 23) * bits<vec>((n - half + 127) << 23);
}

// 2^(fraction + whole), |fraction| <= 1/2: 1 + fraction times a minimax polynomial, so that decays near 1 are rounded
// once. Relative error 2e-9 before rounding, 8e-8 after.
inline vec power_of_two(vec fraction, vec whole) {
  vec p = fraction * 1.535336212e-04f + 1.339887440e-03f;
  p = p * fraction + 9.618437357e-03f;
  p = p * fraction + 5.550332471e-02f;
  p = p * fraction + 2.402264791e-01f;
  p = p * fraction + 6.931472029e-01f;
  p = p * fraction + 1.0f;
  return scale(p, whole);
}

inline vec exp2(vec x) { return power_of_two(remainder(x), round(x)); }

// exp(x) for x <= 0.
inline vec exp_negative(vec x) {
  x = at_least(x, -110.0f);
  const vec whole = round(x * log2_e);
  // ln 2 in two parts, of which the first has 14 bits, so that `whole` times it is exact.
  const vec rest = (x - whole * 0.693115234375f) - whole * 3.194618329871e-05f;
  return power_of_two(rest * log2_e, whole);
}

#endif

}  // namespace simd
