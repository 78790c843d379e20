// activation: the activations of a stack and their derivatives, as torch defines them, written once
// for numbers on a GPU and tiles on a CPU.
#pragma once
#include <type_traits>

#include "math.h"
#include "stack.h"

namespace fastres {

// 1 / (1 + exp(-z))
template <class V> FASTRES_HD V logistic(const V& z) {
  using M = Math<V>;
  return M::of(1) / (M::of(1) + M::exp(-z));
}

// The normal distribution's cumulative function.
template <class V> FASTRES_HD V normal_cdf(const V& z) {
  using M = Math<V>;
  return M::of(0.5) + M::of(0.5) * M::erf(M::of(0.70710678118654752) * z);
}

// The tanh approximation of gelu (Hendrycks & Gimpel 2016): 0.5 z (1 + tanh(u)).
constexpr double kGeluScale = 0.79788456080286536, kGeluCube = 0.044715;
template <class V> FASTRES_HD V gelu_tanh_part(const V& z) {
  using M = Math<V>;
  return M::tanh(M::of(kGeluScale) * (z + M::of(kGeluCube) * (z * z * z)));
}

template <Activation kActivation, class V> FASTRES_HD V value(const V& z) {
  using M = Math<V>;
  if constexpr (kActivation == Activation::kIdentity) return z;
  if constexpr (kActivation == Activation::kRelu) return M::positive_part(z);
  if constexpr (kActivation == Activation::kTanh) return M::tanh(z);
  if constexpr (kActivation == Activation::kSigmoid) return logistic(z);
  if constexpr (kActivation == Activation::kSilu) return z * logistic(z);
  if constexpr (kActivation == Activation::kGelu) return z * normal_cdf(z);
  if constexpr (kActivation == Activation::kGeluTanh)
    return M::of(0.5) * z * (M::of(1) + gelu_tanh_part(z));
}

template <Activation kActivation, class V> FASTRES_HD V derivative(const V& z) {
  using M = Math<V>;
  const V one = M::of(1);
  if constexpr (kActivation == Activation::kIdentity) return one;
  if constexpr (kActivation == Activation::kRelu) return M::is_positive(z);
  if constexpr (kActivation == Activation::kTanh) {
    const V t = M::tanh(z);
    return one - t * t;
  }
  if constexpr (kActivation == Activation::kSigmoid) {
    const V s = logistic(z);
    return s * (one - s);
  }
  if constexpr (kActivation == Activation::kSilu) {
    const V s = logistic(z);
    return s * (one + z * (one - s));
  }
  if constexpr (kActivation == Activation::kGelu) {
    const V density = M::of(0.39894228040143268) * M::exp(M::of(-0.5) * (z * z));
    return normal_cdf(z) + z * density;
  }
  if constexpr (kActivation == Activation::kGeluTanh) {
    const V t = gelu_tanh_part(z);
    const V slope = M::of(kGeluScale) * (one + M::of(3 * kGeluCube) * (z * z));
    return M::of(0.5) * (one + t) + M::of(0.5) * z * (one - t * t) * slope;
  }
}

// What pick(the activation as a constant) returns.
template <class Pick> FASTRES_HD auto pick_activation(Activation activation, const Pick& pick) {
  using std::integral_constant;
  switch (activation) {
    case Activation::kRelu: return pick(integral_constant<Activation, Activation::kRelu>());
    case Activation::kTanh: return pick(integral_constant<Activation, Activation::kTanh>());
    case Activation::kSigmoid: return pick(integral_constant<Activation, Activation::kSigmoid>());
    case Activation::kSilu: return pick(integral_constant<Activation, Activation::kSilu>());
    case Activation::kGelu: return pick(integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh: return pick(integral_constant<Activation, Activation::kGeluTanh>());
    default: return pick(integral_constant<Activation, Activation::kIdentity>());
  }
}

}  // namespace fastres
