// tile: 16 numbers of an accumulate type in vector registers. One source for every instruction set:
// cpu.cpp files are compiled once per set with FASTRES_ISA naming the namespace. 16 lanes
// everywhere, so that tensors are laid out alike and the comparison of a tile is one uint16_t.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "dtype.h"

#ifndef FASTRES_ISA
#define FASTRES_ISA portable
#endif

namespace fastres::FASTRES_ISA {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class E> struct VectorOf {
  typedef E type __attribute__((vector_size(kVectorBytes)));
};
// N elements side by side, also where N * sizeof(E) is no register.
template <class E, int N> struct Packed {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};

// Half i of a vector. Of a register of AVX-512 gcc would take it through memory.
template <class Half, class Vector> FASTRES_HD Half half_of(const Vector& v, int i) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Vector) == 64) {
    const __m512d all = (__m512d)v;
    return (Half)(i ? _mm512_maskz_extractf64x4_pd(0xff, all, 1)
                    : _mm512_maskz_extractf64x4_pd(0xff, all, 0));
  }
#endif
  Half half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + i * sizeof half, sizeof half);
  return half;
}

template <class A> struct Tile {
  using Vector = typename VectorOf<A>::type;
  static constexpr int kWidth = kVectorBytes / sizeof(A);
  static constexpr int kCount = kLanes / kWidth;
  Vector v[kCount];

  template <class F> FASTRES_HD static Tile map(const F& lanes) {  // lanes(i): vector i
    Tile t;
    for (int i = 0; i < kCount; ++i) t.v[i] = lanes(i);
    return t;
  }
  FASTRES_HD friend Tile operator+(const Tile& a, const Tile& b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  FASTRES_HD friend Tile operator-(const Tile& a, const Tile& b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  FASTRES_HD friend Tile operator-(const Tile& a) {
    return map([&](int i) { return -a.v[i]; });
  }
  FASTRES_HD friend Tile operator*(const Tile& a, const Tile& b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  FASTRES_HD friend Tile operator/(const Tile& a, const Tile& b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  FASTRES_HD friend Tile operator*(A a, const Tile& b) {
    return map([&](int i) { return a * b.v[i]; });
  }
  FASTRES_HD Tile& operator+=(const Tile& b) { return *this = *this + b; }

  // In a fixed order, which is the instruction set's own: vectors, then halves of a vector.
  FASTRES_HD A sum() const {
    Vector s = v[0];
    for (int i = 1; i < kCount; ++i) s += v[i];
    return sum_halves<kWidth>(s);
  }

 private:
  template <int N> FASTRES_HD static A sum_halves(const typename Packed<A, N>::type& s) {
    if constexpr (N == 1) return s[0];
    else {
      using Half = typename Packed<A, N / 2>::type;
      return sum_halves<N / 2>(half_of<Half>(s, 0) + half_of<Half>(s, 1));
    }
  }
};

// Bit i: lane i is not <= 0, as torch's ReLU decides it (NaN passes).
template <class A> FASTRES_HD uint16_t positive_bits(const Tile<A>& t) {
  uint32_t bits = 0;
  for (int i = 0; i < Tile<A>::kCount; ++i) {
    uint32_t part = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4)
      part = _mm512_cmp_ps_mask((__m512)t.v[i], _mm512_setzero_ps(), _CMP_NLE_UQ);
    else part = _mm512_cmp_pd_mask((__m512d)t.v[i], _mm512_setzero_pd(), _CMP_NLE_UQ);
#elif defined(__AVX2__)
    if constexpr (sizeof(A) == 4)
      part = _mm256_movemask_ps(_mm256_cmp_ps((__m256)t.v[i], _mm256_setzero_ps(), _CMP_NLE_UQ));
    else
      part = _mm256_movemask_pd(_mm256_cmp_pd((__m256d)t.v[i], _mm256_setzero_pd(), _CMP_NLE_UQ));
#else
    for (int l = 0; l < Tile<A>::kWidth; ++l) part |= uint32_t(!(t.v[i][l] <= 0)) << l;
#endif
    bits |= part << (i * Tile<A>::kWidth);
  }
  return static_cast<uint16_t>(bits);
}

// ReLU, of the same lanes.
template <class A> FASTRES_HD Tile<A> positive_part(const Tile<A>& t) {
  return Tile<A>::map([&](int i) { return t.v[i] <= 0 ? typename Tile<A>::Vector{} : t.v[i]; });
}

// Lanes whose bit is set, 0 elsewhere.
template <class A> FASTRES_HD Tile<A> select(uint16_t bits, const Tile<A>& t) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return Tile<A>::map(
        [&](int) { return (typename Tile<A>::Vector)_mm512_maskz_mov_ps(bits, (__m512)t.v[0]); });
  } else {
    return Tile<A>::map([&](int i) {
      return (typename Tile<A>::Vector)_mm512_maskz_mov_pd(bits >> (8 * i), (__m512d)t.v[i]);
    });
  }
#else
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using Ints = typename VectorOf<Int>::type;
  constexpr int kWidth = Tile<A>::kWidth;
  Int lane_bit[kWidth];
  for (int l = 0; l < kWidth; ++l) lane_bit[l] = Int(1) << l;
  Ints lanes;
  std::memcpy(&lanes, lane_bit, sizeof lanes);
  return Tile<A>::map([&](int i) {
    const Ints on = (lanes & Int(bits >> (i * kWidth))) != 0;
    return (typename Tile<A>::Vector)((Ints)t.v[i] & on);
  });
#endif
}

}  // namespace fastres::FASTRES_ISA
