// Floating-point numbers as they are stored.
#pragma once

#include <stdint.h>

namespace jaxserve {

enum class Number : int { kFloat32, kBFloat16, kFloat16 };

static inline constexpr int64_t NumberBytes(Number number) { return number == Number::kFloat32 ? 4 : 2; }

}  // namespace jaxserve
