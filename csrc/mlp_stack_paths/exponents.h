// exponents: by which powers of two rows are held, and when they change.
//
// Lengths span hundreds of orders of magnitude. Each row of each sample is held as 2^exponent times
// the true one: anew where its largest element has come further than kFarthest binary orders from
// 1, and a sum so that the larger of the two is within that range. What comes to a row and is more
// than kBeyond orders larger says nothing of the sum: there the product is measured first, which
// may be as small as the row.
#pragma once
#include "../common/dtype.h"

namespace fastres::mlp_stack_paths {

// Rows are moved to below 2^kMoved: from anywhere in the range of a type by a power of two in it.
constexpr int kMoved = 2;
// 30: leaves room for a block that multiplies a row by 2^90, and for elements 2^-90 of the largest.
// 64: leaves room for elements 2^-30 of the largest of a row that is so far below what comes to it.
constexpr int kFarthest = 30, kBeyond = 64;

// How numbers are held: as 2^exponent times the true ones, the largest of them below 2^size.
// kNothing: all are zero, or not finite.
constexpr int32_t kNothing = INT32_MIN / 2;
struct Scale {
  int32_t exponent, size;
};

// Whether b is so much larger than a that a would be lost where b is held.
FASTRES_HD bool is_beyond(const Scale& b, const Scale& a) {
  return (a.size != kNothing) & (b.size - b.exponent - (a.size - a.exponent) > kBeyond);
}

// The exponent for numbers to which others are added, if these are not beyond them.
FASTRES_HD int32_t fitting(const Scale& own, const Scale& other) {
  const bool empty = own.size == kNothing, none = (other.size == kNothing) | is_beyond(other, own);
  const int32_t order = own.size - own.exponent, of_other = other.size - other.exponent;
  const int32_t most = (empty | (!none & (of_other > order))) ? of_other : order;
  const int32_t kept = (empty & !none) ? other.exponent : own.exponent, far = most + kept;
  const bool moves = (!empty | !none) & ((far > kFarthest) | (far < -kFarthest));
  return moves ? kMoved - most : kept;
}

// The exponent for the sum of two, whichever is the larger.
FASTRES_HD int32_t of_sum(const Scale& a, const Scale& b) {
  return is_beyond(b, a) ? fitting(b, a) : fitting(a, b);
}

}  // namespace fastres::mlp_stack_paths
