// amx: the tile registers of CPUs that have AMX: products of bfloat16, added up in float32. In
// assembly, so that the build for AVX-512 holds it: who uses it has asked isa() for kAmx.
#pragma once
#include "isa.h"
#include "stored.h"

namespace fastres::FASTRES_ISA {

#if defined(FASTRES_AMX) && defined(__AVX512F__)
#define FASTRES_PAIRS

// While one lives the thread has registers 0 to 3, of 16 rows of 64 bytes, and for half a product 4
// and 5, of 16 rows of 32 bytes and of 8 rows of 64. At a time four of the eight: where another
// thread shares the core there are few to rename them to, and a multiply-add of a product that uses
// all eight takes 32 ns, with four 15 ns, in spite of half as many loads again.
class AmxTiles {
 public:
  AmxTiles() {
    static constexpr Shape kShape = {1, 0, {}, {64, 64, 64, 64, 32, 64}, {16, 16, 16, 16, 16, 8}};
    asm volatile("ldtilecfg %0" : : "m"(kShape));
  }
  ~AmxTiles() { asm volatile("tilerelease" : : : "memory"); }
  AmxTiles(const AmxTiles&) = delete;

 private:
  struct Shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

// Register kTile from and to rows that are `stride` elements apart.
template <int kTile, class E> FASTRES_HD void load_amx(const E* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(from), "r"(stride * sizeof(E)), "i"(kTile)
               : "memory");
}
template <int kTile, class E> FASTRES_HD void store_amx(E* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(to), "r"(stride * sizeof(E)), "i"(kTile)
               : "memory");
}
// kSum [16, 16] += kA [16, 32] kB [32, 16], whose rows stand in pairs: [16, 16, 2]; or with 16 for
// 32.
template <int kSum, int kA, int kB> FASTRES_HD void multiply_add_amx() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

template <int kTile> FASTRES_HD void zero_amx() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// out <- w in, of 32 rows and 16 * kTiles columns, or with kAdd out + w in. w: rows of `count`
// elements, a multiple of 32, with their strides; in [count / 2, 16 * kTiles, 2]. Where rows lie
// one after the other, fetches what is `ahead` of them.
template <int kTiles, bool kAdd = false>
void product_of_pairs(const BFloat16* w, int64_t stride, const BFloat16* in, int64_t count,
                      float* out, int64_t out_stride, int64_t ahead = 0) {
  constexpr int64_t kColumns = kTiles * kLanes;
  float* const below = out + kLanes * out_stride;
  for (int64_t c = 0; c < kColumns; c += kLanes) {
    if constexpr (kAdd) load_amx<0>(out + c, out_stride), load_amx<1>(below + c, out_stride);
    else zero_amx<0>(), zero_amx<1>();
    for (int64_t k = 0; k < count; k += 32) {
      for (int i = 0; ahead && c == 0 && i < 32; ++i)
        __builtin_prefetch(w + (k + i) * 32 + ahead, 0, 2);
      load_amx<2>(in + k * kColumns + 2 * c, 2 * kColumns);
      load_amx<3>(w + k, stride);
      multiply_add_amx<0, 3, 2>();
      load_amx<3>(w + kLanes * stride + k, stride);
      multiply_add_amx<1, 3, 2>();
    }
    store_amx<0>(out + c, out_stride), store_amx<1>(below + c, out_stride);
  }
}

// start(i) and use(i) for i in [0, count), each started before the one before it is used: products
// in tile registers are under way while vectors are at work.
template <class Start, class Use>
void overlapped(int64_t count, const Start& start, const Use& use) {
  if (count > 0) start(0);
  for (int64_t i = 0; i < count; ++i) {
    if (i + 1 < count) start(i + 1);
    use(i);
  }
}
#endif

}  // namespace fastres::FASTRES_ISA
