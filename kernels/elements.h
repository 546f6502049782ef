// Elements of tensors in memory: float32, bfloat16 or float16. Kernels compute on vectors of floats, which are read from
// and written to any of them without a float32 copy of a tensor.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace simd {

// What a tensor's elements are; `native.KINDS` has the same numbers.
enum Kind : std::int64_t { float32, bfloat16, float16 };

struct Bfloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

typedef std::uint32_t uvec __attribute__((vector_size(lanes * sizeof(std::uint32_t))));
typedef std::uint16_t halves __attribute__((vector_size(lanes * sizeof(std::uint16_t))));

// Call `f` with a null pointer to what `kind` stands for, whose type is all that it means.
template <class F>
inline decltype(auto) with_kind(std::int64_t kind, const F& f) {
  if (kind == bfloat16) return f(static_cast<Bfloat16*>(nullptr));
  if (kind == float16) return f(static_cast<Float16*>(nullptr));
  return f(static_cast<float*>(nullptr));
}

inline std::int64_t size_of(std::int64_t kind) { return kind == float32 ? 4 : 2; }

inline uvec wide(const void* p) {
  halves x;
  std::memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, uvec);
}

inline void narrow(void* p, uvec x) {
  const halves y = __builtin_convertvector(x, halves);
  std::memcpy(p, &y, sizeof(y));
}

inline vec load(const Bfloat16* p) { return bits<vec>(wide(p) << 16); }

#if defined(__AVX512F__)

inline vec load(const Float16* p) {
  __m256i x;
  std::memcpy(&x, p, sizeof(x));
  return (vec)_mm512_maskz_cvtph_ps(0xffff, x);
}

inline void store(Float16* p, vec x) {
  const __m256i y = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &y, sizeof(y));
}

#elif defined(__F16C__)

inline vec load(const Float16* p) {
  __m128i x;
  std::memcpy(&x, p, sizeof(x));
  return (vec)_mm256_cvtph_ps(x);
}

inline void store(Float16* p, vec x) {
  const __m128i y = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &y, sizeof(y));
}

#else

inline vec load(const Float16* p) {
  const uvec x = wide(p), size = (x & 0x7fff) << 13;
  const vec normal = bits<vec>(size + 0x38000000u);  // the exponent's bias is 112 more
  const vec denormal = bits<vec>(size + 0x38800000u) - 6.103515625e-05f;
  const vec beyond = bits<vec>(size | 0x7f800000u);
  const vec y = size < 0x00800000u ? denormal : size < 0x0f800000u ? normal : beyond;
  return bits<vec>(bits<uvec>(y) | (x & 0x8000) << 16);
}

inline void store(Float16* p, vec x) {
  const uvec y = bits<uvec>(x), size = y & 0x7fffffff;
  // Added to 0.5, whose last place is that of float16's least numbers, these are rounded by the machine.
  const uvec denormal = bits<uvec>(bits<vec>(size) + 0.5f) - 0x3f000000u;
  const uvec normal = (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13;
  const uvec beyond = size > 0x7f800000u ? uvec{} + 0x7e00 : uvec{} + 0x7c00;
  const uvec z = size < 0x38800000u ? denormal : size < 0x477ff000u ? normal : beyond;
  narrow(p, z | (y >> 16 & 0x8000));
}

#endif

// To the nearest, and to the even one of two.
inline uvec rounded_to_bfloat16(vec x) {
  const uvec y = bits<uvec>(x);
  return x == x ? (y + 0x7fff + (y >> 16 & 1)) >> 16 : y >> 16 | 0x40;
}

inline void store(Bfloat16* p, vec x) { narrow(p, rounded_to_bfloat16(x)); }

// Copy fewer elements than a vector has, in pieces of fixed sizes: moves, where a call would cost more than a vector.
template <class Element>
inline void copy_part(Element* to, const Element* from, std::int64_t count) {
  for (int size = lanes / 2; size > 0; size /= 2)
    if (count >= size) {
      std::memcpy(to, from, size * sizeof(Element));
      to += size, from += size, count -= size;
    }
}

// `count` elements, which may be more than a vector has or none; zeros behind them.
template <class Element>
inline vec load_part(const Element* p, std::int64_t count) {
  if (count >= lanes) return load(p);
  Element part[lanes] = {};
  copy_part(part, p, count);
  return load(part);
}

template <class Element>
inline void store_part(Element* p, vec x, std::int64_t count) {
  if (count >= lanes) return store(p, x);
  Element part[lanes];
  store(part, x);
  copy_part(p, part, count);
}

}  // namespace simd
