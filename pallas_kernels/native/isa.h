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
#define JAXSERVE_ISA_LEVELS 5
#else
#define JAXSERVE_ISA_LEVELS 6
#endif

namespace jaxserve {

enum class Isa : int {
  kPortable = 0,  // What the compiler's default target has: SSE2, or NEON.
  kAvx2 = 1,      // AVX2, FMA and F16C.
  kAvx512 = 2,    // AVX-512 F, BW, DQ and VL.
  kAvx512Vnni = 3,  // Those, and sums of products of bytes.
  kAvx512Bf16 = 4,  // Those, and sums of products of bfloat16 numbers.
  kAvx512Fp16 = 5,  // Those, and arithmetic in float16.
};

// The level that kernels run at: the machine's best, or the limit if that is lower.
Isa CurrentIsa();

}  // namespace jaxserve

// Every level, best last, as entry(level, what).
#if JAXSERVE_ISA_LEVELS == 1
#define JAXSERVE_ISAS(entry, what) entry(portable, what)
#else
#define JAXSERVE_ISAS(entry, what)                                                      \
  entry(portable, what) entry(avx2, what) entry(avx512, what) entry(avx512vnni, what)   \
      entry(avx512bf16, what) JAXSERVE_NEWEST_ISA(entry, what)
#endif
#if JAXSERVE_ISA_LEVELS == 6
#define JAXSERVE_NEWEST_ISA(entry, what) entry(avx512fp16, what)
#else
#define JAXSERVE_NEWEST_ISA(entry, what)
#endif

// The addresses of one name in every level; index it with CurrentIsa().
#define JAXSERVE_ADDRESS(level, name) &level::name,
#define JAXSERVE_BY_ISA(name) {JAXSERVE_ISAS(JAXSERVE_ADDRESS, name)}
#define JAXSERVE_DECLARED(level, declaration) namespace level { declaration }
#define JAXSERVE_FOR_EACH_ISA(declaration) JAXSERVE_ISAS(JAXSERVE_DECLARED, declaration)
