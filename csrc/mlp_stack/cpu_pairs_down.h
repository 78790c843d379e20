// cpu_pairs_down: what the way down takes to the tile registers of AMX: products of float32 whose
// factors are rounded to bfloat16 for them, as eager's are. All else stays in float32.
#pragma once
#include "../common/amx.h"
#include "cpu_tile.h"

#if defined(FASTRES_PAIRS)
namespace fastres::mlp_stack::FASTRES_ISA {

// Rows of a left factor, by 32, and room for the pairs of the right one.
struct PairedRows {
  const BFloat16* at;
  int64_t stride;
  BFloat16* pairs;  // [columns of the left factor / 2, kLargestGroup, 2]
  PairedRows from_row(int64_t r) const { return {at + r * stride, stride, pairs}; }
};

// As product() of tile_product.h, with rows and `count` multiples of 32.
template <int kTiles, bool kAdd = false>
void product(int64_t rows, const PairedRows& w, const float* bias, const float* in,
             int64_t in_stride, int64_t count, float* out, int64_t out_stride) {
  constexpr int64_t kColumns = kTiles * kLanes;
  to_pairs<kTiles>(in, in_stride, count, w.pairs);
  for (int64_t r = 0; r < rows; r += 32)
    product_of_pairs<kTiles, kAdd>(w.from_row(r).at, w.stride, w.pairs, count, out + r * out_stride,
                                   out_stride);
  for (int64_t r = 0; bias && r < rows; ++r)
    for (int64_t i = 0; i < kColumns; i += kLanes) {
      float* place = out + r * out_stride + i;
      Stored<float>::store(place, Stored<float>::load(place) + Math<Tile<float>>::of(bias[r]));
    }
}

// As Widened: a member's weights for such products, 32 rows at a time.
class PairedWeights {
 public:
  PairedWeights(int64_t most, const Shape& s, int members, int direction)
      : ahead_(elements_ahead<BFloat16>(s, members, direction)),
        turned_(kChunk * most),
        pairs_(kLargestGroup * most) {}

  PairedRows rows(const BFloat16* from, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows * cols; i += 32) __builtin_prefetch(from + i + ahead_, 0, 2);
    return {from, cols, pairs_.data()};
  }
  // Columns [0, 32) of a matrix of `count` rows as rows. Two rows in pairs are 32-bit elements, to
  // be transposed.
  PairedRows columns(const BFloat16* from, int64_t stride, int64_t count, int64_t) {
    alignas(64) float pairs[kLanes * kChunk];
    for (int64_t k = 0; k < count; k += 2 * kLanes) {
      for (int64_t i = 0; i < 2 * kLanes; i += 2) {
        const BFloat16* two = from + (k + i) * stride;
        __builtin_prefetch(two + ahead_, 0, 2);
        __builtin_prefetch(two + stride + ahead_, 0, 2);
        interleave(two, two + stride, pairs + i / 2 * kChunk);
      }
      for (int64_t c = 0; c < kChunk; c += kLanes)
        transpose16(pairs + c, kChunk, reinterpret_cast<float*>(turned_.data() + c * count + k),
                    count / 2);
    }
    return {turned_.data(), count, pairs_.data()};
  }
  const float* bias(const BFloat16* from, int64_t size) {
    move(from, bias_, size);
    return bias_;
  }

 private:
  // to [32, 2] <- 32 elements of each of two rows.
  static void interleave(const BFloat16* a, const BFloat16* b, float* to) {
    alignas(64) static constexpr uint16_t kOrder[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
    for (int i = 0; i < 2; ++i)
      _mm512_store_si512(to + 16 * i, _mm512_permutex2var_epi16(
                                          first, _mm512_load_si512(kOrder + 32 * i), second));
  }

  const int64_t ahead_;
  std::vector<BFloat16> turned_, pairs_;
  alignas(64) float bias_[kChunk];
};

// As InPlace, for sums over samples: up to kPairedRows rows of up to kSlab samples, rounded.
class PairedFactor {
 public:
  static constexpr int64_t kStep = 32;
  PairedRows rows(const float* left, int64_t rows, int64_t stride, int64_t samples) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t b = 0; b < round_up(samples, kStep); b += kLanes) {
        const int64_t n = samples < b ? 0 : least(kLanes, samples - b);
        store_rounded(rows_ + r * kSlab + b, load(left + r * stride + b, n));
      }
    return {rows_, kSlab, pairs_};
  }

 private:
  alignas(64) BFloat16 rows_[kPairedRows * kSlab], pairs_[kSlab * kLargestGroup];
};

}  // namespace fastres::mlp_stack::FASTRES_ISA
#endif
