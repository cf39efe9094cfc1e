// The products of native_check.cc: equal to the reference's answers, and the same bits on any
// number of threads, beside any other rows, and while others multiply on the same threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "native_check.h"
#include "quantized_matmul/matmul.h"

namespace jaxserve {

// What a product's line in the file begins with.
constexpr char kMatmulLine[] = "matmul ";

struct MatmulCounts {
  int cases = 0;
  int runs[JAXSERVE_ISA_LEVELS] = {};  // On each level.
};

// How the matrices of a stack are stored, and which is meant.
struct StoredAs {
  int format, number;
  int64_t layers, layer;
};
inline std::istream& operator>>(std::istream& header, StoredAs& as) {
  return header >> as.format >> as.number >> as.layers >> as.layer;
}

// A matrix out of the file, and the memory of its stack.
struct StoredMatrix {
  StoredMatrix(std::istream& file, const StoredAs& as, int64_t rows, int64_t depth) {
    matrix.format = static_cast<Format>(as.format), matrix.number = static_cast<Number>(as.number);
    matrix.rows = rows, matrix.depth = depth;
    const size_t groups = depth / kGroup * rows * as.layers;
    values = Read<char>(file, as.layers * rows * matrix.row_bytes());
    scale = Read<uint16_t>(file, matrix.format == Format::kNumber ? 0 : groups);
    minimum = Read<uint16_t>(file, matrix.format == Format::kInt4 ? groups : 0);
    matrix.values = values.get(), matrix.scale = scale.get(), matrix.minimum = minimum.get();
    matrix = LayerOf(matrix, as.layers, as.layer);
  }

  Matrix matrix;
  Array<char> values;
  Array<uint16_t> scale, minimum;
};

// Computes rows of x, in memory that ends where the rows do.
inline Array<char> Multiplied(Matmul m, const char* x, int64_t rows, const MatmulKernel& kernel,
                              Executor& executor) {
  const size_t x_bytes = rows * m.matrix.depth * NumberBytes(m.x_number);
  const size_t out_bytes = rows * m.matrix.rows * NumberBytes(m.out_number);
  m.x_rows = rows;
  return Apart(x, x_bytes, out_bytes, [&](const char* own, char* out) {
    m.x = own, m.out = out;
    RunMatmul(m, kernel, executor);
  });
}

// What an answer should be, and how far off it may be: fractions of these.
struct Expected {
  const float *answer, *size, *spread;
};

inline void CheckAnswers(const std::string& name, const Matmul& m, const char* out,
                         const Expected& expected) {
  // Of the sum of the products' sizes, as in test_quantized_matmul.py.
  const float tolerances[] = {2e-6f, 1.f / 256, 1.f / 2048};
  const float tolerance = tolerances[static_cast<int>(m.out_number)];
  // Of the activations: half of one of 127 steps to the largest in a group, or a bfloat16's, which
  // is less; or float16's and that of its sums.
  const MatmulKernel& kernel = CurrentMatmulKernel();
  const bool has_panels = m.narrow && kernel.panels && kernel.panels->takes(m.matrix);
  const float narrowing = has_panels ? 1.f / 250 : 0;
  const float sums = m.narrow && !has_panels && kernel.halves ? 1.f / 1024 : 0;
  for (int64_t i = 0; i < m.x_rows * m.matrix.rows; ++i) {
    const float got = AsFloat(out, m.out_number, i);
    const float most = (tolerance + sums) * expected.size[i] + narrowing * expected.spread[i];
    if (!(std::fabs(got - expected.answer[i]) <= most)) {
      std::ostringstream what;
      what << name << ": number " << i << " is " << got << ", not " << expected.answer[i];
      Fail(what.str());
    }
  }
}

// The best of all rows of the matrix and of half of them are those of the answers, float32.
inline void CheckBests(const std::string& name, Matmul m, const MatmulKernel& kernel, Pool& pool,
                       const char* answers) {
  const int64_t stride = m.matrix.rows;
  for (const int64_t rows : {stride, stride / 2}) {
    const Array<float> best(new float[m.x_rows]);
    const Array<int32_t> place(new int32_t[m.x_rows]);
    const Array<bool> is_finite(new bool[m.x_rows]);
    const Bests bests = {best.get(), place.get(), is_finite.get()};
    m.matrix.rows = rows, m.bests = &bests;
    RunMatmul(m, kernel, pool);
    for (int64_t row = 0; row < m.x_rows; ++row) {
      float most = -INFINITY;
      int64_t where = 0;
      for (int64_t i = 0; i < rows; ++i) {
        const float answer = AsFloat(answers, Number::kFloat32, row * stride + i);
        if (answer > most) most = answer, where = i;
      }
      if (best[row] != most || place[row] != where || !is_finite[row]) {
        Fail(name + ": the best of a row is another");
      }
    }
  }
}

// One level: returns how often it multiplied.
inline int CheckMatmulOnLevel(const std::string& name, const Matmul& m, const MatmulKernel& kernel,
                              const std::vector<Pool*>& pools, const Expected& expected) {
  const char* x = static_cast<const char*>(m.x);
  const size_t x_row_bytes = m.matrix.depth * NumberBytes(m.x_number);
  const size_t row_bytes = m.matrix.rows * NumberBytes(m.out_number);
  int runs = 0;
  const auto together = Multiplied(m, x, m.x_rows, kernel, *pools[0]);
  CheckAnswers(name, m, together.get(), expected);
  const auto check_same = [&](int64_t first, int64_t rows, Pool& pool, const char* what) {
    const auto out = Multiplied(m, x + first * x_row_bytes, rows, kernel, pool);
    if (std::memcmp(out.get(), together.get() + first * row_bytes, rows * row_bytes) != 0) {
      Fail(name + ": " + what + " changed a bit");
    }
  };
  for (Pool* pool : pools) check_same(0, m.x_rows, *pool, "the number of threads"), ++runs;
  for (int64_t row = 0; row < m.x_rows; ++row, ++runs) {
    check_same(row, 1, *pools[row % pools.size()], "a row's being alone");
  }
  for (int64_t rows = 2; rows < m.x_rows; rows = rows * 2 + 1, ++runs) {
    check_same(m.x_rows - rows, rows, *pools.back(), "a row's neighbours");
  }
  if (m.out_number == Number::kFloat32) {
    for (Pool* pool : pools) CheckBests(name, m, kernel, *pool, together.get()), runs += 2;
  }
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller, ++runs) {
    callers.emplace_back([&] { check_same(0, m.x_rows, *pools[1], "another product"); });
  }
  for (std::thread& caller : callers) caller.join();
  return runs + 1;
}

inline void CheckMatmul(const std::string& line, std::istream& file,
                        const std::vector<Pool*>& pools, MatmulCounts& counts) {
  std::istringstream header(line.substr(sizeof(kMatmulLine) - 1));
  std::string name;
  int x_number, out_number;
  int64_t rows, depth;
  Matmul m;
  StoredAs as;
  header >> name >> x_number >> out_number >> as >> m.x_rows >> rows >> depth;
  if (!header) Fail("the header " + line);
  m.x_number = static_cast<Number>(x_number), m.out_number = static_cast<Number>(out_number);
  const auto x = Read<char>(file, m.x_rows * depth * NumberBytes(m.x_number));
  const StoredMatrix stored(file, as, rows, depth);
  m.matrix = stored.matrix;
  const auto expected = Read<float>(file, m.x_rows * rows);
  const auto size = Read<float>(file, m.x_rows * rows);
  const auto spread = Read<float>(file, m.x_rows * rows);
  if (!file) Fail(name + ": the file ends early");
  m.x = x.get(), m.out = nullptr;
  ++counts.cases;
  for (int level = 0; level < JAXSERVE_ISA_LEVELS; ++level) {
    jaxserve_set_isa_limit(level);
    if (static_cast<int>(CurrentIsa()) != level) continue;
    const MatmulKernel& kernel = CurrentMatmulKernel();
    if (WhyNotMultiply(m, kernel)) continue;
    for (m.narrow = false;; m.narrow = true) {
      const std::string where = name + " on level " + std::to_string(level) +
                                (m.narrow ? " when narrow" : "");
      counts.runs[level] += CheckMatmulOnLevel(where, m, kernel, pools,
                                               {expected.get(), size.get(), spread.get()});
      if (m.narrow || !(kernel.halves || kernel.panels)) break;
    }
  }
}

}  // namespace jaxserve
