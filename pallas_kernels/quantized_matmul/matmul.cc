#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

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

// Numbers of x that a thread reads at a time.
constexpr int64_t kTakenNumbers = 32 << 10;

// Panels that a thread takes at a time at most, if only the best of their answers is wanted: what is
// done once for them takes a fraction of what is done for each.
constexpr int64_t kBestPanels = 16;

struct PanelMemory;
struct XMemory;
struct FactorMemory;
struct RowMemory;
struct HiddenMemory;
struct LanesMemory;
struct BestMemory;

int64_t Products(const Matmul& m) { return m.x_rows * m.matrix.rows * m.matrix.depth; }

enum class Method { kWide, kHalves, kPanels };

Method MethodOf(const Matmul& m, const MatmulKernel& kernel) {
  if (!m.narrow) return Method::kWide;
  if (kernel.panels && kernel.panels->takes(m.matrix)) return Method::kPanels;
  const bool is_short = m.matrix.format == Format::kNumber && m.matrix.number != Number::kFloat32;
  return kernel.halves && is_short ? Method::kHalves : Method::kWide;
}

int64_t PanelRows(const Matmul& m, Method method) {
  if (method == Method::kPanels) return kPanelRows;
  const int64_t floats = m.x_rows <= kFewRows ? kSmallPanelFloats : kPanelFloats;
  return std::clamp<int64_t>(floats / m.matrix.depth / 4 * 4, 4, kMaxPanelRows);
}

// The rows of x as a kernel reads them, made once for all panels.
struct Rows {
  Method method;
  const void* numbers;   // float32, float16, or what PanelKernel says.
  const float* factors;  // Of each row of float16, that undoes what it was multiplied by.
};

// answers[x_rows, rows], with a stride, from float32.
void MultiplyWide(const Matmul& m, const MatmulKernel& kernel, const float* x, int64_t first,
                  int64_t rows, float* memory, float* answers, int64_t stride) {
  const Matrix& matrix = m.matrix;
  if (m.x_rows == 1) return kernel.multiply_row(matrix, first, rows, x, answers);
  const float* panel = static_cast<const float*>(matrix.values) + first * matrix.depth;
  if (matrix.format != Format::kNumber || matrix.number != Number::kFloat32) {
    kernel.expand(matrix, first, rows, memory);
    panel = memory;
  }
  kernel.multiply(matrix.depth, m.x_rows, x, rows, panel, answers, stride);
}

// Computes again in float32 what float16 was too small for, each number by itself.
void MendRow(const Matmul& m, const MatmulKernel& kernel, int64_t x_row, int64_t first,
             int64_t rows, float* answers) {
  const int64_t depth = m.matrix.depth;
  float* x = ThreadMemory<RowMemory>(depth);
  const char* source = static_cast<const char*>(m.x) + x_row * depth * NumberBytes(m.x_number);
  kernel.load(m.x_number, source, depth, x);
  for (int64_t row = 0; row < rows; ++row) {
    if (std::isfinite(answers[row])) continue;
    kernel.multiply_row(m.matrix, first + row, 1, x, answers + row);
  }
}

// The same from float16.
void MultiplyHalves(const Matmul& m, const MatmulKernel& kernel, const Rows& x, int64_t first,
                    int64_t rows, float* memory, float* answers, int64_t stride) {
  const HalfKernel& halves = *kernel.halves;
  const auto* numbers = static_cast<const uint16_t*>(x.numbers);
  if (m.x_rows == 1) {
    halves.multiply_row(m.matrix, first, rows, numbers, answers);
  } else {
    auto* panel = reinterpret_cast<uint16_t*>(memory);
    halves.expand(m.matrix, first, rows, panel);
    halves.multiply(m.matrix.depth, m.x_rows, numbers, rows, panel, answers, stride);
  }
  for (int64_t row = 0; row < m.x_rows; ++row) {
    float* some = answers + row * stride;
    if (!halves.restore(rows, x.factors[row], some)) MendRow(m, kernel, row, first, rows, some);
  }
}

// Of a panel's memory, beside the answers.
int64_t PanelFloats(const Matmul& m, const MatmulKernel& kernel, Method method, int64_t rows) {
  if (method != Method::kPanels) return rows * HalfDepth(m.matrix.depth);
  return kernel.panels->sizes(m.matrix).panel / sizeof(float);
}

// answers[x_rows, rows], with a stride, of rows of the matrix from the first on; `next` is where the
// thread probably goes on.
void Answer(const Matmul& m, const MatmulKernel& kernel, const Rows& x, int64_t first, int64_t rows,
            int64_t next, float* memory, float* answers, int64_t stride) {
  switch (x.method) {
    case Method::kWide:
      return MultiplyWide(m, kernel, static_cast<const float*>(x.numbers), first, rows, memory,
                          answers, stride);
    case Method::kHalves:
      return MultiplyHalves(m, kernel, x, first, rows, memory, answers, stride);
    case Method::kPanels:
      return kernel.panels->run(m.matrix, m.x_rows, static_cast<const char*>(x.numbers), first,
                                rows, next, reinterpret_cast<char*>(memory), answers, stride);
  }
}

// -- the best answers ----------------------------------------------------------------------------

// The best of a row's answers in some panels.
struct Best {
  float best;
  int32_t place;
  int32_t is_finite;
};

// Goes on with answers that all come later, or are those of no panel yet.
void Merge(Best& to, const Best& later) {
  if (later.best > to.best) to.best = later.best, to.place = later.place;
  to.is_finite &= later.is_finite;
}

constexpr Best kNoAnswers = {-std::numeric_limits<float>::infinity(), 0, 1};

// Of each row of x, before any answer; lives until the thread asks for another.
BestLanes* NoBestLanes(int64_t x_rows) {
  constexpr int64_t kFloats = sizeof(BestLanes) / sizeof(float);
  auto* kept = reinterpret_cast<BestLanes*>(ThreadMemory<LanesMemory>(x_rows * kFloats));
  BestLanes none = {};
  std::fill_n(none.best, kBestLanes, kNoAnswers.best);
  std::fill_n(kept, x_rows, none);
  return kept;
}

// Lanes are merged in no order of their places.
Best BestOf(const BestLanes& kept) {
  Best result = kNoAnswers;
  for (int64_t lane = 0; lane < kBestLanes; ++lane) {
    const bool is_first = kept.best[lane] == result.best && kept.place[lane] < result.place;
    if (kept.best[lane] > result.best || is_first) {
      result.best = kept.best[lane], result.place = kept.place[lane];
    }
    result.is_finite &= kept.spoilt[lane] == 0;
  }
  return result;
}

// So many, which live until the thread asks for others.
Best* BestsOfItems(int64_t count) {
  constexpr int64_t kFloats = sizeof(Best) / sizeof(float);
  return reinterpret_cast<Best*>(ThreadMemory<BestMemory>(count * kFloats));
}

// The best of the items' bests [items, x_rows].
void WriteBests(const Matmul& m, int64_t items, const Best* bests) {
  for (int64_t row = 0; row < m.x_rows; ++row) {
    Best best = kNoAnswers;
    for (int64_t item = 0; item < items; ++item) Merge(best, bests[item * m.x_rows + row]);
    m.bests->best[row] = best.best;
    m.bests->place[row] = best.place;
    m.bests->is_finite[row] = best.is_finite;
  }
}

// -- panels --------------------------------------------------------------------------------------

// What is done with the answers of rows of the matrix from the first on: they are stored, or the
// best of them go to `kept`.
void RunPanel(const Matmul& m, const MatmulKernel& kernel, const Rows& x, int64_t first,
              int64_t rows, int64_t next, BestLanes* kept) {
  const Matrix& matrix = m.matrix;
  const int64_t floats = PanelFloats(m, kernel, x.method, rows);
  if (m.out_number == Number::kFloat32 && !m.bests) {
    float* memory = ThreadMemory<PanelMemory>(floats);
    return Answer(m, kernel, x, first, rows, next, memory, static_cast<float*>(m.out) + first,
                  matrix.rows);
  }
  float* memory = ThreadMemory<PanelMemory>(floats + rows * m.x_rows);
  float* answers = memory + floats;
  Answer(m, kernel, x, first, rows, next, memory, answers, rows);
  if (m.bests) return kernel.keep_best(first, m.x_rows, rows, answers, rows, kept);
  for (int64_t row = 0; row < m.x_rows; ++row) {
    char* target = static_cast<char*>(m.out) +
                   (row * matrix.rows + first) * NumberBytes(m.out_number);
    kernel.store(m.out_number, answers + row * rows, rows, target);
  }
}

// Calls each(row, its numbers as they are stored), on several threads where there are many.
template <typename Each>
void ForRows(const Matmul& m, Executor& executor, const Each& each) {
  const int64_t row_bytes = m.matrix.depth * NumberBytes(m.x_number);
  const int64_t taken = std::max<int64_t>(kTakenNumbers / m.matrix.depth, 1);
  const int64_t items = (m.x_rows + taken - 1) / taken;
  const auto run = [&](int64_t item) {
    const int64_t last = std::min((item + 1) * taken, m.x_rows);
    for (int64_t row = item * taken; row < last; ++row) {
      each(row, static_cast<const char*>(m.x) + row * row_bytes);
    }
  };
  if (items == 1 || executor.threads() <= 1) {
    SerialFor(items, run);
  } else {
    ParallelFor(executor, items, run);
  }
}

// A row of x in float32, which lives until the thread asks for another.
const float* WideRow(const Matmul& m, const MatmulKernel& kernel, const char* source) {
  if (m.x_number == Number::kFloat32) return reinterpret_cast<const float*>(source);
  float* wide = ThreadMemory<RowMemory>(m.matrix.depth);
  kernel.load(m.x_number, source, m.matrix.depth, wide);
  return wide;
}

// What the next three return lives until the thread asks for another.
Rows ReadWide(const Matmul& m, const MatmulKernel& kernel, Executor& executor) {
  if (m.x_number == Number::kFloat32) return {Method::kWide, m.x, nullptr};
  const int64_t depth = m.matrix.depth;
  float* wide = ThreadMemory<XMemory>(m.x_rows * depth);
  ForRows(m, executor, [&](int64_t row, const char* source) {
    kernel.load(m.x_number, source, depth, wide + row * depth);
  });
  return {Method::kWide, wide, nullptr};
}

Rows ReadHalves(const Matmul& m, const MatmulKernel& kernel, Executor& executor) {
  const int64_t depth = m.matrix.depth, half_depth = HalfDepth(depth);
  float* factors = ThreadMemory<FactorMemory>(m.x_rows);
  auto* halves = reinterpret_cast<uint16_t*>(ThreadMemory<XMemory>(m.x_rows * half_depth / 2));
  ForRows(m, executor, [&](int64_t row, const char* source) {
    const float* wide = WideRow(m, kernel, source);
    factors[row] = kernel.halves->narrow(wide, depth, halves + row * half_depth);
  });
  return {Method::kHalves, halves, factors};
}

Rows ReadForPanels(const Matmul& m, const MatmulKernel& kernel, Executor& executor) {
  const int64_t bytes = kernel.panels->sizes(m.matrix).x;
  auto* rows = reinterpret_cast<char*>(ThreadMemory<XMemory>(m.x_rows * bytes / sizeof(float)));
  ForRows(m, executor, [&](int64_t row, const char* source) {
    const float* wide = WideRow(m, kernel, source);
    kernel.panels->read_x(m.matrix, wide, 0, m.matrix.depth, rows + row * bytes);
  });
  return {Method::kPanels, rows, nullptr};
}

Rows Read(const Matmul& m, const MatmulKernel& kernel, Executor& executor) {
  switch (MethodOf(m, kernel)) {
    case Method::kHalves: return ReadHalves(m, kernel, executor);
    case Method::kPanels: return ReadForPanels(m, kernel, executor);
    case Method::kWide: break;
  }
  return ReadWide(m, kernel, executor);
}

// Work that is so short stays on its thread.
bool IsAlone(const Matmul& m, const Executor& executor) {
  return Products(m) <= kAloneProducts || executor.threads() <= 1;
}

// Runs the items of a product.
void RunItems(const Matmul& m, Executor& executor, int64_t items,
              const std::function<void(int64_t)>& run) {
  if (IsAlone(m, executor)) {
    SerialFor(items, run);
  } else {
    ParallelFor(executor, items, run);
  }
}

// The product, once the rows of x are read.
void Multiply(const Matmul& m, const MatmulKernel& kernel, const Rows& x, Executor& executor) {
  const Matrix& matrix = m.matrix;
  const int64_t panel_rows = PanelRows(m, x.method);
  const int64_t panels = (matrix.rows + panel_rows - 1) / panel_rows;
  int64_t taken = 1;  // Panels at a time.
  if (m.x_rows <= kFewRows) {
    taken = std::max<int64_t>(kTakenBytes / (panel_rows * matrix.row_bytes()), 1);
  }
  if (m.bests) {
    const int64_t shares = panels / (8 * std::max<int64_t>(executor.threads(), 1));
    taken = std::max(taken, std::min(shares, kBestPanels));
  }
  const int64_t items = (panels + taken - 1) / taken;
  Best* bests = m.bests ? BestsOfItems(items * m.x_rows) : nullptr;
  const auto run = [&](int64_t item) {
    const int64_t last = std::min((item + 1) * taken, panels);
    BestLanes* kept = m.bests ? NoBestLanes(m.x_rows) : nullptr;
    for (int64_t panel = item * taken; panel < last; ++panel) {
      const int64_t first = panel * panel_rows;
      // Others take the items in between. There may be fewer panels: then this one is in the cache.
      const int64_t next = panel + 1 < last ? panel + 1 : (item + executor.threads()) * taken;
      RunPanel(m, kernel, x, first, std::min(panel_rows, matrix.rows - first),
               next < panels ? next * panel_rows : first, kept);
    }
    if (m.bests) std::transform(kept, kept + m.x_rows, bests + item * m.x_rows, BestOf);
  };
  RunItems(m, executor, items, run);
  if (m.bests) WriteBests(m, items, bests);
}

// -- the feed-forward ----------------------------------------------------------------------------

// Its products: what comes of the first is float32.
Matmul FirstOf(const FeedForward& f) {
  return {f.gate_up, f.x_number, f.x, Number::kFloat32, nullptr, f.x_rows, f.narrow};
}
Matmul SecondOf(const FeedForward& f) {
  return {f.down, Number::kFloat32, nullptr, f.out_number, f.out, f.x_rows, f.narrow};
}

// Hidden numbers that a thread computes at a time: rows of the gate, and as many of what it gates.
constexpr int64_t kPieceRows = kPanelRows;
static_assert(kPieceRows % kGroup == 0, "a piece has whole groups of the second product");

// The rows of the second product: what was gated, in the form that it is multiplied in.
struct Hidden {
  const Matmul& product;
  const MatmulKernel& kernel;
  Method method;
  int64_t row_bytes;
  char* rows;

  // Numbers first to first + count of a row.
  void Write(int64_t row, int64_t first, int64_t count, const float* numbers) const {
    char* target = rows + row * row_bytes;
    if (method == Method::kPanels) {
      kernel.panels->read_x(product.matrix, numbers, first, count, target);
    } else {
      std::memcpy(target + first * sizeof(float), numbers, count * sizeof(float));
    }
  }
};

Hidden HiddenOf(const Matmul& second, const MatmulKernel& kernel) {
  const Method method = MethodOf(second, kernel);
  const int64_t row_bytes = method == Method::kPanels
                                ? kernel.panels->sizes(second.matrix).x
                                : second.matrix.depth * static_cast<int64_t>(sizeof(float));
  float* rows = ThreadMemory<HiddenMemory>(second.x_rows * row_bytes / sizeof(float));
  return {second, kernel, method, row_bytes, reinterpret_cast<char*>(rows)};
}

// Hidden numbers from first on, of all rows.
void RunPiece(const Matmul& m, Activation activation, const MatmulKernel& kernel, const Rows& x,
              int64_t first, int64_t next, const Hidden& hidden) {
  const int64_t ffn = m.matrix.rows / 2, rows = std::min(kPieceRows, ffn - first);
  const int64_t panel_rows = PanelRows(m, x.method);
  const int64_t floats = PanelFloats(m, kernel, x.method, std::min(panel_rows, rows));
  float* memory = ThreadMemory<PanelMemory>(floats + 2 * rows * m.x_rows);
  float* gate = memory + floats;
  float* up = gate + rows * m.x_rows;
  for (int64_t at = 0; at < rows; at += panel_rows) {
    const int64_t count = std::min(panel_rows, rows - at), row = first + at;
    Answer(m, kernel, x, row, count, ffn + row, memory, gate + at, rows);
    Answer(m, kernel, x, ffn + row, count, next + at, memory, up + at, rows);
  }
  for (int64_t row = 0; row < m.x_rows; ++row) {
    kernel.gate(activation, rows, up + row * rows, gate + row * rows);
    hidden.Write(row, first, rows, gate + row * rows);
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

const char* WhyNotFeedForward(const FeedForward& f, const MatmulKernel& kernel) {
  if (f.gate_up.rows != 2 * f.down.depth) return "not two rows for each number of the second depth";
  const char* reason = WhyNotMultiply(FirstOf(f), kernel);
  return reason ? reason : WhyNotMultiply(SecondOf(f), kernel);
}

void RunMatmul(const Matmul& m, const MatmulKernel& kernel, Executor& executor) {
  if (Products(m) == 0) {
    if (m.bests) WriteBests(m, 0, nullptr);
    return;
  }
  Multiply(m, kernel, Read(m, kernel, executor), executor);
}

void RunFeedForward(const FeedForward& f, const MatmulKernel& kernel, Executor& executor) {
  const Matmul first = FirstOf(f);
  Matmul second = SecondOf(f);
  const int64_t ffn = f.down.depth;
  if (Products(first) == 0) return;
  const Rows x = Read(first, kernel, executor);
  const Hidden hidden = HiddenOf(second, kernel);
  const int64_t pieces = (ffn + kPieceRows - 1) / kPieceRows;
  const int64_t step = IsAlone(first, executor) ? 1 : executor.threads();
  RunItems(first, executor, pieces, [&](int64_t piece) {
    const int64_t next = piece + step < pieces ? piece + step : piece;
    RunPiece(first, f.activation, kernel, x, piece * kPieceRows, next * kPieceRows, hidden);
  });
  second.x = hidden.rows;
  const bool is_read = hidden.method == Method::kPanels;
  Multiply(second, kernel, is_read ? Rows{hidden.method, hidden.rows, nullptr}
                                   : Read(second, kernel, executor), executor);
}

const MatmulKernel& CurrentMatmulKernel() {
  static const MatmulKernel* const kernels[] = JAXSERVE_BY_ISA(kMatmulKernel);
  return *kernels[static_cast<int>(CurrentIsa())];
}

}  // namespace jaxserve
