// tile_math: elementary functions of tiles. In float32 polynomials, within 2 units in the last
// place of the true value; in float64, which need not be fast, the C library lane by lane.
#pragma once
#include <cmath>

#include "math.h"
#include "stored.h"

namespace fastres::FASTRES_ISA {

// On one vector of float32.
struct VectorMath {
  using Vector = Tile<float>::Vector;
  using Ints = typename VectorOf<int32_t>::type;

  FASTRES_HD static Vector choose(const Ints& where, const Vector& yes, const Vector& no) {
    return (Vector)(((Ints)yes & where) | ((Ints)no & ~where));
  }
  FASTRES_HD static Vector abs(const Vector& x) { return (Vector)((Ints)x & 0x7fffffff); }
  FASTRES_HD static Vector with_sign_of(const Vector& x, const Vector& positive) {
    return (Vector)((Ints)positive | ((Ints)x & ~0x7fffffff));
  }

  // c[0] + c[1] x + ..., by Horner's rule.
  template <int kCount> FASTRES_HD static Vector polynomial(const float (&c)[kCount],
                                                            const Vector& x) {
    Vector sum = c[kCount - 1] + Vector{};
    for (int i = kCount - 2; i >= 0; --i) sum = sum * x + c[i];
    return sum;
  }

  // exp(x) = 2^n exp(r) with |r| <= ln(2) / 2; the series of exp is then exact to 4e-8 with r^6,
  // its coefficients moved a little to spread the error.
  FASTRES_HD static Vector exp(const Vector& given) {
    const Vector low = given < -104.0f ? -104.0f + Vector{} : given,  // below, 0; NaN stays
        x = low > 89.0f ? 89.0f + Vector{} : low;                     // above, infinity
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer
    const Vector shifted = x * 1.44269504f + kRound, n = shifted - kRound;
    const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    const Vector tail = polynomial(
        {0.5f, 1.66666655e-1f, 4.16657959e-2f, 8.33345197e-3f, 1.39819995e-3f, 1.98756915e-4f}, r);
    const Vector y = r * r * tail + r + 1.0f;
    const Ints power = (Ints)shifted - 0x4b400000,
               half = power >> 1;  // two factors: 2^-150 ... 2^128
    return y * (Vector)((half + 127) << 23) * (Vector)((power - half + 127) << 23);
  }

  // Of |x|, so that -0 stays -0: near 0 an odd polynomial, else 1 - 2 / (exp(2 |x|) + 1).
  FASTRES_HD static Vector tanh(const Vector& x) {
    const Vector size = abs(x), s = x * x;
    const Vector near = polynomial({-3.33332819e-1f, 1.33314422e-1f, -5.37397155e-2f,
                                    2.06390888e-2f, -5.70498872e-3f},
                                   s) *
                            s * size +
                        size;
    const Vector far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    return with_sign_of(x, choose(size < 0.625f, near, far));
  }

  // Near 0 an odd polynomial; else 1 - erfc(|x|), with a polynomial for log(erfc). Fitted to 1e-8
  // and 2e-9 of erf on [0, 0.9] and [0.9, 4]; beyond 4 erf rounds to 1.
  FASTRES_HD static Vector erf(const Vector& x) {
    const Vector size = abs(x), s = x * x, most = size > 4.0f ? 4.0f + Vector{} : size;
    const Vector near = polynomial({1.283791538e-1f, -3.761252339e-1f, 1.128214161e-1f,
                                    -2.677893132e-2f, 5.011990255e-3f, -6.090482324e-4f},
                                   s) *
                            x +
                        x;
    const Vector far =
        1.0f - exp(polynomial({-1.664131100e-4f, -1.127797397f, -6.369758015e-1f, -1.041139468e-1f,
                               2.231535313e-2f, -3.065528375e-3f, 1.982238586e-4f},
                              most));
    return choose(size < 0.9f, near, with_sign_of(x, far));
  }
};

}  // namespace fastres::FASTRES_ISA

namespace fastres {

template <class A> struct Math<FASTRES_ISA::Tile<A>> {
  using Tile = FASTRES_ISA::Tile<A>;
  using Vector = typename Tile::Vector;

  FASTRES_HD static Tile of(A v) {
    return Tile::map([&](int) { return v + Vector{}; });
  }
  FASTRES_HD static Tile positive_part(const Tile& t) { return FASTRES_ISA::positive_part(t); }
  FASTRES_HD static Tile is_positive(const Tile& t) {
    return Tile::map([&](int i) { return t.v[i] <= 0 ? Vector{} : Vector{} + 1; });
  }
  FASTRES_HD static Tile exp(const Tile& t) {
    if constexpr (sizeof(A) == 4)
      return Tile::map([&](int i) { return FASTRES_ISA::VectorMath::exp(t.v[i]); });
    else return each_lane(t, [](A v) { return std::exp(v); });
  }
  FASTRES_HD static Tile tanh(const Tile& t) {
    if constexpr (sizeof(A) == 4)
      return Tile::map([&](int i) { return FASTRES_ISA::VectorMath::tanh(t.v[i]); });
    else return each_lane(t, [](A v) { return std::tanh(v); });
  }
  FASTRES_HD static Tile erf(const Tile& t) {
    if constexpr (sizeof(A) == 4)
      return Tile::map([&](int i) { return FASTRES_ISA::VectorMath::erf(t.v[i]); });
    else return each_lane(t, [](A v) { return std::erf(v); });
  }

 private:
  template <class F> static Tile each_lane(const Tile& t, const F& f) {
    A lanes[FASTRES_ISA::kLanes];
    FASTRES_ISA::Stored<A>::store(lanes, t);
    for (A& v : lanes) v = f(v);
    return FASTRES_ISA::Stored<A>::load(lanes);
  }
};

}  // namespace fastres
