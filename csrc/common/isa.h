// isa: which instruction set's build of a CPU kernel runs; chosen once, by what this CPU can do.
#pragma once
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
// A compiler that knows AMX; its assembler then knows it too.
#if __has_include(<amxbf16intrin.h>) || (defined(__clang__) && __has_include(<amxintrin.h>))
#define FASTRES_AMX
#endif
#endif

namespace fastres {

// kAmx: the build for AVX-512, whose products of bfloat16 take to tile registers (amx.h).
enum class Isa { kPortable, kAvx2, kAvx512, kAmx };
constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "amx"};
// FASTRES_ONE_ISA: only the portable kernels are built.
#if defined(__x86_64__) && !defined(FASTRES_ONE_ISA)
#define FASTRES_ISAS_X86
#if defined(FASTRES_AMX)
constexpr int kIsasBuilt = 4;
#else
constexpr int kIsasBuilt = 3;
#endif
#else
constexpr int kIsasBuilt = 1;
#endif

// Whether this CPU has AMX with bfloat16, AVX-512 for it too, and the system lends the registers.
// Linux wants to be asked, once for all threads, and gives their signals larger stacks for good.
inline bool has_amx() {
#if defined(FASTRES_AMX)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  return !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
#else
  return false;
#endif
}

inline Isa best_isa_but_amx() {
#if defined(FASTRES_ISAS_X86)
  __builtin_cpu_init();
  unsigned a, b, c, d;  // of F16C not every compiler can tell
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
#else
  return Isa::kPortable;
#endif
}

// FASTRES_ISA=portable|avx2|avx512 in the environment lowers the choice, never raises it.
inline Isa isa() {
  static const Isa chosen = [] {
    const Isa best = best_isa_but_amx();
    const char* wanted = std::getenv("FASTRES_ISA");
    for (int i = 0; wanted && i <= static_cast<int>(best); ++i)
      if (!std::strcmp(wanted, kIsaNames[i])) return static_cast<Isa>(i);
    return best == Isa::kAvx512 && has_amx() ? Isa::kAmx : best;
  }();
  return chosen;
}

// Declares `void name(...)` in the namespace of each instruction set, and name##_for_this_cpu(),
// which picks one.
#if defined(FASTRES_ISAS_X86)
#define FASTRES_CPU_KERNEL(name, ...)              \
  namespace portable { void name(__VA_ARGS__); }   \
  namespace avx2 { void name(__VA_ARGS__); }       \
  namespace avx512 { void name(__VA_ARGS__); }     \
  inline auto name##_for_this_cpu() {              \
    return isa() >= Isa::kAvx512 ? avx512::name    \
           : isa() == Isa::kAvx2 ? avx2::name      \
                                 : portable::name; \
  }
#else
#define FASTRES_CPU_KERNEL(name, ...)            \
  namespace portable { void name(__VA_ARGS__); } \
  inline auto name##_for_this_cpu() { return portable::name; }
#endif

}  // namespace fastres
