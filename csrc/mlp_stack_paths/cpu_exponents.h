// cpu_exponents: orders and powers of two, by the bits of a number.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/stored.h"
#include "exponents.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

// The n with 2^(n - 1) <= v < 2^n, of the bits of a v > 0; of a subnormal one that of the next.
template <class A, class Bits> FASTRES_HD int32_t binary_order(Bits bits) {
  constexpr int kMantissa = sizeof(A) == 4 ? 23 : 52, kTop = sizeof(A) == 4 ? 0xff : 0x7ff;
  const int32_t order = static_cast<int32_t>(bits >> kMantissa);
  return order == kTop || bits == 0 ? kNothing : (order ? order : 1) - (kTop / 2 - 1);
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

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
