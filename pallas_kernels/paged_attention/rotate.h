// Multiplying heads by a Walsh-Hadamard matrix, before they are rounded to few bits.
#pragma once

#include <cstdint>

#include "native/threads.h"

namespace jaxserve {

// What a thread has room for; native.py has the same number.
constexpr int64_t kMostRotated = 256;

// Rotates vectors of head_dim numbers, in blocks of the largest power of two that divides it, with
// the sums of formats.py's `rotate` in its order, and so to the same bits. `head_dim` is at most
// kMostRotated; `out` may be `numbers`.
void RunRotate(const float* numbers, int64_t vectors, int64_t head_dim, float* out,
               Executor& executor);

}  // namespace jaxserve
