// Floating-point numbers as they are stored.
#pragma once

#include <stdint.h>

namespace jaxserve {

enum class Number : int { kFloat32, kBFloat16, kFloat16 };

static inline constexpr int64_t NumberBytes(Number number) { return number == Number::kFloat32 ? 4 : 2; }

// What pages hold whose tokens have scales; the formats of paged_attention/formats.py.
enum class Scaled : int { kNone, kInt8, kFp8, kInt4 };

// Bytes of so many numbers of pages; int4 comes in twos.
static inline constexpr int64_t PageBytes(Scaled scaled, Number number, int64_t count) {
  return scaled == Scaled::kNone ? count * NumberBytes(number)
                                 : scaled == Scaled::kInt4 ? count / 2 : count;
}

}  // namespace jaxserve
