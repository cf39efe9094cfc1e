// What products of every kind share: the sizes of blocks, sums over lanes, prefetching.
//
// Included by kernel.cc alone.
#pragma once

#include "kernel.h"
#include "native/simd.h"

namespace jaxserve {
namespace ISA_NAMESPACE {

// Rows of x and of the matrix whose products are kept in registers.
#if defined(ISA_AVX512)
constexpr int kXRows = 6, kWRows = 4;
#else
constexpr int kXRows = 2, kWRows = 4;
#endif

// Sums over the lanes of each of kLanes vectors: result[i] is that of the i-th, with i's bits read
// backwards. Each pass adds the halves of two vectors and leaves them interleaved.
JAXSERVE_INLINE Vec SumsOf(Vec (&vectors)[kLanes]) {
#pragma GCC unroll 8
  for (int count = kLanes / 2; count > 0; count /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) {
      const Vec a = vectors[2 * i], b = vectors[2 * i + 1];
      vectors[i] = JAXSERVE_LOW(a, b) + JAXSERVE_HIGH(a, b);
    }
  }
  return vectors[0];
}

constexpr int BitsBackwards(int i) {
  int result = 0;
  for (int bit = 1, mirror = kLanes / 2; bit < kLanes; bit *= 2, mirror /= 2) {
    if (i & bit) result |= mirror;
  }
  return result;
}

// Writes the sums over the lanes of each accumulator.
template <int X_ROWS, int W_ROWS>
JAXSERVE_INLINE void StoreSums(const Vec (&sum)[X_ROWS][W_ROWS], float* out, int64_t out_stride) {
  constexpr int kSums = X_ROWS * W_ROWS;
#pragma GCC unroll 8
  for (int first = 0; first < kSums; first += kLanes) {
    Vec some[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const int number = first + BitsBackwards(i);
      some[i] = number < kSums ? sum[number / W_ROWS % X_ROWS][number % W_ROWS] : Splat(0);
    }
    float sums[kLanes];
    StoreAs(sums, SumsOf(some));
    constexpr int kRun = W_ROWS < kLanes ? W_ROWS : kLanes;
    const int count = kSums - first < kLanes ? kSums - first : kLanes;
    for (int i = 0; i < count; i += kRun) {
      const int number = first + i;
      __builtin_memcpy(out + number / W_ROWS * out_stride + number % W_ROWS, sums + i,
                       kRun * sizeof(float));
    }
  }
}

// With one row of x: so many sums as an addition takes cycles, twice over.
constexpr int kRowsAlone = 8;
constexpr int64_t kLineBytes = 64;

// Asks for bytes that are wanted soon, of a format with so many bytes for each group of numbers.
// What comes fast waits in the second cache: the first has room for few lines on their way. Past
// the end of memory this does nothing.
template <int64_t BYTES, int64_t GROUP_BYTES>
JAXSERVE_INLINE void Prefetch(const void* from) {
  constexpr int kNearness = GROUP_BYTES < kGroup ? 3 : 2;
#pragma GCC unroll 16
  for (int64_t line = 0; line < BYTES; line += kLineBytes) {
    __builtin_prefetch(static_cast<const char*>(from) + line, 0, kNearness);
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace jaxserve
