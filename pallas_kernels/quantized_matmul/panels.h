// Products in about as few bits as the matrix has, with rows of the matrix as lanes.
//
// Included by kernel.cc where the instruction set sums products of bytes (VNNI) and perhaps of
// bfloat16 numbers. A panel of the matrix is transposed once, so that a vector holds one 32-bit
// word of each of kLanes rows: four bytes, or two numbers. Words of x, as int8 with a scale for
// each group or as bfloat16, meet it one at a time. (With one row of x, bytes are left as they lie.) Sums of bytes are exact within a group; beyond,
// every number of an answer is one chain of operations in the order of the depth, the same in any
// block.
#pragma once

#include <immintrin.h>

#include "kernel.h"

#include "blocks.h"
#include "native/simd.h"

namespace jaxserve {
namespace ISA_NAMESPACE {

// Products of float16 (halves.h) are as fast, and more exact.
#if defined(ISA_AVX512BF16) && !defined(ISA_AVX512FP16)
#define TAKES_BFLOAT16 1
#endif

constexpr int kWordBytes = 4;
constexpr int kPanelVectors = kPanelRows / kLanes;
constexpr int kGroupWords = kGroup / kWordBytes;
// What makes a signed byte unsigned, as the instruction wants one side of it.
constexpr int kByteOffset = 128;
// Groups of x below this are zeros: 127 / 2^-119 is still finite.
constexpr float kLeastGroup = 0x1p-119f;

// -- a row of x ----------------------------------------------------------------------------------

// int8 [depth], float32 scale [groups], and a word [groups] of what the offset or the minimum of
// the matrix's values adds: int8's is a whole number to begin the sum with, int4's a float32.
JAXSERVE_INLINE int64_t XBytes(const Matrix& matrix) {
  if (matrix.format == Format::kNumber) return matrix.depth * 2;
  return matrix.depth + matrix.depth / kGroup * 2 * kWordBytes;
}

// The largest size; a NaN is larger than any number.
JAXSERVE_INLINE float Largest(Vec a, Vec b) {
  const __m512i sizes = _mm512_max_epu32(Bits<__m512i>(Bits<VecU>(a) & 0x7fffffffu),
                                         Bits<__m512i>(Bits<VecU>(b) & 0x7fffffffu));
  return Bits<float>(_mm512_reduce_max_epu32(sizes));
}

void ReadBytes(const Matrix& matrix, const float* x, int64_t first, int64_t count, char* out) {
  char* scales = out + matrix.depth;
  char* shares = scales + matrix.depth / kGroup * kWordBytes;
  out += first;
  for (int64_t g = first / kGroup; g < (first + count) / kGroup; ++g, x += kGroup, out += kGroup) {
    const Vec low = LoadAs<Vec>(x), high = LoadAs<Vec>(x + kLanes);
    const float largest = Largest(low, high);
    const bool is_zero = largest < kLeastGroup;
    const float scale = is_zero ? 0 : largest / 127;
    const Vec inverse = Splat(is_zero ? 0 : 127 / largest);
    const __m512i low_words = _mm512_cvtps_epi32(low * inverse);
    const __m512i high_words = _mm512_cvtps_epi32(high * inverse);
    StoreAs(out, _mm512_cvtsepi32_epi8(low_words));
    StoreAs(out + kLanes, _mm512_cvtsepi32_epi8(high_words));
    // Unsigned, since it wraps where a number is not finite; the scale says so of the whole row.
    const uint32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(low_words, high_words));
    StoreAs(scales + g * kWordBytes, scale);
    if (matrix.format == Format::kInt8) {
      StoreAs(shares + g * kWordBytes, 0u - kByteOffset * sum);
    } else {
      StoreAs(shares + g * kWordBytes, scale * static_cast<float>(static_cast<int32_t>(sum)));
    }
  }
}

// -- a panel -------------------------------------------------------------------------------------

// Words [depth words, kPanelRows]; of bytes then float32 scales [groups, kPanelRows], and of int4
// minima likewise.
JAXSERVE_INLINE int64_t PanelBytes(const Matrix& matrix) {
  const int64_t groups = matrix.depth / kGroup;
  if (matrix.format == Format::kNumber) return kPanelRows * matrix.depth * 2;
  const int64_t floats = matrix.format == Format::kInt8 ? groups : 2 * groups;
  return kPanelRows * (matrix.depth + floats * kWordBytes);
}

// The same words of some rows, transposed; what is not there is zero. What lies `ahead` bytes
// behind each is asked for.
JAXSERVE_INLINE void LoadWords(const char* from, int64_t row_bytes, int64_t rows, int64_t words,
                               int64_t ahead, VecU (&out)[kLanes]) {
  const __mmask16 here = First(words);
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row) {
    const char* source = from + row * row_bytes;
    out[row] = Bits<VecU>(LoadSome(row < rows ? here : 0, source));
    __builtin_prefetch(source + ahead, 0, 2);
  }
  Transpose(out);
}

// The float16 numbers of a mask as float32, and zeros.
JAXSERVE_INLINE __m512 LoadSomeHalves(__mmask16 here, const uint16_t* source) {
#if defined(__SANITIZE_ADDRESS__)
  for (int lane = 0; lane < kLanes; ++lane) {
    if (here >> lane & 1) (void)static_cast<const volatile uint16_t*>(source)[lane];
  }
#endif
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, source));
}

// float16 [kLanes rows, groups] as float32 [groups, kPanelRows].
void TransposeScales(const uint16_t* from, int64_t groups, int64_t rows, float* out) {
  for (int64_t g = 0; g < groups; g += kLanes) {
    VecU some[kLanes];
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) {
      const __mmask16 here = row < rows ? First(groups - g) : 0;
      some[row] = Bits<VecU>(LoadSomeHalves(here, from + row * groups + g));
    }
    Transpose(some);
    const int64_t count = groups - g < kLanes ? groups - g : kLanes;
    for (int64_t i = 0; i < count; ++i) StoreAs(out + (g + i) * kPanelRows, some[i]);
  }
}

// Writes the words of kLanes rows, which are stored as `words` words each, to every kPanelRows-th
// word of out.
template <Format FORMAT>
void TransposeWords(const char* from, int64_t row_bytes, int64_t rows, int64_t ahead,
                    uint32_t* out) {
  const int64_t words = row_bytes / kWordBytes;
  for (int64_t w = 0; w < words; w += kLanes) {
    VecU some[kLanes];
    LoadWords(from + w * kWordBytes, row_bytes, rows, words - w, ahead, some);
    const int64_t count = words - w < kLanes ? words - w : kLanes;
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (FORMAT == Format::kInt4) {  // A group has its first values in the lower halves.
        constexpr int kHalf = kGroupWords / 2;
        uint32_t* group = out + ((w + i) / kHalf * kGroupWords + i % kHalf) * kPanelRows;
        StoreAs(group, some[i] & 0x0f0f0f0fu);
        StoreAs(group + kHalf * kPanelRows, some[i] >> 4 & 0x0f0f0f0fu);
      } else {
        const uint32_t flip = FORMAT == Format::kInt8 ? kByteOffset * 0x01010101u : 0;
        StoreAs(out + (w + i) * kPanelRows, some[i] ^ flip);
      }
    }
  }
}

// Asks for the scales of a panel: they are read before its values, and nothing else can be done
// meanwhile.
void AskForScales(const Matrix& matrix, int64_t first) {
  const int64_t groups = matrix.depth / kGroup;
  const uint16_t* scales[] = {matrix.scale, matrix.minimum};
  for (int i = 0; i < (matrix.format == Format::kInt4 ? 2 : 1); ++i) {
    const char* from = reinterpret_cast<const char*>(scales[i] + first * groups);
    const int64_t bytes = kPanelRows * groups * static_cast<int64_t>(sizeof(uint16_t));
    for (int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(from + at, 0, 2);
  }
}

template <Format FORMAT>
void ExpandPanelOf(const Matrix& matrix, int64_t first, int64_t rows, int64_t next, char* out) {
  const int64_t row_bytes = matrix.row_bytes(), groups = matrix.depth / kGroup;
  const int64_t ahead = (next - first) * row_bytes;
  const int64_t values_bytes = FORMAT == Format::kNumber ? matrix.depth * 2 : matrix.depth;
  auto* words = reinterpret_cast<uint32_t*>(out);
  auto* scales = reinterpret_cast<float*>(out + kPanelRows * values_bytes);
  for (int64_t row = 0; row < kPanelRows; row += kLanes) {
    const int64_t here = first + (row < rows ? row : 0), left = rows - row;
    const char* values = static_cast<const char*>(matrix.values) + here * row_bytes;
    TransposeWords<FORMAT>(values, row_bytes, left, ahead, words + row);
    if constexpr (FORMAT == Format::kNumber) continue;
    TransposeScales(matrix.scale + here * groups, groups, left, scales + row);
    if constexpr (FORMAT != Format::kInt4) continue;
    float* minima = scales + groups * kPanelRows;
    TransposeScales(matrix.minimum + here * groups, groups, left, minima + row);
  }
}

// -- products ------------------------------------------------------------------------------------

JAXSERVE_INLINE __m512i EveryLane(const char* word) { return _mm512_set1_epi32(LoadAs<int>(word)); }
JAXSERVE_INLINE Vec EveryLaneFloat(const char* word) { return Splat(LoadAs<float>(word)); }

// Adds the products of a group to the sums of X_ROWS rows of x.
template <Format FORMAT, int X_ROWS>
JAXSERVE_INLINE void AddGroup(const char* x, int64_t x_bytes, int64_t depth, int64_t g,
                              const char* panel, Vec (&sum)[X_ROWS][kPanelVectors]) {
  constexpr int64_t kRunBytes = kPanelRows * kWordBytes;  // One word of every row.
  const int64_t groups = depth / kGroup;
  const char* scales = x + depth + g * kWordBytes;
  const char* shares = scales + groups * kWordBytes;
  __m512i dot[X_ROWS][kPanelVectors];
#pragma GCC unroll 8
  for (int m = 0; m < X_ROWS; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVectors; ++n) {
      dot[m][n] = FORMAT == Format::kInt8 ? EveryLane(shares + m * x_bytes)
                                          : _mm512_setzero_si512();
    }
  }
#pragma GCC unroll 8
  for (int w = 0; w < kGroupWords; ++w) {
    const char* words = panel + (g * kGroupWords + w) * kRunBytes;
    __m512i right[kPanelVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVectors; ++n) right[n] = LoadAs<__m512i>(words + n * sizeof(Vec));
#pragma GCC unroll 8
    for (int m = 0; m < X_ROWS; ++m) {
      const __m512i left = EveryLane(x + m * x_bytes + g * kGroup + w * kWordBytes);
#pragma GCC unroll 4
      for (int n = 0; n < kPanelVectors; ++n) {
        dot[m][n] = _mm512_dpbusd_epi32(dot[m][n], right[n], left);
      }
    }
  }
  const char* factors = panel + kPanelRows * depth + g * kRunBytes;
#pragma GCC unroll 4
  for (int n = 0; n < kPanelVectors; ++n) {
    const Vec factor = LoadAs<Vec>(factors + n * sizeof(Vec));
#pragma GCC unroll 8
    for (int m = 0; m < X_ROWS; ++m) {
      const Vec scaled = Bits<Vec>(_mm512_cvtepi32_ps(dot[m][n])) * factor;
      sum[m][n] = Fma(scaled, EveryLaneFloat(scales + m * x_bytes), sum[m][n]);
    }
    if constexpr (FORMAT == Format::kInt4) {
      const Vec minimum = LoadAs<Vec>(factors + groups * kRunBytes + n * sizeof(Vec));
#pragma GCC unroll 8
      for (int m = 0; m < X_ROWS; ++m) {
        sum[m][n] = Fma(minimum, EveryLaneFloat(shares + m * x_bytes), sum[m][n]);
      }
    }
  }
}

#if defined(TAKES_BFLOAT16)
void ReadBFloat16(const float* x, int64_t first, int64_t count, char* out) {
  for (int64_t d = 0; d < count; d += kLanes) {
    StoreAs(out + (first + d) * 2, _mm512_cvtneps_pbh(LoadAs<__m512>(x + d)));
  }
}

// Adds the products of two numbers of each row.
template <int X_ROWS>
JAXSERVE_INLINE void AddPair(const char* x, int64_t x_bytes, int64_t pair, const char* panel,
                             Vec (&sum)[X_ROWS][kPanelVectors]) {
  const char* words = panel + pair * kPanelRows * kWordBytes;
  __m512bh right[kPanelVectors];
#pragma GCC unroll 4
  for (int n = 0; n < kPanelVectors; ++n) right[n] = LoadAs<__m512bh>(words + n * sizeof(Vec));
#pragma GCC unroll 8
  for (int m = 0; m < X_ROWS; ++m) {
    const __m512bh left = Bits<__m512bh>(EveryLane(x + m * x_bytes + pair * kWordBytes));
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVectors; ++n) {
      sum[m][n] = _mm512_dpbf16_ps(sum[m][n], right[n], left);
    }
  }
}
#endif

template <Format FORMAT, int X_ROWS>
void MultiplyPanelOf(int64_t depth, const char* x, int64_t x_bytes, int64_t rows, const char* panel,
                     float* out, int64_t out_stride) {
  Vec sum[X_ROWS][kPanelVectors];
#pragma GCC unroll 8
  for (int m = 0; m < X_ROWS; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVectors; ++n) sum[m][n] = Splat(0);
  }
  if constexpr (FORMAT != Format::kNumber) {
    for (int64_t g = 0; g < depth / kGroup; ++g) {
      AddGroup<FORMAT, X_ROWS>(x, x_bytes, depth, g, panel, sum);
    }
  } else {
#if defined(TAKES_BFLOAT16)
    for (int64_t pair = 0; pair < depth / 2; ++pair) AddPair(x, x_bytes, pair, panel, sum);
#endif
  }
#pragma GCC unroll 8
  for (int m = 0; m < X_ROWS; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVectors; ++n) {
      const int64_t left = rows - n * kLanes;
      if (left <= 0) continue;
      StoreSome(out + m * out_stride + n * kLanes, First(left), sum[m][n]);
    }
  }
}

using PanelMultiplier = void (*)(int64_t, const char*, int64_t, int64_t, const char*, float*,
                                 int64_t);

template <Format FORMAT>
constexpr PanelMultiplier kPanelMultipliers[] = {
    MultiplyPanelOf<FORMAT, 1>, MultiplyPanelOf<FORMAT, 2>, MultiplyPanelOf<FORMAT, 3>,
    MultiplyPanelOf<FORMAT, 4>, MultiplyPanelOf<FORMAT, 5>, MultiplyPanelOf<FORMAT, 6>,
};

template <Format FORMAT>
void MultiplyAllOf(const Matrix& matrix, int64_t x_rows, const char* x, int64_t rows,
                   const char* panel, float* out, int64_t out_stride) {
  const int64_t x_bytes = XBytes(matrix);
  for (int64_t m = 0; m < x_rows; m += kXRows) {
    const int64_t left = x_rows - m < kXRows ? x_rows - m : kXRows;
    kPanelMultipliers<FORMAT>[left - 1](matrix.depth, x + m * x_bytes, x_bytes, rows, panel,
                                        out + m * out_stride, out_stride);
  }
}

// -- one row of x --------------------------------------------------------------------------------

// Transposing words pays when they are used again. With one row of x the rows of the matrix meet it
// as they lie, and only sums are transposed: whole numbers, which are the same in any order.

// Adds up the four words in each quarter of kLanes vectors: quarter q of result[i] has those of
// quarter q of the vectors from 4 i on.
JAXSERVE_INLINE void AddQuarters(const __m512i (&words)[kLanes], __m512i (&result)[kLanes / 4]) {
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) {
    const __m512i a = words[4 * i], b = words[4 * i + 1];
    const __m512i c = words[4 * i + 2], d = words[4 * i + 3];
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    result[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
}

// Groups whose stored bytes fill a vector.
template <Format FORMAT>
constexpr int kRunGroups = FORMAT == Format::kInt8 ? 2 : 4;

// Sums over each of kRunGroups groups, a row in each lane. Rows that are not there become the first;
// words that are not there are zeros, and what comes of them means nothing.
template <Format FORMAT>
JAXSERVE_INLINE void AddRun(const char* values, int64_t row_bytes, int64_t rows, int64_t ahead,
                            const char* x, int64_t words, __m512i (&out)[kRunGroups<FORMAT>]) {
  const __mmask16 here = First(words);
  __m512i dot[kLanes], four[kLanes / 4];
  __m512i left = LoadSome(FORMAT == Format::kInt8 ? here : First(2 * words), x);
  __m512i left_high = left;
  if constexpr (FORMAT == Format::kInt4) {  // A group has its first values in the lower halves.
    const __mmask16 rest = words > kLanes / 2 ? First(2 * words - kLanes) : 0;
    const __m512i more = LoadSome(rest, x + sizeof(__m512i));
    left_high = _mm512_shuffle_i32x4(left, more, 0xdd);
    left = _mm512_shuffle_i32x4(left, more, 0x88);
  }
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row) {
    const char* source = values + (row < rows ? row : 0) * row_bytes;
    const __m512i right = LoadSome(here, source);
    __builtin_prefetch(source + ahead, 0, 2);
    if constexpr (FORMAT == Format::kInt8) {
      const __m512i flip = _mm512_set1_epi8(static_cast<char>(kByteOffset));
      dot[row] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_xor_si512(right, flip), left);
    } else {
      const __m512i mask = _mm512_set1_epi8(0x0f);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(right, 4), mask);
      dot[row] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_and_si512(right, mask), left);
      dot[row] = _mm512_dpbusd_epi32(dot[row], high, left_high);
    }
  }
  AddQuarters(dot, four);
  if constexpr (FORMAT == Format::kInt8) {  // Two quarters are a group.
    const __m512i low = _mm512_add_epi32(_mm512_shuffle_i32x4(four[0], four[1], 0x88),
                                         _mm512_shuffle_i32x4(four[0], four[1], 0xdd));
    const __m512i high = _mm512_add_epi32(_mm512_shuffle_i32x4(four[2], four[3], 0x88),
                                          _mm512_shuffle_i32x4(four[2], four[3], 0xdd));
    out[0] = _mm512_shuffle_i32x4(low, high, 0x88);
    out[1] = _mm512_shuffle_i32x4(low, high, 0xdd);
  } else {
    const __m512i even_low = _mm512_shuffle_i32x4(four[0], four[1], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(four[0], four[1], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(four[2], four[3], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(four[2], four[3], 0xdd);
    out[0] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    out[1] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    out[2] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    out[3] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// out[rows], at most kLanes of them, with the bits that panels give; see AddGroup. Memory is of
// float32 [groups, kPanelRows], and of int4 twice.
template <Format FORMAT>
void MultiplyRowOfBytes(const Matrix& matrix, int64_t first, int64_t rows, int64_t ahead,
                        const char* x, float* memory, float* out) {
  const int64_t row_bytes = matrix.row_bytes(), groups = matrix.depth / kGroup;
  const char* values = static_cast<const char*>(matrix.values) + first * row_bytes;
  const char* scales = x + matrix.depth;
  const char* shares = scales + groups * kWordBytes;
  float* minima = memory + groups * kPanelRows;
  TransposeScales(matrix.scale + first * groups, groups, rows, memory);
  if constexpr (FORMAT == Format::kInt4) {
    TransposeScales(matrix.minimum + first * groups, groups, rows, minima);
  }
  constexpr int kRun = kRunGroups<FORMAT>;
  Vec sum = Splat(0);
  for (int64_t g = 0; g < groups; g += kRun) {
    __m512i dot[kRun];
    const int64_t at = g / kRun * static_cast<int64_t>(sizeof(__m512i));
    AddRun<FORMAT>(values + at, row_bytes, rows, ahead, x + g * kGroup,
                   (row_bytes - at) / kWordBytes, dot);
#pragma GCC unroll 4
    for (int i = 0; i < kRun; ++i) {
      if (g + i >= groups) break;
      const char* share = shares + (g + i) * kWordBytes;
      if constexpr (FORMAT == Format::kInt8) dot[i] = _mm512_add_epi32(dot[i], EveryLane(share));
      const Vec scaled =
          Bits<Vec>(_mm512_cvtepi32_ps(dot[i])) * LoadAs<Vec>(memory + (g + i) * kPanelRows);
      sum = Fma(scaled, EveryLaneFloat(scales + (g + i) * kWordBytes), sum);
      if constexpr (FORMAT == Format::kInt4) {
        sum = Fma(LoadAs<Vec>(minima + (g + i) * kPanelRows), EveryLaneFloat(share), sum);
      }
    }
  }
  StoreSome(out, First(rows), sum);
}

// -- what matmul.cc calls ------------------------------------------------------------------------

bool TakesPanels(const Matrix& matrix) {
#if defined(TAKES_BFLOAT16)
  if (matrix.format == Format::kNumber) return matrix.number == Number::kBFloat16;
#endif
  return matrix.format != Format::kNumber;
}

PanelSizes SizesOfPanels(const Matrix& matrix) { return {XBytes(matrix), PanelBytes(matrix)}; }

void ReadX(const Matrix& matrix, const float* x, int64_t first, int64_t count, char* out) {
#if defined(TAKES_BFLOAT16)
  if (matrix.format == Format::kNumber) return ReadBFloat16(x, first, count, out);
#endif
  ReadBytes(matrix, x, first, count, out);
}

template <Format FORMAT>
void RunPanelOf(const Matrix& matrix, int64_t x_rows, const char* x, int64_t first, int64_t rows,
                int64_t next, char* memory, float* out, int64_t stride) {
  if constexpr (FORMAT != Format::kNumber) {
    AskForScales(matrix, next);
    if (x_rows == 1) {
      const int64_t ahead = (next - first) * matrix.row_bytes();
      for (int64_t row = 0; row < rows; row += kLanes) {
        MultiplyRowOfBytes<FORMAT>(matrix, first + row, rows - row, ahead, x,
                                   reinterpret_cast<float*>(memory), out + row);
      }
      return;
    }
  }
  ExpandPanelOf<FORMAT>(matrix, first, rows, next, memory);
  MultiplyAllOf<FORMAT>(matrix, x_rows, x, rows, memory, out, stride);
}

void RunPanel(const Matrix& matrix, int64_t x_rows, const char* x, int64_t first, int64_t rows,
              int64_t next, char* memory, float* out, int64_t stride) {
  const auto run = matrix.format == Format::kInt8   ? RunPanelOf<Format::kInt8>
                   : matrix.format == Format::kInt4 ? RunPanelOf<Format::kInt4>
                                                    : RunPanelOf<Format::kNumber>;
  run(matrix, x_rows, x, first, rows, next, memory, out, stride);
}

}  // namespace ISA_NAMESPACE
}  // namespace jaxserve
