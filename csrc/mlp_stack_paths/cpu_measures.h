// cpu_measures: what is told of the rows of a sample, and the rows that are wanted.
#pragma once
#include "cpu_held.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

// The exponent by which the largest row is below 1.
template <class A> int32_t exponent_of_largest(const Held<A>& held) {
  int32_t least = INT32_MAX;
  for (int64_t row = 0; row < held.count; ++row)
    if (const Scale& s = held.scales[row]; s.size != kNothing && s.exponent - s.size < least)
      least = s.exponent - s.size;
  return least == INT32_MAX ? 0 : least;
}

// total: [D] doubles, for the sum of the rows, held as the largest row needs it.
template <class A>
void store_measures(const Args& a, const Held<A>& held, int64_t sample, double* total) {
  const Shape& s = a.shape;
  const int64_t last = s.rows();
  for (int64_t row = 0; row <= last; ++row) held.fit(row);  // squares are within range then
  const A* const g = held.line(last);
  const int32_t order = held.scales[last].exponent, common = exponent_of_largest(held);
  const auto to_common = [&](int64_t row) {
    const Scale& scale = held.scales[row];
    return scale.size == kNothing ? 1.0 : std::ldexp(1.0, common - scale.exponent);
  };
  std::memset(total, 0, s.width * sizeof(double));
  for (int64_t row = 0; row < last; ++row) {
    const A* const from = held.line(row);
    const int32_t exponent = held.scales[row].exponent;
    const double relative = to_common(row);
    double square = 0, dot = 0;
    for (int64_t d = 0; d < s.width; ++d) {
      const double v = from[d];
      square += v * v, dot += v * g[d];
      total[d] += v * relative;
    }
    const int64_t at = row * s.batch + sample;
    a.log2_norms[at] = std::log2(square) / 2 - exponent;
    a.dots[at] = std::ldexp(dot, -exponent - order);
    if (a.kept) held.store(row, static_cast<A*>(a.kept) + at * s.width);
  }
  if (a.tail) held.store(last - 1, static_cast<A*>(a.tail) + sample * s.width);
  double off = 0, whole = 0;
  for (int64_t d = 0; d < s.width; ++d) {
    const double v = g[d], miss = total[d] - v * to_common(last);
    off += miss * miss, whole += v * v;
  }
  a.norms[sample] = std::ldexp(std::sqrt(off), -common);
  a.norms[s.batch + sample] = std::ldexp(std::sqrt(whole), -order);
  held.store(last, static_cast<A*>(a.gradient) + sample * s.width);
}

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
