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

JAXSERVE_INLINE Half SplatHalf(const uint16_t* half) {
  return _mm512_set1_ph(LoadAs<_Float16>(half));
}

// Where a vector of an int4 group has its numbers: the lookup below finds them in this order, for
// which no number has to cross between 64-bit lanes. Lane l of them holds four halves of the bytes
// 8 (l % 2) to 8 (l % 2) + 7, whose lower halves are the group's first numbers.
struct Int4Order {
  uint16_t number[kHalves];  // At each place.
  uint8_t shift[2 * kHalves];  // What vpmultishiftqb wants: of each byte, its first bit.
};
constexpr Int4Order MakeInt4Order() {
  Int4Order order{};
  for (int place = 0; place < kHalves; ++place) {
    const int lane = place / 4, half = lane / 2 * 4 + place % 4;
    order.number[place] = lane % 2 * 8 + half / 2 + half % 2 * 16;
    order.shift[2 * place] = order.shift[2 * place + 1] = half * 4;
  }
  return order;
}
constexpr Int4Order kInt4Order = MakeInt4Order();

// -- rows of a matrix, kHalves numbers at a time --------------------------------------------------

template <typename T>
struct NumberRow {
  static constexpr int64_t kGroupBytes = kGroup * sizeof(typename T::Storage);
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

struct GroupRow {
  const uint16_t* scale;

  GroupRow() = default;
  GroupRow(const Matrix& matrix, int64_t row)
      : scale(matrix.scale + row * (matrix.depth / kGroup)) {}
};

struct Int8Row : GroupRow {
  static constexpr int64_t kGroupBytes = kGroup;
  const int8_t* values;

  Int8Row() = default;
  Int8Row(const Matrix& matrix, int64_t row)
      : GroupRow(matrix, row),
        values(static_cast<const int8_t*>(matrix.values) + row * matrix.row_bytes()) {}

  JAXSERVE_INLINE const void* At(int64_t i) const { return values + i * kGroupBytes; }
  JAXSERVE_INLINE Half Load(int64_t i) const {
    const __m512i wide = _mm512_cvtepi8_epi16(LoadAs<__m256i>(values + i * kGroupBytes));
    return _mm512_mul_ph(_mm512_cvtepi16_ph(wide), SplatHalf(scale + i));
  }
  JAXSERVE_INLINE Half LoadRest(int64_t i) const { return Load(i); }
};

struct Int4Row : GroupRow {
  static constexpr int64_t kGroupBytes = kGroup / 2;
  const uint16_t* minimum;
  const char* values;

  Int4Row() = default;
  Int4Row(const Matrix& matrix, int64_t row)
      : GroupRow(matrix, row),
        minimum(matrix.minimum + row * (matrix.depth / kGroup)),
        values(static_cast<const char*>(matrix.values) + row * matrix.row_bytes()) {}

  JAXSERVE_INLINE const void* At(int64_t i) const { return values + i * kGroupBytes; }
  JAXSERVE_INLINE Half Load(int64_t i) const {
    // 0 to 15, twice over: a lookup minds the lower five bits alone.
    static constexpr uint16_t kSteps[] = {
        0x0000, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700,
        0x4800, 0x4880, 0x4900, 0x4980, 0x4a00, 0x4a80, 0x4b00, 0x4b80,
        0x0000, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700,
        0x4800, 0x4880, 0x4900, 0x4980, 0x4a00, 0x4a80, 0x4b00, 0x4b80};
    const Half choices =
        _mm512_fmadd_ph(LoadAs<Half>(kSteps), SplatHalf(scale + i), SplatHalf(minimum + i));
    const __m512i pairs = _mm512_broadcast_i32x4(LoadAs<__m128i>(values + i * kGroupBytes));
    const __m512i which = _mm512_multishift_epi64_epi8(LoadAs<__m512i>(kInt4Order.shift), pairs);
    return _mm512_castsi512_ph(_mm512_permutexvar_epi16(which, _mm512_castph_si512(choices)));
  }
  JAXSERVE_INLINE Half LoadRest(int64_t i) const { return Load(i); }
};

static_assert(kGroup == kHalves, "a group is a vector");

// Calls the template's instance for the matrix.
#define JAXSERVE_FOR_ROWS(matrix, call)                                                        \
  switch ((matrix).format) {                                                                   \
    case Format::kInt8: { using Row = Int8Row; call; break; }                                  \
    case Format::kInt4: { using Row = Int4Row; call; break; }                                  \
    case Format::kNumber:                                                                      \
      switch ((matrix).number) {                                                               \
        case Number::kFloat32: break; /* matmul.cc keeps those in float32 */                  \
        case Number::kBFloat16: { using Row = NumberRow<BFloat16>; call; break; }              \
        case Number::kFloat16: { using Row = NumberRow<Float16>; call; break; }                \
      }                                                                                        \
  }

// -- many rows of x ------------------------------------------------------------------------------

template <typename Row>
void ExpandRow(const Row& row, int64_t depth, uint16_t* out) {
  const int64_t whole = depth / kHalves;
  for (int64_t i = 0; i < whole; ++i) StoreAs(out + i * kHalves, row.Load(i));
  if (depth % kHalves) StoreAs(out + whole * kHalves, row.LoadRest(whole));
}

void ExpandHalves(const Matrix& matrix, int64_t first, int64_t rows, uint16_t* out) {
  for (int64_t row = first; row < first + rows; ++row, out += HalfDepth(matrix.depth)) {
    JAXSERVE_FOR_ROWS(matrix, ExpandRow(Row(matrix, row), matrix.depth, out))
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

void MultiplyRowHalves(const Matrix& matrix, int64_t first, int64_t rows, const uint16_t* x,
                       float* out) {
  int64_t row = 0;
  for (; row + kRowsAlone <= rows; row += kRowsAlone) {
    JAXSERVE_FOR_ROWS(matrix,
                      (MultiplyRowsAlone<Row, kRowsAlone>(matrix, first + row, x, out + row)))
  }
  for (; row < rows; ++row) {
    JAXSERVE_FOR_ROWS(matrix, (MultiplyRowsAlone<Row, 1>(matrix, first + row, x, out + row)))
  }
}

// -- into float16 and back -----------------------------------------------------------------------

float NarrowRow(Format format, const float* x, int64_t depth, uint16_t* out) {
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
  if (format == Format::kInt4) {
    const __m512i order = LoadAs<__m512i>(kInt4Order.number);
    for (d = 0; d < depth; d += kHalves) {
      StoreAs(out + d, _mm512_permutexvar_epi16(order, LoadAs<__m512i>(out + d)));
    }
  }
  return back;
}

bool Restore(int64_t count, float factor, float* answers) {
  const Vec by = Splat(factor);
  __mmask16 odd = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 here = count - i < kLanes ? (1u << (count - i)) - 1 : 0xffff;
    const Vec v = _mm512_maskz_loadu_ps(here, answers + i) * by;
    odd |= _mm512_cmp_ps_mask(v - v, Splat(0), _CMP_NEQ_UQ);
    _mm512_mask_storeu_ps(answers + i, here, v);
  }
  return odd == 0;
}

}  // namespace ISA_NAMESPACE
}  // namespace jaxserve
