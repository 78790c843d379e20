// gpu_math: the elementary functions of math.h for the numbers of a GPU's thread, by the CUDA
// library: within 2 units in the last place.
#pragma once
#include <cmath>

#include "dtype.h"
#include "math.h"

namespace fastres {

template <class A> struct NumberMath {
  FASTRES_HD static A of(double v) { return static_cast<A>(v); }
  FASTRES_HD static A positive_part(A v) { return v <= 0 ? A(0) : v; }
  FASTRES_HD static A is_positive(A v) { return v <= 0 ? A(0) : A(1); }
};

template <> struct Math<float> : NumberMath<float> {
  FASTRES_HD static float exp(float v) { return ::expf(v); }
  FASTRES_HD static float tanh(float v) { return ::tanhf(v); }
  FASTRES_HD static float erf(float v) { return ::erff(v); }
};
template <> struct Math<double> : NumberMath<double> {
  FASTRES_HD static double exp(double v) { return ::exp(v); }
  FASTRES_HD static double tanh(double v) { return ::tanh(v); }
  FASTRES_HD static double erf(double v) { return ::erf(v); }
};

}  // namespace fastres
