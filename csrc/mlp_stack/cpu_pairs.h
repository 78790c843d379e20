// cpu_pairs: rows of bfloat16 brought into the pairs that tile registers take, and back. A pair of
// elements is one of 32 bits.
#pragma once
#include "../common/amx.h"
#include "../common/tile_product.h"

#if defined(FASTRES_PAIRS)
namespace fastres::FASTRES_ISA {

// to [32, 2] <- 32 elements of each of two rows, pair by pair.
FASTRES_HD void interleave(const BFloat16* a, const BFloat16* b, BFloat16* to) {
  alignas(64) static constexpr uint16_t kOrder[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
  for (int i = 0; i < 2; ++i)
    _mm512_store_si512(
        to + 32 * i, _mm512_permutex2var_epi16(first, _mm512_load_si512(kOrder + 32 * i), second));
}

// to [16, to_stride, 2] <- 32 elements of each of `rows` rows, up to 32; those not there become 0.
inline void turn_pairs(const BFloat16* from, int64_t stride, int64_t rows, BFloat16* to,
                       int64_t to_stride) {
  const auto turn = [&](const BFloat16* rows, int64_t stride, int64_t first) {
    transpose16(reinterpret_cast<const float*>(rows), stride / 2,
                reinterpret_cast<float*>(to + 2 * first), to_stride);
  };
  for (int64_t first = 0; first < 32; first += kLanes) {
    if (first + kLanes <= rows) {
      turn(from + first * stride, stride, first);
    } else {
      alignas(64) BFloat16 some[kLanes * 32] = {};
      for (int64_t r = first; r < rows; ++r)
        std::memcpy(some + (r - first) * 32, from + r * stride, 32 * sizeof(BFloat16));
      turn(some, 32, first);
    }
  }
}

// 32 elements of each of `rows` rows, up to 32 <- from [16, from_stride, 2].
inline void turn_back(const BFloat16* from, int64_t from_stride, int64_t rows, BFloat16* to,
                      int64_t stride) {
  const auto turn = [&](BFloat16* rows, int64_t stride, int64_t first) {
    transpose16(reinterpret_cast<const float*>(from + 2 * first), from_stride,
                reinterpret_cast<float*>(rows), stride / 2);
  };
  for (int64_t first = 0; first < rows; first += kLanes) {
    if (first + kLanes <= rows) {
      turn(to + first * stride, stride, first);
    } else {
      alignas(64) BFloat16 some[kLanes * 32];
      turn(some, 32, first);
      for (int64_t r = first; r < rows; ++r)
        std::memcpy(to + r * stride, some + (r - first) * 32, 32 * sizeof(BFloat16));
    }
  }
}

}  // namespace fastres::FASTRES_ISA
#endif
