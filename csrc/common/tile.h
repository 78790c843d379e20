// tile: 16 numbers of an accumulate type in vector registers, and how they are loaded from and
// stored to tensors. One source for every instruction set: cpu.cpp files are compiled once per set
// with FASTRES_ISA naming the namespace. 16 lanes everywhere, so that the sum of a tile has one
// order and its comparison is one uint16_t.
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

  FASTRES_HD A sum() const {  // in a fixed order: vectors, then halves of a vector
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

// What a tensor stores: how 16 elements become a tile and back, rounding to nearest even.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T> struct Stored {  // float, double: no conversion
  using A = T;
  // Vector by vector: a tile of several gcc would take through memory.
  FASTRES_HD static Tile<A> load(const T* p) {
    return Tile<A>::map([&](int i) {
      typename Tile<A>::Vector v;
      std::memcpy(&v, p + i * Tile<A>::kWidth, sizeof v);
      return v;
    });
  }
  FASTRES_HD static void store(T* p, const Tile<A>& t) {
    for (int i = 0; i < Tile<A>::kCount; ++i)
      std::memcpy(p + i * Tile<A>::kWidth, &t.v[i], sizeof t.v[i]);
  }
};

template <> struct Stored<BFloat16> {
  using A = float;
  static constexpr int kWidth = Tile<A>::kWidth;
  using Words = typename VectorOf<uint32_t>::type;
  using Halves = typename Packed<uint16_t, kWidth>::type;

  FASTRES_HD static Tile<A> load(const BFloat16* p) {
    return Tile<A>::map([&](int i) {
      Halves h;
      std::memcpy(&h, p + i * kWidth, sizeof h);
      return (Tile<A>::Vector)(widen(h) << 16);
    });
  }
  FASTRES_HD static void store(BFloat16* p, const Tile<A>& t) {
    for (int i = 0; i < Tile<A>::kCount; ++i) {
      const Words w = (Words)t.v[i], nan = Words{} + 0x7fc00000;
      const Words rounded = t.v[i] != t.v[i] ? nan : w + 0x7fff + ((w >> 16) & 1);
      const Halves h = narrow(rounded >> 16);
      std::memcpy(p + i * kWidth, &h, sizeof h);
    }
  }

 private:
  // By hand, as gcc would do both in halves of a register.
  FASTRES_HD static Words widen(const Halves& h) {
#if defined(__AVX512F__)
    return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, Words);
#endif
  }
  FASTRES_HD static Halves narrow(const Words& w) {
#if defined(__AVX512F__)
    return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)w);
#elif defined(__AVX2__)
    return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)w),
                                    _mm256_extracti128_si256((__m256i)w, 1));
#else
    return __builtin_convertvector(w, Halves);
#endif
  }
};

template <> struct Stored<Float16> {
  using A = float;
#if defined(__AVX512F__)  // "maskz": gcc 12 warns of the undefined lanes of the plain ones
  FASTRES_HD static Tile<A> load(const Float16* p) {
    __m256i h;
    std::memcpy(&h, p, sizeof h);
    const __m512 v = _mm512_maskz_cvtph_ps(0xffff, h);
    return {{(Tile<A>::Vector)v }};
  }
  FASTRES_HD static void store(Float16* p, const Tile<A>& t) {
    const __m256i h = _mm512_maskz_cvtps_ph(0xffff, (__m512)t.v[0], _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &h, sizeof h);
  }
#elif defined(__AVX2__)
  FASTRES_HD static Tile<A> load(const Float16* p) {
    return Tile<A>::map([&](int i) {
      __m128i h;
      std::memcpy(&h, p + 8 * i, sizeof h);
      return (Tile<A>::Vector)_mm256_cvtph_ps(h);
    });
  }
  FASTRES_HD static void store(Float16* p, const Tile<A>& t) {
    for (int i = 0; i < Tile<A>::kCount; ++i) {
      const __m128i h = _mm256_cvtps_ph((__m256)t.v[i], _MM_FROUND_TO_NEAREST_INT);
      std::memcpy(p + 8 * i, &h, sizeof h);
    }
  }
#else
  FASTRES_HD static Tile<A> load(const Float16* p) {
    _Float16 h[kLanes];
    A a[kLanes];
    std::memcpy(h, p, sizeof h);
    for (int l = 0; l < kLanes; ++l) a[l] = static_cast<A>(h[l]);
    return Stored<float>::load(a);
  }
  FASTRES_HD static void store(Float16* p, const Tile<A>& t) {
    _Float16 h[kLanes];
    A a[kLanes];
    Stored<float>::store(a, t);
    for (int l = 0; l < kLanes; ++l) h[l] = static_cast<_Float16>(a[l]);
    std::memcpy(p, h, sizeof h);
  }
#endif
};

// Element `at` of a tensor of stored elements.
template <class T> const T* in(const void* p, int64_t at) { return static_cast<const T*>(p) + at; }
template <class T> T* in(void* p, int64_t at) { return static_cast<T*>(p) + at; }

// One element in the accumulate type.
template <class T> FASTRES_HD T number_of(T v) { return v; }
FASTRES_HD float number_of(BFloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
FASTRES_HD float number_of(Float16 v) {
  _Float16 half;
  std::memcpy(&half, &v.bits, sizeof half);
  return static_cast<float>(half);
}

// The first n of 16 elements, the other lanes 0. With n = kLanes a constant the choice is free.
template <class T> FASTRES_HD auto load(const T* p, int64_t n) {
  if (n == kLanes) return Stored<T>::load(p);
  T part[kLanes] = {};
  std::memcpy(part, p, n * sizeof(T));
  return Stored<T>::load(part);
}
template <class T, class A> FASTRES_HD void store(T* p, const Tile<A>& t, int64_t n) {
  if (n == kLanes) return Stored<T>::store(p, t);
  T part[kLanes];
  Stored<T>::store(part, t);
  std::memcpy(p, part, n * sizeof(T));
}

// What a walk over memory uses in place of load and store: they also ask for what lies kAhead bytes
// further on. Most is gained where it writes: a store waits for its line.
constexpr uintptr_t kAhead = 2048;
template <class T> FASTRES_HD void ask_ahead(const T* p) {
  for (uintptr_t at = 0; at < kLanes * sizeof(T); at += 64)  // past the end there is no pointer
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead + at));
}
template <class T> FASTRES_HD auto load_ahead(const T* p, int64_t n) {
  ask_ahead(p);
  return load(p, n);
}
template <class T, class A> FASTRES_HD void store_ahead(T* p, const Tile<A>& t, int64_t n) {
  ask_ahead(p);
  store(p, t, n);
}

// Calls body(T()) with the stored type of a dtype.
template <class Body> FASTRES_HD void visit_stored(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat64: return body(double());
    case Dtype::kFloat32: return body(float());
    case Dtype::kBFloat16: return body(BFloat16());
    case Dtype::kFloat16: return body(Float16());
  }
}

}  // namespace fastres::FASTRES_ISA
