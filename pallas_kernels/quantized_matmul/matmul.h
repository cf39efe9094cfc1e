// y = x w^T for a matrix as it is stored: which thread computes what.
//
// Threads take panels of the matrix's rows. A panel is brought into the form that it is multiplied
// in once, in memory that stays in the cache, and multiplied with every row of x; the matrix is
// read once whatever its format. That form is float32, or, where less is allowed and faster,
// float16 (halves.h), or bytes or bfloat16 with rows as lanes (panels.h).
//
// Where only the best answer of each row of x is wanted, each thread keeps the best of its panels
// while their answers are in the cache, and the answers are never written to memory.
#pragma once

#include "kernel.h"
#include "native/threads.h"

namespace jaxserve {

// Of the answers of each row of x: the largest, which it is (of equals the first), and whether all
// are finite. If not, the former two may be any. Without answers: -infinity, 0, true.
struct Bests {
  float* best;  // All three [x_rows].
  int32_t* place;
  bool* is_finite;
};

struct Matmul {
  Matrix matrix;
  Number x_number;
  const void* x;  // [x_rows, depth]
  Number out_number;
  void* out;  // [x_rows, matrix.rows]
  int64_t x_rows;
  // Whether numbers and sums of few products may have fewer bits than float32 has, where the
  // instruction set is faster with them.
  bool narrow = false;
  // Given, this is wanted instead of `out`; out_number is then kFloat32.
  const Bests* bests = nullptr;
};

// down (activation(gate x) * up x), with no more of what lies between in memory than the rows of
// the second product: rounded once, as that reads them, and not to x's number before.
struct FeedForward {
  Matrix gate_up;  // [2 ffn, depth]: the gate's rows, then those of what it gates.
  Matrix down;     // [rows, ffn]
  Activation activation;
  Number x_number;
  const void* x;  // [x_rows, depth]
  Number out_number;
  void* out;  // [x_rows, down.rows]
  int64_t x_rows;
  bool narrow = false;  // As in Matmul, of both products.
};

// One matrix of a stack of `layers`, given the first; a layer that is not there becomes the nearest,
// as in a clamped XLA gather.
Matrix LayerOf(Matrix stack, int64_t layers, int64_t layer);

// Why the kernel cannot compute it, or null.
const char* WhyNotMultiply(const Matmul& matmul, const MatmulKernel& kernel);

void RunMatmul(const Matmul& matmul, const MatmulKernel& kernel, Executor& executor);

const char* WhyNotFeedForward(const FeedForward& feed_forward, const MatmulKernel& kernel);

void RunFeedForward(const FeedForward& feed_forward, const MatmulKernel& kernel,
                    Executor& executor);

// That of the instruction set in use.
const MatmulKernel& CurrentMatmulKernel();

}  // namespace jaxserve
