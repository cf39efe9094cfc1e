// The feed-forwards of native_check.cc: close to the reference's answers, and the same bits on any
// number of threads and alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "native_check.h"
#include "native_check_matmul.h"

namespace jaxserve {

// What a feed-forward's line in the file begins with.
constexpr char kFeedForwardLine[] = "feed-forward ";

// Computes rows of x, in memory that ends where the rows do.
inline Array<char> Computed(FeedForward f, const char* x, int64_t rows, const MatmulKernel& kernel,
                            Executor& executor) {
  const size_t x_bytes = rows * f.gate_up.depth * NumberBytes(f.x_number);
  const size_t out_bytes = rows * f.down.rows * NumberBytes(f.out_number);
  f.x_rows = rows;
  return Apart(x, x_bytes, out_bytes, [&](const char* own, char* out) {
    f.x = own, f.out = out;
    RunFeedForward(f, kernel, executor);
  });
}

// One level: returns how often it was computed.
inline int CheckFeedForwardOnLevel(const std::string& name, const FeedForward& f,
                                   const MatmulKernel& kernel, const std::vector<Pool*>& pools,
                                   const float* expected) {
  const char* x = static_cast<const char*>(f.x);
  const size_t x_row_bytes = f.gate_up.depth * NumberBytes(f.x_number);
  const size_t row_bytes = f.down.rows * NumberBytes(f.out_number);
  const int64_t count = f.x_rows * f.down.rows;
  // Of the largest answer: float32 sums, or activations of 8 bits, then the answer's rounding.
  const float tolerance = (f.narrow ? 0.03f : 1e-5f) +
                          (f.out_number == Number::kFloat32 ? 0 : 1.f / 256);
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(expected[i]));
  const auto together = Computed(f, x, f.x_rows, kernel, *pools[0]);
  for (int64_t i = 0; i < count; ++i) {
    const float got = AsFloat(together.get(), f.out_number, i);
    if (!(std::fabs(got - expected[i]) <= tolerance * largest)) {
      std::ostringstream what;
      what << name << ": number " << i << " is " << got << ", not " << expected[i];
      Fail(what.str());
    }
  }
  int runs = 0;
  for (Pool* pool : pools) {
    const auto out = Computed(f, x, f.x_rows, kernel, *pool);
    if (std::memcmp(out.get(), together.get(), f.x_rows * row_bytes) != 0) {
      Fail(name + ": the number of threads changed a bit");
    }
    ++runs;
  }
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller, ++runs) {
    callers.emplace_back([&] {
      const auto out = Computed(f, x, f.x_rows, kernel, *pools[1]);
      if (std::memcmp(out.get(), together.get(), f.x_rows * row_bytes) != 0) {
        Fail(name + ": another feed-forward changed a bit");
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int64_t row = 0; row < f.x_rows; row += 1 + f.x_rows / 4, ++runs) {
    const auto out = Computed(f, x + row * x_row_bytes, 1, kernel, *pools[row % pools.size()]);
    if (std::memcmp(out.get(), together.get() + row * row_bytes, row_bytes) != 0) {
      Fail(name + ": a row's being alone changed a bit");
    }
  }
  return runs;
}

inline void CheckFeedForward(const std::string& line, std::istream& file,
                             const std::vector<Pool*>& pools, MatmulCounts& counts) {
  std::istringstream header(line.substr(sizeof(kFeedForwardLine) - 1));
  std::string name;
  int x_number, out_number, activation;
  int64_t depth, hidden, out_rows;
  FeedForward f;
  StoredAs gate_up_as, down_as;
  header >> name >> x_number >> out_number >> activation >> gate_up_as >> down_as >> f.x_rows >>
      depth >> hidden >> out_rows;
  if (!header) Fail("the header " + line);
  f.x_number = static_cast<Number>(x_number), f.out_number = static_cast<Number>(out_number);
  f.activation = static_cast<Activation>(activation);
  const auto x = Read<char>(file, f.x_rows * depth * NumberBytes(f.x_number));
  const StoredMatrix gate_up(file, gate_up_as, 2 * hidden, depth);
  const StoredMatrix down(file, down_as, out_rows, hidden);
  const auto expected = Read<float>(file, f.x_rows * out_rows);
  if (!file) Fail(name + ": the file ends early");
  f.gate_up = gate_up.matrix, f.down = down.matrix;
  f.x = x.get(), f.out = nullptr;
  ++counts.cases;
  for (int level = 0; level < JAXSERVE_ISA_LEVELS; ++level) {
    jaxserve_set_isa_limit(level);
    if (static_cast<int>(CurrentIsa()) != level) continue;
    const MatmulKernel& kernel = CurrentMatmulKernel();
    if (WhyNotFeedForward(f, kernel)) continue;
    for (const bool narrow : {false, true}) {
      f.narrow = narrow;
      const std::string where =
          name + " on level " + std::to_string(level) + (narrow ? " when narrow" : "");
      counts.runs[level] += CheckFeedForwardOnLevel(where, f, kernel, pools, expected.get());
    }
  }
}

}  // namespace jaxserve
