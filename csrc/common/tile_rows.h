// tile_rows: goes over a stretch of a row tile by tile, and sums on the way so that the rounding
// stays small and the order fixed.
#pragma once
#include "stored.h"

namespace fastres::FASTRES_ISA {

// 2048: a float32 lane then adds 64 products, and its rounding stays below 1e-6 of the sum.
constexpr int64_t kChunk = 2048;

// Calls tile(c, n, partial) for the tiles of [0, size); partial is one of two accumulators, because
// a single chain of additions would be bound by their latency. `fold` takes both at the end of a
// chunk.
template <class Partial, class OneTile, class Fold>
FASTRES_HD void for_each_tile(int64_t size, const OneTile& tile, const Fold& fold) {
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    const int64_t end = begin + kChunk < size ? begin + kChunk : size;
    Partial even{}, odd{};
    int64_t c = begin;
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
      tile(c, kLanes, even);
      tile(c + kLanes, kLanes, odd);
    }
    if (c + kLanes <= end) {
      tile(c, kLanes, even);
      c += kLanes;
    }
    if (c < end) tile(c, end - c, odd);
    fold(even, odd);
  }
}

}  // namespace fastres::FASTRES_ISA
