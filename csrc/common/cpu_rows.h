// cpu_rows: where the rows of a residual add lie, their gates, and where their sums go.
#pragma once
#include "stored.h"
#include "sums.h"

namespace fastres::FASTRES_ISA {

template <class T> const T* offset(const void* p, int64_t at) {
  return p ? static_cast<const T*>(p) + at : nullptr;
}
template <class T> T* offset(void* p, int64_t at) { return p ? static_cast<T*>(p) + at : nullptr; }

template <class A, class Any> A gate_of(const Any& a, int64_t row) {
  return a.gate ? static_cast<const A*>(a.gate)[row * a.gate_stride] : A(1);
}

template <class A> void store_sums(void* out,  // [3, rows]
                                   int64_t rows, int64_t row, const Sums<double>& sums) {
  A* to = static_cast<A*>(out) + row;
  to[0] = static_cast<A>(sums.skip_sq);
  to[rows] = static_cast<A>(sums.branch_sq);
  to[2 * rows] = static_cast<A>(sums.dot);
}

}  // namespace fastres::FASTRES_ISA
