// Dot products of rows in float32, several rows of each side at a time.
//
// Every number of an answer is one chain of operations, the same in any block: each lane sums every
// kLanes-th product in order, then a tree over the lanes. What stands beside it leaves no trace.
#include "kernel.h"

#include "blocks.h"
#include "native/simd.h"
#if defined(ISA_AVX512FP16)
#include "halves.h"
#endif
#if defined(ISA_AVX512VNNI)
#include "panels.h"
#endif

namespace jaxserve {
namespace ISA_NAMESPACE {
namespace {

// -- products ------------------------------------------------------------------------------------

template <typename T, int X_ROWS, int W_ROWS>
void Multiply(int64_t depth, const float* x, const typename T::Storage* w, float* out,
              int64_t out_stride) {
  Vec sum[X_ROWS][W_ROWS];
#pragma GCC unroll 8
  for (int m = 0; m < X_ROWS; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < W_ROWS; ++n) sum[m][n] = Splat(0);
  }
  for (int64_t d = 0; d < depth; d += kLanes) {
    Vec right[W_ROWS];
#pragma GCC unroll 8
    for (int n = 0; n < W_ROWS; ++n) right[n] = T::Load(w + n * depth + d);
    if constexpr (X_ROWS == 1 && W_ROWS == kRowsAlone) {
      // Of the next rows. Several streams in one page are more than the machine foresees.
      constexpr int64_t kBytes = sizeof(typename T::Storage);
      Prefetch<W_ROWS * kLanes * kBytes, kGroup * kBytes>(w + W_ROWS * (depth + d));
    }
#pragma GCC unroll 8
    for (int m = 0; m < X_ROWS; ++m) {
      const Vec left = LoadAs<Vec>(x + m * depth + d);
#pragma GCC unroll 8
      for (int n = 0; n < W_ROWS; ++n) sum[m][n] = Fma(left, right[n], sum[m][n]);
    }
  }
  StoreSums<X_ROWS, W_ROWS>(sum, out, out_stride);
}

using Multiplier = void (*)(int64_t, const float*, const float*, float*, int64_t);

template <int W_ROWS>
constexpr Multiplier kMultipliers[] = {
    Multiply<Float32, 1, W_ROWS>, Multiply<Float32, 2, W_ROWS>,
#if defined(ISA_AVX512)
    Multiply<Float32, 3, W_ROWS>, Multiply<Float32, 4, W_ROWS>,
    Multiply<Float32, 5, W_ROWS>, Multiply<Float32, 6, W_ROWS>,
#endif
};

void MultiplyAll(int64_t depth, int64_t x_rows, const float* x, int64_t w_rows, const float* w,
                 float* out, int64_t out_stride) {
  for (int64_t m = 0; m < x_rows; m += kXRows) {
    const int64_t left = x_rows - m < kXRows ? x_rows - m : kXRows;
    int64_t n = 0;
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

// -- the best answer -----------------------------------------------------------------------------

// Up to kLanes numbers; what is missing is as the first, which comes before it.
JAXSERVE_INLINE Vec LoadOrFirst(const float* from, int64_t count) {
  if (count >= kLanes) return LoadAs<Vec>(from);
#if defined(ISA_AVX512)
  const __mmask16 here = First(count);
  return _mm512_mask_mov_ps(Splat(*from), here, Bits<Vec>(LoadSome(here, from)));
#else
  float some[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) some[i] = from[i < count ? i : 0];
  return LoadAs<Vec>(some);
#endif
}

void KeepBest(int64_t first, int64_t x_rows, int64_t rows, const float* answers, int64_t stride,
              BestLanes* kept) {
  for (int64_t m = 0; m < x_rows; ++m, answers += stride, ++kept) {
    for (int lane = 0; lane < kBestLanes; lane += kLanes) {
      Vec best = LoadAs<Vec>(kept->best + lane), spoilt = LoadAs<Vec>(kept->spoilt + lane);
      VecI place = LoadAs<VecI>(kept->place + lane);
      for (int64_t n = lane; n < rows; n += kBestLanes) {
        const Vec some = LoadOrFirst(answers + n, rows - n);
        const VecI is_better = some > best;
        best = Select(is_better, some, best);
        place = is_better ? LaneNumbers() + SplatI(static_cast<int32_t>(first + n)) : place;
        spoilt = Fma(some, Splat(0), spoilt);
      }
      StoreAs(kept->best + lane, best);
      StoreAs(kept->place + lane, place);
      StoreAs(kept->spoilt + lane, spoilt);
    }
  }
}

// -- quantized numbers ---------------------------------------------------------------------------

// Groups whose scales are converted at a time.
constexpr int64_t kScales = 64;
// Vectors that hold a group.
constexpr int kVecs = kGroup / kLanes;

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

JAXSERVE_INLINE VecI LoadBytes(const uint8_t* p) {
#if defined(ISA_AVX512)
  return Bits<VecI>(_mm512_cvtepu8_epi32(LoadAs<__m128i>(p)));
#elif defined(ISA_AVX2)
  return Bits<VecI>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(LoadAs<VecB>(p), VecI);
#endif
}

// One group as float32 vectors, in order.
struct Int8Group {
  static constexpr int64_t kBytes = kGroup;
  static constexpr bool kHasMinimum = false;
  static JAXSERVE_INLINE void Load(const char* values, float scale, float, Vec (&out)[kVecs]) {
    const Vec factor = Splat(scale);
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      out[j] = Int8::Load(reinterpret_cast<const int8_t*>(values) + j * kLanes) * factor;
    }
  }
};

struct Int4Group {
  static constexpr int64_t kBytes = kGroup / 2;
  static constexpr bool kHasMinimum = true;
  static JAXSERVE_INLINE void Load(const char* values, float scale, float minimum,
                                   Vec (&out)[kVecs]) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(values);
    const Vec factor = Splat(scale), least = Splat(minimum);
#if defined(ISA_AVX512)
    // The sixteen numbers that this group can have; a lookup minds the lower four bits alone.
    const __m512 choices = Fma(kSteps, factor, least);
    const __m512i pairs = Bits<__m512i>(LoadBytes(bytes));
    out[0] = _mm512_permutexvar_ps(pairs, choices);
    out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), choices);
#else
#pragma GCC unroll 8
    for (int j = 0; j < kVecs / 2; ++j) {
      const VecI pairs = LoadBytes(bytes + j * kLanes);
      out[j] = Fma(__builtin_convertvector(pairs & 15, Vec), factor, least);
      out[kVecs / 2 + j] = Fma(__builtin_convertvector(pairs >> 4, Vec), factor, least);
    }
#endif
  }
};

template <typename G>
void ExpandGroups(const Matrix& matrix, int64_t row, float* out) {
  const int64_t groups = matrix.depth / kGroup;
  const char* values = static_cast<const char*>(matrix.values) + row * matrix.row_bytes();
  float scale[kScales], minimum[kScales] = {};
  for (int64_t first = 0; first < groups; first += kScales) {
    const int64_t count = groups - first < kScales ? groups - first : kScales;
    Widen(matrix.scale + row * groups + first, count, scale);
    if (G::kHasMinimum) Widen(matrix.minimum + row * groups + first, count, minimum);
    for (int64_t i = 0; i < count; ++i, values += G::kBytes, out += kGroup) {
      Vec group[kVecs];
      G::Load(values, scale[i], minimum[i], group);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) StoreAs(out + j * kLanes, group[j]);
    }
  }
}

void Expand(const Matrix& matrix, int64_t first, int64_t rows, float* out) {
  for (int64_t row = first; row < first + rows; ++row, out += matrix.depth) {
    switch (matrix.format) {
      case Format::kInt8: ExpandGroups<Int8Group>(matrix, row, out); break;
      case Format::kInt4: ExpandGroups<Int4Group>(matrix, row, out); break;
      case Format::kNumber: {
        const char* values = static_cast<const char*>(matrix.values) + row * matrix.row_bytes();
        Load(matrix.number, values, matrix.depth, out);
      }
    }
  }
}

// -- one row of x: each number of the matrix is used where it is loaded --------------------------

template <typename G, int ROWS>
void MultiplyGroups(const Matrix& matrix, int64_t first, const float* x, float* out) {
  const int64_t groups = matrix.depth / kGroup, row_bytes = matrix.row_bytes();
  const char* values = static_cast<const char*>(matrix.values) + first * row_bytes;
  const char* next = values + ROWS * row_bytes;
  Vec sum[1][ROWS];
#pragma GCC unroll 8
  for (int n = 0; n < ROWS; ++n) sum[0][n] = Splat(0);
  float scale[ROWS][kScales], minimum[ROWS][kScales];
  for (int64_t start = 0; start < groups; start += kScales) {
    const int64_t count = groups - start < kScales ? groups - start : kScales;
    for (int n = 0; n < ROWS; ++n) {
      const int64_t where = (first + n) * groups + start;
      Widen(matrix.scale + where, count, scale[n]);
      if (G::kHasMinimum) Widen(matrix.minimum + where, count, minimum[n]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = (start + i) * G::kBytes;
      Vec left[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) left[j] = LoadAs<Vec>(x + (start + i) * kGroup + j * kLanes);
#pragma GCC unroll 8
      for (int n = 0; n < ROWS; ++n) {
        const char* here = values + n * row_bytes + offset;
        Vec right[kVecs];
        G::Load(here, scale[n][i], G::kHasMinimum ? minimum[n][i] : 0, right);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sum[0][n] = Fma(left[j], right[j], sum[0][n]);
      }
      Prefetch<ROWS * G::kBytes, G::kBytes>(next + offset * ROWS);
    }
  }
  StoreSums<1, ROWS>(sum, out, ROWS);
}

template <typename T, int ROWS>
void MultiplyNumbers(const Matrix& matrix, int64_t first, const float* x, float* out) {
  const auto* w = static_cast<const typename T::Storage*>(matrix.values) + first * matrix.depth;
  Multiply<T, 1, ROWS>(matrix.depth, x, w, out, ROWS);
}

template <int ROWS>
void MultiplySome(const Matrix& matrix, int64_t first, const float* x, float* out) {
  switch (matrix.format) {
    case Format::kInt8: return MultiplyGroups<Int8Group, ROWS>(matrix, first, x, out);
    case Format::kInt4: return MultiplyGroups<Int4Group, ROWS>(matrix, first, x, out);
    case Format::kNumber: break;
  }
  switch (matrix.number) {
    case Number::kFloat32: return MultiplyNumbers<Float32, ROWS>(matrix, first, x, out);
    case Number::kBFloat16: return MultiplyNumbers<BFloat16, ROWS>(matrix, first, x, out);
    case Number::kFloat16: return MultiplyNumbers<Float16, ROWS>(matrix, first, x, out);
  }
}

void MultiplyRow(const Matrix& matrix, int64_t first, int64_t rows, const float* x, float* out) {
  int64_t row = 0;
  for (; row + kRowsAlone <= rows; row += kRowsAlone) {
    MultiplySome<kRowsAlone>(matrix, first + row, x, out + row);
  }
  for (; row < rows; ++row) MultiplySome<1>(matrix, first + row, x, out + row);
}

// -- the feed-forward ----------------------------------------------------------------------------

template <typename F>
void GateBy(const F& activation, int64_t count, const float* up, float* gate) {
  for (int64_t i = 0; i < count; i += kLanes) {
    StoreAs(gate + i, activation(LoadAs<Vec>(gate + i)) * LoadAs<Vec>(up + i));
  }
}

void Gate(Activation activation, int64_t count, const float* up, float* gate) {
  if (activation == Activation::kSilu) {
    // Exp ends at 88: what is below -88 becomes a number of 1e-37 where it should be 0.
    GateBy([](Vec x) { return x / (Exp(-x) + Splat(1)); }, count, up, gate);
  } else {  // Hendrycks and Gimpel 2016, "Gaussian error linear units".
    GateBy(
        [](Vec x) {
          const Vec cubic = Fma(x * x * x, Splat(0.044715f), x);
          return x * Splat(0.5f) * (Tanh(cubic * Splat(0.7978845608f)) + Splat(1));
        },
        count, up, gate);
  }
}

}  // namespace

#if defined(ISA_AVX512FP16)
constexpr HalfKernel kHalfKernel = {NarrowRow, ExpandHalves, MultiplyHalves, MultiplyRowHalves,
                                    Restore};
constexpr const HalfKernel* kHalfKernelHere = &kHalfKernel;
#else
constexpr const HalfKernel* kHalfKernelHere = nullptr;
#endif
#if defined(ISA_AVX512VNNI)
constexpr PanelKernel kPanelKernel = {TakesPanels, SizesOfPanels, ReadX, RunPanel};
constexpr const PanelKernel* kPanelKernelHere = &kPanelKernel;
#else
constexpr const PanelKernel* kPanelKernelHere = nullptr;
#endif

extern const MatmulKernel kMatmulKernel;
const MatmulKernel kMatmulKernel = {Expand, MultiplyAll, MultiplyRow, Load,
                                    Store,  Gate,        KeepBest,    kHasFloat16,
                                    kHalfKernelHere,     kPanelKernelHere};

}  // namespace ISA_NAMESPACE
}  // namespace jaxserve
