// Which instructions the kernels may use: detected once, and lowered by tests.
//
// A family's kernel source is compiled once per level, with ISA_NAMESPACE and the level's compiler
// flags set by build.py, and reached through a table with one entry per level. Such a source
// includes no C++ standard header with inline code: the linker keeps one copy of an inline function
// for the whole library, and that copy could be one with instructions that this machine lacks.
#pragma once

#if !defined(__x86_64__)
#define JAXSERVE_ISA_LEVELS 1
#elif defined(JAXSERVE_NO_AVX512FP16)  // An older compiler.
#define JAXSERVE_ISA_LEVELS 3
#else
#define JAXSERVE_ISA_LEVELS 4
#endif

namespace jaxserve {

enum class Isa : int {
  kPortable = 0,  // What the compiler's default target has: SSE2, or NEON.
  kAvx2 = 1,      // AVX2, FMA and F16C.
  kAvx512 = 2,    // AVX-512 F, BW, DQ and VL.
  kAvx512Fp16 = 3,  // Those, VBMI and arithmetic in float16.
};

// The level that kernels run at: the machine's best, or the limit if that is lower.
Isa CurrentIsa();

}  // namespace jaxserve

// The addresses of one name in every level, best last; index it with CurrentIsa().
#if JAXSERVE_ISA_LEVELS == 4
#define JAXSERVE_BY_ISA(name) {&portable::name, &avx2::name, &avx512::name, &avx512fp16::name}
#define JAXSERVE_FOR_EACH_ISA(declaration) \
  namespace portable { declaration }      \
  namespace avx2 { declaration }          \
  namespace avx512 { declaration }        \
  namespace avx512fp16 { declaration }
#elif JAXSERVE_ISA_LEVELS == 3
#define JAXSERVE_BY_ISA(name) {&portable::name, &avx2::name, &avx512::name}
#define JAXSERVE_FOR_EACH_ISA(declaration) \
  namespace portable { declaration }      \
  namespace avx2 { declaration }          \
  namespace avx512 { declaration }
#else
#define JAXSERVE_BY_ISA(name) {&portable::name}
#define JAXSERVE_FOR_EACH_ISA(declaration) \
  namespace portable { declaration }
#endif
