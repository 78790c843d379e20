// cpu_exponents: the powers of two by which the lanes of a group are held.
#pragma once
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "../common/tile.h"
#include "kernel.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

// What is known of each lane: it holds 2^exponent times the true numbers, the largest of which is
// held below 2^size. kNothing: all are zero, or not finite.
constexpr int32_t kNothing = INT32_MIN / 2;
template <int kGroup> struct Scales {
  int32_t exponent[kGroup], size[kGroup];
};

// The n with 2^(n - 1) <= v < 2^n for a v > 0.
template <class A> FASTRES_HD int32_t binary_order(A v) {
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  constexpr int kMantissa = sizeof(A) == 4 ? 23 : 52, kTop = sizeof(A) == 4 ? 0xff : 0x7ff;
  Bits bits;
  std::memcpy(&bits, &v, sizeof v);
  const int32_t order = static_cast<int32_t>(bits >> kMantissa) & kTop;
  return order == kTop || order == 0 ? kNothing : order - (kTop / 2 - 1);
}

// 2^n; 0 and the largest power of 2 where that is out of range.
template <class A> FASTRES_HD A power_of_two(int32_t n) {
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  constexpr int kMantissa = sizeof(A) == 4 ? 23 : 52, kBias = sizeof(A) == 4 ? 127 : 1023;
  const Bits order = n < -kBias ? 0 : n > kBias ? 2 * kBias : n + kBias;
  const Bits bits = order << kMantissa;
  A v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Chooses the exponents of a group for what is to be added to it. own: factors that bring the group
// there; source: factors that bring the source there. Returns whether any of them is not 1.
template <int kGroup, class A>
bool fit(Scales<kGroup>& group, const Scales<kGroup>& from, A* own, A* source) {
  int32_t any = 0;
  for (int i = 0; i < kGroup; ++i) {
    const int32_t old = group.exponent[i], of_source = from.exponent[i];
    const bool empty = group.size[i] == kNothing, none = from.size[i] == kNothing;
    const int32_t own_order = group.size[i] - old, source_order = from.size[i] - of_source;
    const int32_t most = empty | (!none & (source_order > own_order)) ? source_order : own_order;
    const int32_t kept = empty & !none ? of_source : old, far = most + kept;
    const int32_t chosen =
        (!empty | !none) & ((far > kFarthest) | (far < -kFarthest)) ? -most : kept;
    const int32_t step = none ? 0 : chosen - of_source;
    group.exponent[i] = chosen;
    own[i] = power_of_two<A>(chosen - old);
    source[i] = power_of_two<A>(step);
    any |= (chosen - old) | step;
  }
  return any != 0;
}

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
