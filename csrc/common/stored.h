// stored: how 16 elements of a tensor become a tile, and a tile elements, rounded to nearest even.
#pragma once
#include "tile.h"

namespace fastres::FASTRES_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T> struct Stored {  // float, double: as they are
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
  static constexpr int kWidth = Tile<A>::kWidth;
  using Vector = Tile<A>::Vector;
  using Words = typename VectorOf<uint32_t>::type;
  using Halves = typename Packed<uint16_t, kWidth>::type;

  // An exponent is 112 more in float32, that of infinity and NaN twice that; it is 0 for small
  // multiples of 2^-24.
  FASTRES_HD static Tile<A> load(const Float16* p) {
    return Tile<A>::map([&](int i) {
      Halves h;
      std::memcpy(&h, p + i * kWidth, sizeof h);
      const Words all = __builtin_convertvector(h, Words), size = all & 0x7fff;
      const Words normal =
          (size << 13) + (size < 0x7c00 ? Words{} + (112 << 23) : Words{} + (224 << 23));
      const Words below = (Words)(__builtin_convertvector(size, Vector) * 0x1p-24f);
      return (Vector)((size < 0x400 ? below : normal) | (all & 0x8000) << 16);
    });
  }
  FASTRES_HD static void store(Float16* p, const Tile<A>& t) {
    for (int i = 0; i < Tile<A>::kCount; ++i) {
      const Words size = (Words)t.v[i] & 0x7fffffff, infinity = Words{} + 0x7c00;
      const Words normal = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10);
      // 2^-24 is the last place of 1/2.
      const Words below = (Words)((Vector)size + 0.5f) - 0x3f000000;
      const Words rounded = size < 113 << 23    ? below
                            : size < 143 << 23  ? normal
                            : size > 0x7f800000 ? infinity + 0x200
                                                : infinity;
      const Halves h = __builtin_convertvector(rounded | ((Words)t.v[i] >> 16 & 0x8000), Halves);
      std::memcpy(p + i * kWidth, &h, sizeof h);
    }
  }
#endif
};

// Element `at` of a tensor of stored elements.
template <class T> const T* in(const void* p, int64_t at) { return static_cast<const T*>(p) + at; }
template <class T> T* in(void* p, int64_t at) { return static_cast<T*>(p) + at; }

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
