// pairs: numbers brought into the pairs of bfloat16 that tile registers take (amx.h). Rounding to
// pairs makes 0 of subnormal numbers, as the products do.
#pragma once
#include "amx.h"
#include "tile_product.h"

namespace fastres::FASTRES_ISA {

#if defined(FASTRES_PAIRS)
constexpr int64_t kPaired = 32;  // elements of a row that a register takes at a time

// to [16, 2] <- the first 16 and the last 16 elements, pair by pair.
FASTRES_HD void store_in_pairs(BFloat16* to, __m512i both) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
// to [16, 2]: the lanes of two tiles, pair by pair.
FASTRES_HD void store_pairs(BFloat16* to, const Tile<float>& a, const Tile<float>& b) {
  __m512i both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(a.v[0]), "v"(b.v[0]));
  store_in_pairs(to, both);
}
// to [16, 2] <- 16 elements of each of two rows, pair by pair.
FASTRES_HD void pair_rows(const BFloat16* a, const BFloat16* b, BFloat16* to) {
  const auto load = [](const BFloat16* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  };
  store_in_pairs(to, _mm512_inserti64x4(_mm512_castsi256_si512(load(a)), load(b), 1));
}
// to [16]: the lanes of a tile, likewise.
FASTRES_HD void store_rounded(BFloat16* to, const Tile<float>& a) {
  __m256i rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(a.v[0]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
}
// to [count / 2, 16 * kTiles, 2] <- from [count, stride]: what products take as their right factor.
template <int kTiles>
void to_pairs(const float* from, int64_t stride, int64_t count, BFloat16* to) {
  constexpr int64_t kColumns = kTiles * kLanes;
  for (int64_t k = 0; k < count; k += 2, from += 2 * stride, to += 2 * kColumns)
    for (int64_t i = 0; i < kColumns; i += kLanes)
      store_pairs(to + 2 * i, Stored<float>::load(from + i),
                  Stored<float>::load(from + stride + i));
}

// to [kPaired, 2] <- kPaired elements of each of two rows, pair by pair.
FASTRES_HD void interleave(const BFloat16* a, const BFloat16* b, BFloat16* to) {
  alignas(64) static constexpr uint16_t kOrder[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
  for (int i = 0; i < 2; ++i)
    _mm512_store_si512(
        to + kPaired * i,
        _mm512_permutex2var_epi16(first, _mm512_load_si512(kOrder + kPaired * i), second));
}

// 16 by 16 pairs, which are elements of 32 bits, with their strides in elements of 16 bits.
FASTRES_HD void transpose_pairs(const BFloat16* from, int64_t stride, BFloat16* to,
                                int64_t to_stride) {
  transpose16(reinterpret_cast<const float*>(from), stride / 2, reinterpret_cast<float*>(to),
              to_stride / 2);
}

// to [16, kPaired, 2] <- kPaired elements of each of `rows` rows; of those up to kPaired that are
// not there, 0.
inline void rows_to_pairs(const BFloat16* from, int64_t stride, int64_t rows, BFloat16* to) {
  for (int64_t r = 0; r < kPaired; r += kLanes) {
    if (r + kLanes <= rows) {
      transpose_pairs(from + r * stride, stride, to + 2 * r, 2 * kPaired);
    } else {
      alignas(64) BFloat16 some[kLanes * kPaired] = {};
      for (int64_t i = r; i < rows; ++i)
        std::memcpy(some + (i - r) * kPaired, from + i * stride, kPaired * sizeof(BFloat16));
      transpose_pairs(some, kPaired, to + 2 * r, 2 * kPaired);
    }
  }
}

// to [kPaired, count] <- kPaired columns of `count` rows, a multiple of 32: its transpose. Fetches
// what is `ahead` of them.
inline void columns_to_rows(const BFloat16* from, int64_t stride, int64_t count, BFloat16* to,
                            int64_t ahead) {
  alignas(64) BFloat16 pairs[kLanes * 2 * kPaired];
  for (int64_t k = 0; k < count; k += 2 * kLanes) {
    for (int64_t i = 0; i < 2 * kLanes; i += 2) {
      const BFloat16* two = from + (k + i) * stride;
      __builtin_prefetch(two + ahead, 0, 2);
      __builtin_prefetch(two + stride + ahead, 0, 2);
      interleave(two, two + stride, pairs + i * kPaired);
    }
    for (int64_t c = 0; c < kPaired; c += kLanes)
      transpose_pairs(pairs + 2 * c, 2 * kPaired, to + c * count + k, count);
  }
}
#endif

}  // namespace fastres::FASTRES_ISA
