// The arithmetic of products with stored matrices: what each instruction set implements.
//
// Pointers and sizes only, since kernel.cc takes no C++ standard header; matmul.cc decides which
// thread computes what.
#pragma once

#include <stdint.h>

#include "native/isa.h"
#include "native/number.h"

namespace jaxserve {

// Values that share one scale, along the depth.
constexpr int64_t kGroup = 32;

// What a sum runs over at a time: the depth is a multiple of it.
constexpr int64_t kDepthStep = 16;

// Numbers in a vector of float16, and what the depth becomes: the rest is zeros.
constexpr int64_t kHalves = 32;
static inline constexpr int64_t HalfDepth(int64_t depth) {
  return (depth + kHalves - 1) / kHalves * kHalves;
}

enum class Format : int {
  kNumber,  // Plain numbers.
  kInt8,    // scale * value, signed bytes.
  kInt4,    // scale * value + minimum; 32 values of 0 to 15 in 16 bytes, the lower halves first.
};

// Of the gate of a feed-forward.
enum class Activation : int {
  kSilu,
  kGelu,  // Its approximation by a hyperbolic tangent.
};

// A matrix [rows, depth] as it is stored, row by row.
struct Matrix {
  Format format;
  Number number;  // Of kNumber.
  const void* values;
  const uint16_t* scale;    // float16 [rows, depth / kGroup], or none
  const uint16_t* minimum;  // As scale, of kInt4 alone.
  int64_t rows;
  int64_t depth;

  int64_t row_bytes() const {
    return format == Format::kInt4 ? depth / 2
           : format == Format::kInt8 ? depth
                                     : depth * NumberBytes(number);
  }
};

// Products of plain numbers whose sums are float16 for a while. Rows of x and of the matrix are
// HalfDepth long.
struct HalfKernel {
  // out[HalfDepth(depth)] = x[depth] times a power of two, which brings the largest close to the
  // end of float16. Returns what undoes it.
  float (*narrow)(const float* x, int64_t depth, uint16_t* out);
  // As in MatmulKernel.
  void (*expand)(const Matrix& matrix, int64_t first, int64_t rows, uint16_t* out);
  void (*multiply)(int64_t depth, int64_t x_rows, const uint16_t* x, int64_t w_rows,
                   const uint16_t* w, float* out, int64_t out_stride);
  void (*multiply_row)(const Matrix& matrix, int64_t first, int64_t rows, const uint16_t* x,
                       float* out);
  // Multiplies answers by the factor; false if one of them is not finite.
  bool (*restore)(int64_t count, float factor, float* answers);
};

// Rows of the matrix that a panel of the next has.
constexpr int64_t kPanelRows = 32;

// Bytes of a row of x, and of a panel, in the form that they are multiplied in.
struct PanelSizes {
  int64_t x, panel;
};

// Products in about as few bits as the matrix has.
struct PanelKernel {
  // Whether it is meant for matrices of that format.
  bool (*takes)(const Matrix& matrix);
  PanelSizes (*sizes)(const Matrix& matrix);
  // Writes numbers first to first + count of a row of x, whole groups, to the row that begins at
  // `out`; x points at the first of them.
  void (*read_x)(const Matrix& matrix, const float* x, int64_t first, int64_t count, char* out);
  // out[x_rows, rows], with a stride, of up to kPanelRows rows of the matrix from the first on;
  // `memory` has room for a panel. Rows from `next` on are asked for meanwhile.
  void (*run)(const Matrix& matrix, int64_t x_rows, const char* x, int64_t first, int64_t rows,
              int64_t next, char* memory, float* out, int64_t out_stride);
};

// The best of a row's answers so far, those of every kBestLanes-th by themselves.
constexpr int64_t kBestLanes = 16;
struct BestLanes {
  float best[kBestLanes];
  int32_t place[kBestLanes];  // Of equals the lowest.
  float spoilt[kBestLanes];  // 0 if all were finite, or NaN.
};

struct MatmulKernel {
  // out[rows, depth]: rows of the matrix as float32, from the first on.
  void (*expand)(const Matrix& matrix, int64_t first, int64_t rows, float* out);
  // out[x_rows, w_rows] = x[x_rows, depth] w[w_rows, depth]^T, out with a stride.
  void (*multiply)(int64_t depth, int64_t x_rows, const float* x, int64_t w_rows, const float* w,
                   float* out, int64_t out_stride);
  // out[rows] = x[depth] w[rows, depth]^T of rows of the matrix from the first on, with the bits
  // that expand and multiply give.
  void (*multiply_row)(const Matrix& matrix, int64_t first, int64_t rows, const float* x,
                       float* out);
  // Copies of numbers, to and from float32.
  void (*load)(Number number, const void* source, int64_t count, float* target);
  void (*store)(Number number, const float* source, int64_t count, void* target);
  // gate = activation(gate) * up; the count is a multiple of kDepthStep.
  void (*gate)(Activation activation, int64_t count, const float* up, float* gate);
  // Goes on with the best of each row of x, given the answers[x_rows, rows], with a stride, of the
  // matrix's rows from the first on. Those before it were seen already.
  void (*keep_best)(int64_t first, int64_t x_rows, int64_t rows, const float* answers,
                    int64_t stride, BestLanes* kept);
  bool has_float16;
  const HalfKernel* halves;  // null: this instruction set has no arithmetic in float16
  const PanelKernel* panels;  // null: this instruction set sums no products of bytes
};

JAXSERVE_FOR_EACH_ISA(extern const MatmulKernel kMatmulKernel;)

}  // namespace jaxserve
