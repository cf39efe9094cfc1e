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
#if JAXSERVE_ISA_LEVELS > 3
  const bool fp16 =
      __builtin_cpu_supports("avx512fp16") && __builtin_cpu_supports("avx512vbmi");
  if (avx2 && avx512 && fp16) return Isa::kAvx512Fp16;
#endif
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
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
