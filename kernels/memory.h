// Scratch memory of the CPU kernels: a stretch for each thread, handed out in pieces that fill whole cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"

namespace memory {

using std::int64_t;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// What is left of one thread's stretch.
struct Arena {
  float* next;
  float* floats(int64_t size) {
    float* piece = next;
    next += round_up(size, 16);
    return piece;
  }
  simd::vec* vectors(int64_t size) { return reinterpret_cast<simd::vec*>(floats(size * simd::lanes)); }
};

struct Scratch {
  int64_t each;
  float* data;  // null where memory is short

  // Room is made for 64 pieces' rounding.
  Scratch(int64_t floats, int threads)
      : each(round_up(floats + 64 * 16, 16)),
        data(static_cast<float*>(std::aligned_alloc(64, each * threads * sizeof(float)))) {}
  ~Scratch() { std::free(data); }
  Arena of(int thread) const { return Arena{data + thread * each}; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace memory
