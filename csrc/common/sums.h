// sums: what every residual add measures of a row, x*x, p*p and x*p. A: a number, or a vector of
// partial sums.
#pragma once
#include "dtype.h"

namespace fastres {

template <class A> struct Sums {
  A skip_sq{}, branch_sq{}, dot{};
  FASTRES_HD void add(const A& x, const A& p) {
    skip_sq += x * x;
    branch_sq += p * p;
    dot += x * p;
  }
};

}  // namespace fastres
