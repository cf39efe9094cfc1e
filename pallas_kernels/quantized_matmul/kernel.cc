// Dot products of rows in float32, several rows of each side at a time.
//
// Every number of an answer is one chain of operations, the same in any block: each lane sums every
// kLanes-th product in order, then a tree over the lanes. What stands beside it leaves no trace.
#include "kernel.h"

#include "native/simd.h"

namespace jaxserve {
namespace ISA_NAMESPACE {
namespace {

// Rows of x and of the matrix whose products are kept in registers.
#if defined(ISA_AVX512)
constexpr int kXRows = 6, kWRows = 4;
#else
constexpr int kXRows = 2, kWRows = 4;
#endif
// With one row of x: as many sums as an addition takes cycles, twice over.
constexpr int kWRowsAlone = 8;

// -- products ------------------------------------------------------------------------------------

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

template <int X_ROWS, int W_ROWS>
void Multiply(int64_t depth, const float* x, const float* w, float* out, int64_t out_stride) {
  Vec sum[X_ROWS][W_ROWS];
#pragma GCC unroll 8
  for (int m = 0; m < X_ROWS; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < W_ROWS; ++n) sum[m][n] = Splat(0);
  }
  for (int64_t d = 0; d < depth; d += kLanes) {
    Vec right[W_ROWS];
#pragma GCC unroll 8
    for (int n = 0; n < W_ROWS; ++n) right[n] = LoadAs<Vec>(w + n * depth + d);
#pragma GCC unroll 8
    for (int m = 0; m < X_ROWS; ++m) {
      const Vec left = LoadAs<Vec>(x + m * depth + d);
#pragma GCC unroll 8
      for (int n = 0; n < W_ROWS; ++n) sum[m][n] = Fma(left, right[n], sum[m][n]);
    }
  }
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
    const int count = kSums - first < kLanes ? kSums - first : kLanes;
    for (int i = 0; i < count; i += W_ROWS) {
      __builtin_memcpy(out + (first + i) / W_ROWS * out_stride, sums + i, W_ROWS * sizeof(float));
    }
  }
}

using Multiplier = void (*)(int64_t, const float*, const float*, float*, int64_t);

template <int W_ROWS>
constexpr Multiplier kMultipliers[] = {
    Multiply<1, W_ROWS>, Multiply<2, W_ROWS>,
#if defined(ISA_AVX512)
    Multiply<3, W_ROWS>, Multiply<4, W_ROWS>, Multiply<5, W_ROWS>, Multiply<6, W_ROWS>,
#endif
};

void MultiplyAll(int64_t depth, int64_t x_rows, const float* x, int64_t w_rows, const float* w,
                 float* out, int64_t out_stride) {
  for (int64_t m = 0; m < x_rows; m += kXRows) {
    const int64_t left = x_rows - m < kXRows ? x_rows - m : kXRows;
    int64_t n = 0;
    if (left == 1) {
      for (; n + kWRowsAlone <= w_rows; n += kWRowsAlone) {
        Multiply<1, kWRowsAlone>(depth, x + m * depth, w + n * depth, out + m * out_stride + n,
                                 out_stride);
      }
    }
    for (; n + kWRows <= w_rows; n += kWRows) {
      kMultipliers<kWRows>[left - 1](depth, x + m * depth, w + n * depth,
                                     out + m * out_stride + n, out_stride);
    }
    for (; n < w_rows; ++n) {
      kMultipliers<1>[left - 1](depth, x + m * depth, w + n * depth, out + m * out_stride + n,
                                out_stride);
    }
  }
}

// -- stored numbers ------------------------------------------------------------------------------

template <typename T>
void LoadMany(const void* source, int64_t count, float* target) {
  const auto* from = static_cast<const typename T::Storage*>(source);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) StoreAs(target + i, T::Load(from + i));
  if (i == count) return;
  typename T::Storage rest[kLanes] = {};
  float wide[kLanes];
  for (int64_t j = i; j < count; ++j) rest[j - i] = from[j];
  StoreAs(wide, T::Load(rest));
  for (int64_t j = i; j < count; ++j) target[j] = wide[j - i];
}

template <typename T>
void StoreMany(const float* source, int64_t count, void* target) {
  auto* to = static_cast<typename T::Storage*>(target);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) T::Store(to + i, LoadAs<Vec>(source + i));
  if (i == count) return;
  float rest[kLanes] = {};
  typename T::Storage narrow[kLanes];
  for (int64_t j = i; j < count; ++j) rest[j - i] = source[j];
  T::Store(narrow, LoadAs<Vec>(rest));
  for (int64_t j = i; j < count; ++j) to[j] = narrow[j - i];
}

void Load(Number number, const void* source, int64_t count, float* target) {
  switch (number) {
    case Number::kFloat32: return LoadMany<Float32>(source, count, target);
    case Number::kBFloat16: return LoadMany<BFloat16>(source, count, target);
    case Number::kFloat16: return LoadMany<Float16>(source, count, target);
  }
}

void Store(Number number, const float* source, int64_t count, void* target) {
  switch (number) {
    case Number::kFloat32: return StoreMany<Float32>(source, count, target);
    case Number::kBFloat16: return StoreMany<BFloat16>(source, count, target);
    case Number::kFloat16: return StoreMany<Float16>(source, count, target);
  }
}

// -- quantized numbers ---------------------------------------------------------------------------

// Groups whose scales are converted at a time.
constexpr int64_t kScales = 64;

// float16 numbers as float32, without the instructions that some machines lack.
JAXSERVE_INLINE void Widen(const uint16_t* halves, int64_t count, float* out) {
  int64_t i = 0;
  if constexpr (kHasFloat16) {
    for (; i + kLanes <= count; i += kLanes) StoreAs(out + i, Float16::Load(halves + i));
  }
  for (; i < count; ++i) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
    out[i] = _cvtsh_ss(halves[i]);
#else
    const uint16_t half = halves[i];
    const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    if (exponent == 0) {  // Below 2^-14: a multiple of 2^-24.
      const float value = static_cast<float>(fraction) * 0x1p-24f;
      out[i] = sign ? -value : value;
    } else {
      const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
      out[i] = Bits<float>(sign | wide << 23 | fraction << 13);
    }
#endif
  }
}

#if defined(ISA_AVX512)
const Vec kSteps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#endif

typedef uint8_t VecB __attribute__((vector_size(kLanes)));
typedef int8_t VecS __attribute__((vector_size(kLanes)));

JAXSERVE_INLINE Vec LoadInt8(const int8_t* p) {
#if defined(ISA_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(LoadAs<__m128i>(p)));
#elif defined(ISA_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(LoadAs<VecS>(p), Vec);
#endif
}

JAXSERVE_INLINE VecI LoadBytes(const uint8_t* p) {
#if defined(ISA_AVX512)
  return Bits<VecI>(_mm512_cvtepu8_epi32(LoadAs<__m128i>(p)));
#elif defined(ISA_AVX2)
  return Bits<VecI>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(LoadAs<VecB>(p), VecI);
#endif
}

void ExpandInt8(const int8_t* values, const float* scale, int64_t groups, float* out) {
  for (int64_t group = 0; group < groups; ++group, values += kGroup, out += kGroup) {
    const Vec factor = Splat(scale[group]);
#pragma GCC unroll 8
    for (int64_t j = 0; j < kGroup; j += kLanes) StoreAs(out + j, LoadInt8(values + j) * factor);
  }
}

void ExpandInt4(const uint8_t* values, const float* scale, const float* minimum, int64_t groups,
                float* out) {
  for (int64_t group = 0; group < groups; ++group, values += kGroup / 2, out += kGroup) {
    const Vec factor = Splat(scale[group]), least = Splat(minimum[group]);
#if defined(ISA_AVX512)
    // The sixteen numbers that this group can have; a lookup minds the lower four bits alone.
    const __m512 choices = Fma(kSteps, factor, least);
    const __m512i pairs = Bits<__m512i>(LoadBytes(values));
    StoreAs(out, _mm512_permutexvar_ps(pairs, choices));
    StoreAs(out + 16, _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), choices));
#else
#pragma GCC unroll 8
    for (int64_t j = 0; j < kGroup / 2; j += kLanes) {
      const VecI pairs = LoadBytes(values + j);
      const Vec low = __builtin_convertvector(pairs & 15, Vec);
      const Vec high = __builtin_convertvector(pairs >> 4, Vec);
      StoreAs(out + j, Fma(low, factor, least));
      StoreAs(out + kGroup / 2 + j, Fma(high, factor, least));
    }
#endif
  }
}

void ExpandGroups(const Matrix& matrix, int64_t row, float* out) {
  const int64_t groups = matrix.depth / kGroup;
  const char* values = static_cast<const char*>(matrix.values) + row * matrix.row_bytes();
  const int64_t group_bytes = matrix.format == Format::kInt4 ? kGroup / 2 : kGroup;
  float scale[kScales], minimum[kScales];
  for (int64_t group = 0; group < groups; group += kScales) {
    const int64_t count = groups - group < kScales ? groups - group : kScales;
    const char* here = values + group * group_bytes;
    float* target = out + group * kGroup;
    Widen(matrix.scale + row * groups + group, count, scale);
    if (matrix.format == Format::kInt8) {
      ExpandInt8(reinterpret_cast<const int8_t*>(here), scale, count, target);
    } else {
      Widen(matrix.minimum + row * groups + group, count, minimum);
      ExpandInt4(reinterpret_cast<const uint8_t*>(here), scale, minimum, count, target);
    }
  }
}

void Expand(const Matrix& matrix, int64_t first, int64_t rows, float* out) {
  for (int64_t row = first; row < first + rows; ++row, out += matrix.depth) {
    if (matrix.format == Format::kNumber) {
      const char* values = static_cast<const char*>(matrix.values) + row * matrix.row_bytes();
      Load(matrix.number, values, matrix.depth, out);
    } else {
      ExpandGroups(matrix, row, out);
    }
  }
}

}  // namespace

extern const MatmulKernel kMatmulKernel;
const MatmulKernel kMatmulKernel = {Expand, MultiplyAll, Load, Store, kHasFloat16};

}  // namespace ISA_NAMESPACE
}  // namespace jaxserve
