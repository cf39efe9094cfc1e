#include "matmul.h"

#include <algorithm>

#include "native/memory.h"

namespace jaxserve {
namespace {

// Multiplications that one thread does sooner than another one wakes up: about 10 microseconds.
constexpr int64_t kAloneProducts = 1 << 18;
// Of x, up to which each row of the matrix is used while it is in the first cache.
constexpr int64_t kFewRows = 6;
// A panel in float32: what fits the first cache with few rows, the second with many.
constexpr int64_t kSmallPanelFloats = 6 << 10, kPanelFloats = 96 << 10;
constexpr int64_t kMaxPanelRows = 64;
// Stored bytes that a thread takes at a time when x has few rows.
constexpr int64_t kTakenBytes = 32 << 10;

struct PanelMemory;
struct XMemory;

int64_t PanelRows(const Matmul& m) {
  const int64_t floats = m.x_rows <= kFewRows ? kSmallPanelFloats : kPanelFloats;
  return std::clamp<int64_t>(floats / m.matrix.depth / 4 * 4, 4, kMaxPanelRows);
}

void RunPanel(const Matmul& m, const MatmulKernel& kernel, const float* x, int64_t first,
              int64_t rows) {
  const Matrix& matrix = m.matrix;
  const bool writes_float = m.out_number == Number::kFloat32;
  float* memory = ThreadMemory<PanelMemory>(rows * (matrix.depth + m.x_rows));
  float* answers = memory + rows * matrix.depth;
  int64_t stride = rows;
  if (writes_float) {
    answers = static_cast<float*>(m.out) + first;
    stride = matrix.rows;
  }
  if (m.x_rows == 1) {
    kernel.multiply_row(matrix, first, rows, x, answers);
  } else {
    const float* panel = static_cast<const float*>(matrix.values) + first * matrix.depth;
    if (matrix.format != Format::kNumber || matrix.number != Number::kFloat32) {
      kernel.expand(matrix, first, rows, memory);
      panel = memory;
    }
    kernel.multiply(matrix.depth, m.x_rows, x, rows, panel, answers, stride);
  }
  if (writes_float) return;
  for (int64_t row = 0; row < m.x_rows; ++row) {
    char* target = static_cast<char*>(m.out) +
                   (row * matrix.rows + first) * NumberBytes(m.out_number);
    kernel.store(m.out_number, answers + row * stride, rows, target);
  }
}

}  // namespace

Matrix LayerOf(Matrix stack, int64_t layers, int64_t layer) {
  const int64_t rows = std::clamp<int64_t>(layer, 0, layers - 1) * stack.rows;
  stack.values = static_cast<const char*>(stack.values) + rows * stack.row_bytes();
  const int64_t groups = rows * (stack.depth / kGroup);
  if (stack.format != Format::kNumber) stack.scale += groups;
  if (stack.format == Format::kInt4) stack.minimum += groups;
  return stack;
}

const char* WhyNotMultiply(const Matmul& m, const MatmulKernel& kernel) {
  const int64_t step = m.matrix.format == Format::kNumber ? kDepthStep : kGroup;
  if (m.matrix.depth % step != 0) return "the depth is not a multiple of 16, or of a group of 32";
  const bool has_float16 = m.x_number == Number::kFloat16 || m.out_number == Number::kFloat16 ||
                           m.matrix.number == Number::kFloat16;
  if (has_float16 && !kernel.has_float16) return "no float16 on this instruction set";
  return nullptr;
}

void RunMatmul(const Matmul& m, const MatmulKernel& kernel, Executor& executor) {
  const Matrix& matrix = m.matrix;
  const int64_t products = m.x_rows * matrix.rows * matrix.depth;
  if (products == 0) return;
  const float* x = static_cast<const float*>(m.x);
  if (m.x_number != Number::kFloat32) {
    float* wide = ThreadMemory<XMemory>(m.x_rows * matrix.depth);
    kernel.load(m.x_number, m.x, m.x_rows * matrix.depth, wide);
    x = wide;
  }
  const int64_t panel_rows = PanelRows(m);
  const int64_t panels = (matrix.rows + panel_rows - 1) / panel_rows;
  int64_t taken = 1;  // Panels at a time.
  if (m.x_rows <= kFewRows) {
    taken = std::max<int64_t>(kTakenBytes / (panel_rows * matrix.row_bytes()), 1);
  }
  const auto run = [&](int64_t item) {
    const int64_t last = std::min((item + 1) * taken, panels);
    for (int64_t panel = item * taken; panel < last; ++panel) {
      const int64_t first = panel * panel_rows;
      RunPanel(m, kernel, x, first, std::min(panel_rows, matrix.rows - first));
    }
  };
  const int64_t items = (panels + taken - 1) / taken;
  if (products <= kAloneProducts || executor.threads() <= 1) {
    SerialFor(items, run);
  } else {
    ParallelFor(executor, items, run);
  }
}

const MatmulKernel& CurrentMatmulKernel() {
  static const MatmulKernel* const kernels[] = JAXSERVE_BY_ISA(kMatmulKernel);
  return *kernels[static_cast<int>(CurrentIsa())];
}

}  // namespace jaxserve
