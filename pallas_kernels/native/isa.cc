// Detects the instruction set, and holds the limit that tests lower.
#include "isa.h"

#include <atomic>

namespace jaxserve {
namespace {

Isa Detect() {
#if JAXSERVE_ISA_LEVELS > 1
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx2) return Isa::kPortable;
  if (!avx512) return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Vnni;
#if JAXSERVE_ISA_LEVELS > 5
  if (__builtin_cpu_supports("avx512fp16")) return Isa::kAvx512Fp16;
#endif
  return Isa::kAvx512Bf16;
#else
  return Isa::kPortable;
#endif
}

std::atomic<int> limit{static_cast<int>(Isa::kAvx512Fp16)};

}  // namespace

Isa CurrentIsa() {
  static const int machine = static_cast<int>(Detect());
  const int most = limit.load(std::memory_order_relaxed);
  return static_cast<Isa>(most < machine ? most : machine);
}

}  // namespace jaxserve

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int jaxserve_isa() { return static_cast<int>(jaxserve::CurrentIsa()); }

// Later calls use this level at most. A running call keeps the level it began with.
EXPORT void jaxserve_set_isa_limit(int level) { jaxserve::limit.store(level < 0 ? 0 : level); }
