// isa: which instruction set's build of a CPU kernel runs; chosen once, by what this CPU can do.
#pragma once
#include <cstdlib>
#include <cstring>

namespace fastres {

enum class Isa { kPortable, kAvx2, kAvx512 };
constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512"};
// FASTRES_ONE_ISA: only the portable kernels are built.
#if defined(__x86_64__) && !defined(FASTRES_ONE_ISA)
#define FASTRES_ISAS_X86
constexpr int kIsasBuilt = 3;
#else
constexpr int kIsasBuilt = 1;
#endif

inline Isa best_isa() {
#if defined(FASTRES_ISAS_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
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
    const Isa best = best_isa();
    const char* wanted = std::getenv("FASTRES_ISA");
    for (int i = 0; wanted && i < static_cast<int>(best); ++i)
      if (!std::strcmp(wanted, kIsaNames[i])) return static_cast<Isa>(i);
    return best;
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
    return isa() == Isa::kAvx512 ? avx512::name    \
           : isa() == Isa::kAvx2 ? avx2::name      \
                                 : portable::name; \
  }
#else
#define FASTRES_CPU_KERNEL(name, ...)            \
  namespace portable { void name(__VA_ARGS__); } \
  inline auto name##_for_this_cpu() { return portable::name; }
#endif

}  // namespace fastres
