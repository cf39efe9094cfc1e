// Dot products of rows in float16, whose sums of few products become float32: twice the lanes.
//
// Included by kernel.cc where the instruction set multiplies float16. As there, every number of an
// answer is one chain of operations, the same in any block: lane i sums kChain products in float16,
// lanes i and i + 16 are added, that is added to a float32, and a tree adds the lanes in the end.
// An error is about that of one number in float16, 2^-11 of the products' size.
#pragma once

#include <immintrin.h>

#include "blocks.h"
#include "kernel.h"
#include "native/simd.h"

namespace jaxserve {
namespace ISA_NAMESPACE {

// Products that a lane sums in float16.
constexpr int64_t kChain = 24;
// So large a number of a row of x becomes: kChain products with weights up to 170 stay finite, and
// what is 2^-18 of the largest is still a normal number.
constexpr int kTopExponent = 3;

typedef __m512h Half;

// Adds the halves of a vector and widens what remains.
JAXSERVE_INLINE Vec Fold(Half v) {
  const __m512i bits = _mm512_castph_si512(v);
  const __m256h low = _mm256_castsi256_ph(_mm512_castsi512_si256(bits));
  const __m256h high = _mm256_castsi256_ph(_mm512_extracti64x4_epi64(bits, 1));
  return _mm512_cvtph_ps(_mm256_castph_si256(_mm256_add_ph(low, high)));
}

JAXSERVE_INLINE Half Join(__m256i low, __m256i high) {
  return _mm512_castsi512_ph(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

JAXSERVE_INLINE __m256i Narrow(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

// -- rows of a matrix, kHalves numbers at a time --------------------------------------------------

template <typename T>
struct NumberRow {
  static constexpr int64_t kGroupBytes = kHalves * sizeof(typename T::Storage);
  const typename T::Storage* values;

  NumberRow() = default;
  NumberRow(const Matrix& matrix, int64_t row)
      : values(static_cast<const typename T::Storage*>(matrix.values) + row * matrix.depth) {}

  JAXSERVE_INLINE const void* At(int64_t i) const { return values + i * kHalves; }
  JAXSERVE_INLINE Half Load(int64_t i) const {
    const auto* from = values + i * kHalves;
    return Join(Narrow(T::Load(from)), Narrow(T::Load(from + kLanes)));
  }
  // The first half of them; the others are zeros.
  JAXSERVE_INLINE Half LoadRest(int64_t i) const {
    return Join(Narrow(T::Load(values + i * kHalves)), _mm256_setzero_si256());
  }
};

template <>
JAXSERVE_INLINE Half NumberRow<Float16>::Load(int64_t i) const {
  return LoadAs<Half>(values + i * kHalves);
}

// -- many rows of x ------------------------------------------------------------------------------

template <typename Row>
void ExpandRow(const Row& row, int64_t depth, uint16_t* out) {
  const int64_t whole = depth / kHalves;
  for (int64_t i = 0; i < whole; ++i) StoreAs(out + i * kHalves, row.Load(i));
  if (depth % kHalves) StoreAs(out + whole * kHalves, row.LoadRest(whole));
}

template <typename Row>
void ExpandRows(const Matrix& matrix, int64_t first, int64_t rows, uint16_t* out) {
  for (int64_t row = first; row < first + rows; ++row, out += HalfDepth(matrix.depth)) {
    ExpandRow(Row(matrix, row), matrix.depth, out);
  }
}

// Of a matrix of bfloat16 or float16.
void ExpandHalves(const Matrix& matrix, int64_t first, int64_t rows, uint16_t* out) {
  if (matrix.number == Number::kFloat16) {
    ExpandRows<NumberRow<Float16>>(matrix, first, rows, out);
  } else {
    ExpandRows<NumberRow<BFloat16>>(matrix, first, rows, out);
  }
}

template <int X_ROWS, int W_ROWS>
void MultiplyHalvesOf(int64_t depth, const uint16_t* x, const uint16_t* w, float* out,
                      int64_t out_stride) {
  Vec wide[X_ROWS][W_ROWS];
  for (int64_t start = 0; start < depth; start += kChain * kHalves) {
    const int64_t end = depth - start < kChain * kHalves ? depth : start + kChain * kHalves;
    Half sum[X_ROWS][W_ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < X_ROWS; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < W_ROWS; ++n) sum[m][n] = _mm512_setzero_ph();
    }
    for (int64_t d = start; d < end; d += kHalves) {
      Half right[W_ROWS];
#pragma GCC unroll 8
      for (int n = 0; n < W_ROWS; ++n) right[n] = LoadAs<Half>(w + n * depth + d);
#pragma GCC unroll 8
      for (int m = 0; m < X_ROWS; ++m) {
        const Half left = LoadAs<Half>(x + m * depth + d);
#pragma GCC unroll 8
        for (int n = 0; n < W_ROWS; ++n) sum[m][n] = _mm512_fmadd_ph(left, right[n], sum[m][n]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < X_ROWS; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < W_ROWS; ++n) {
        const Vec more = Fold(sum[m][n]);
        wide[m][n] = start == 0 ? more : wide[m][n] + more;
      }
    }
  }
  StoreSums<X_ROWS, W_ROWS>(wide, out, out_stride);
}

using HalfMultiplier = void (*)(int64_t, const uint16_t*, const uint16_t*, float*, int64_t);

template <int W_ROWS>
constexpr HalfMultiplier kHalfMultipliers[] = {
    MultiplyHalvesOf<1, W_ROWS>, MultiplyHalvesOf<2, W_ROWS>, MultiplyHalvesOf<3, W_ROWS>,
    MultiplyHalvesOf<4, W_ROWS>, MultiplyHalvesOf<5, W_ROWS>, MultiplyHalvesOf<6, W_ROWS>,
};

void MultiplyHalves(int64_t depth, int64_t x_rows, const uint16_t* x, int64_t w_rows,
                    const uint16_t* w, float* out, int64_t out_stride) {
  const int64_t stride = HalfDepth(depth);
  for (int64_t m = 0; m < x_rows; m += kXRows) {
    const int64_t left = x_rows - m < kXRows ? x_rows - m : kXRows;
    int64_t n = 0;
    for (; n + kWRows <= w_rows; n += kWRows) {
      kHalfMultipliers<kWRows>[left - 1](stride, x + m * stride, w + n * stride,
                                         out + m * out_stride + n, out_stride);
    }
    for (; n < w_rows; ++n) {
      kHalfMultipliers<1>[left - 1](stride, x + m * stride, w + n * stride,
                                    out + m * out_stride + n, out_stride);
    }
  }
}

// -- one row of x --------------------------------------------------------------------------------

template <typename Row, int ROWS>
void MultiplyRowsAlone(const Matrix& matrix, int64_t first, const uint16_t* x, float* out) {
  const int64_t whole = matrix.depth / kHalves;
  Row rows[ROWS];
  for (int n = 0; n < ROWS; ++n) rows[n] = Row(matrix, first + n);
  const char* next = static_cast<const char*>(rows[0].At(0)) + ROWS * matrix.row_bytes();
  Vec wide[1][ROWS];
  const int64_t vectors = HalfDepth(matrix.depth) / kHalves;
  for (int64_t start = 0; start < vectors; start += kChain) {
    const int64_t end = vectors - start < kChain ? vectors : start + kChain;
    const int64_t end_whole = end < whole ? end : whole;
    Half sum[ROWS];
#pragma GCC unroll 8
    for (int n = 0; n < ROWS; ++n) sum[n] = _mm512_setzero_ph();
    for (int64_t i = start; i < end_whole; ++i) {
      const Half left = LoadAs<Half>(x + i * kHalves);
#pragma GCC unroll 8
      for (int n = 0; n < ROWS; ++n) sum[n] = _mm512_fmadd_ph(left, rows[n].Load(i), sum[n]);
      Prefetch<ROWS * Row::kGroupBytes, Row::kGroupBytes>(next + i * ROWS * Row::kGroupBytes);
    }
    if (end_whole < end) {
      const Half left = LoadAs<Half>(x + end_whole * kHalves);
#pragma GCC unroll 8
      for (int n = 0; n < ROWS; ++n) {
        sum[n] = _mm512_fmadd_ph(left, rows[n].LoadRest(end_whole), sum[n]);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < ROWS; ++n) {
      const Vec more = Fold(sum[n]);
      wide[0][n] = start == 0 ? more : wide[0][n] + more;
    }
  }
  StoreSums<1, ROWS>(wide, out, ROWS);
}

template <typename Row>
void MultiplyRowOf(const Matrix& matrix, int64_t first, int64_t rows, const uint16_t* x,
                   float* out) {
  int64_t row = 0;
  for (; row + kRowsAlone <= rows; row += kRowsAlone) {
    MultiplyRowsAlone<Row, kRowsAlone>(matrix, first + row, x, out + row);
  }
  for (; row < rows; ++row) MultiplyRowsAlone<Row, 1>(matrix, first + row, x, out + row);
}

void MultiplyRowHalves(const Matrix& matrix, int64_t first, int64_t rows, const uint16_t* x,
                       float* out) {
  if (matrix.number == Number::kFloat16) {
    MultiplyRowOf<NumberRow<Float16>>(matrix, first, rows, x, out);
  } else {
    MultiplyRowOf<NumberRow<BFloat16>>(matrix, first, rows, x, out);
  }
}

// -- into float16 and back -----------------------------------------------------------------------

float NarrowRow(const float* x, int64_t depth, uint16_t* out) {
  Vec most = Splat(0);
  for (int64_t d = 0; d < depth; d += kLanes) {
    const Vec v = LoadAs<Vec>(x + d);
    most = Larger::Of(Bits<Vec>(Bits<VecU>(v) & 0x7fffffffu), most);
  }
  const int exponent = static_cast<int>(Bits<uint32_t>(Max(most)) >> 23) - 127;
  int shift = kTopExponent - exponent;
  if (shift > 126) shift = 126;
  if (exponent == 128) shift = 0;  // Infinity; a NaN is passed over above, and stays one below.
  const float factor = Bits<float>(static_cast<uint32_t>(127 + shift) << 23);
  const float back = Bits<float>(static_cast<uint32_t>(127 - shift) << 23);
  int64_t d = 0;
  for (; d < depth; d += kLanes) StoreAs(out + d, Narrow(LoadAs<Vec>(x + d) * Splat(factor)));
  if (d < HalfDepth(depth)) StoreAs(out + d, _mm256_setzero_si256());
  return back;
}

bool Restore(int64_t count, float factor, float* answers) {
  const Vec by = Splat(factor);
  __mmask16 odd = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 here = count - i < kLanes ? (1u << (count - i)) - 1 : 0xffff;
    const Vec v = Bits<Vec>(LoadSome(here, answers + i)) * by;
    odd |= _mm512_cmp_ps_mask(v - v, Splat(0), _CMP_NEQ_UQ);
    StoreSome(answers + i, here, v);
  }
  return odd == 0;
}

}  // namespace ISA_NAMESPACE
}  // namespace jaxserve
