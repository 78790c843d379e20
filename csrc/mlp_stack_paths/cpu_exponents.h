// cpu_exponents: the powers of two by which rows are held.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/tile.h"
#include "kernel.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

// How numbers are held: as 2^exponent times the true ones, the largest of them below 2^size.
// kNothing: all are zero, or not finite.
constexpr int32_t kNothing = INT32_MIN / 2;
struct Scale {
  int32_t exponent, size;
};

// The n with 2^(n - 1) <= v < 2^n, of the bits of a v > 0.
template <class A, class Bits> FASTRES_HD int32_t binary_order(Bits bits) {
  constexpr int kMantissa = sizeof(A) == 4 ? 23 : 52, kTop = sizeof(A) == 4 ? 0xff : 0x7ff;
  const int32_t order = static_cast<int32_t>(bits >> kMantissa);
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

// Whether b is so much larger than a that a would be lost where b is held.
FASTRES_HD bool is_beyond(const Scale& b, const Scale& a) {
  return (a.size != kNothing) & (b.size - b.exponent - (a.size - a.exponent) > kFarthest);
}

// The exponent for numbers to which others are added, if these are not beyond them.
FASTRES_HD int32_t fitting(const Scale& own, const Scale& other) {
  const bool empty = own.size == kNothing, none = (other.size == kNothing) | is_beyond(other, own);
  const int32_t order = own.size - own.exponent, of_other = other.size - other.exponent;
  const int32_t most = empty | (!none & (of_other > order)) ? of_other : order;
  const int32_t kept = empty & !none ? other.exponent : own.exponent, far = most + kept;
  const bool moves = (!empty | !none) & ((far > kFarthest) | (far < -kFarthest));
  return moves ? -most : kept;
}

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
