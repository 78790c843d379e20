// cpu_product: a row of a convolution of 3x3 as sums of products, some pixels at a time.
#pragma once
#include <cstring>
#include <utility>

#include "../common/tile_product.h"
#include "../common/tile_rows.h"
#include "cpu.h"

namespace fastres::conv_stack::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

// The weights of some channels that are written.
template <class T> struct Taps {
  const T* weights;  // [3, 3, C, channels], `channels` of rows of C
  int64_t width;     // C
  const T* bias;     // [channels]
  int64_t channels;  // 32 at most
};

// The rows that are read: the first of three, of its pixel -1.
template <class A> struct Source {
  const A* at;
  int64_t line, plane;  // elements to the next row, to the next 16 channels
};

// Registers of sums: of 32 with AVX-512, else of 16. The others hold weights and a value.
#if defined(__AVX512F__)
constexpr int kSums = 16;
#else
constexpr int kSums = 8;
#endif
// Pixels at once, for one tile of channels or two.
template <class A, int kTiles>
constexpr int kPixelsAtOnce =
    kSums / Tile<A>::kCount / kTiles < 1 ? 1 : kSums / Tile<A>::kCount / kTiles;

// out[t][p] = bias[t] + sum over taps and channels, for kPixels neighbours and kTiles tiles of
// channels; kWhole: both C and the channels that are written fill tiles.
template <int kPixels, int kTiles, bool kWhole, class T, class A>
FASTRES_HD void convolve_pixels(const Taps<T>& taps, const Source<A>& from, A* out,
                                int64_t out_plane) {
  const auto weight = [&](const T* at, int t) __attribute__((always_inline)) {
    if constexpr (kWhole) return Stored<T>::load(at + t * kLanes);
    else return load(at + t * kLanes, least(kLanes, taps.channels - t * kLanes));
  };
  Tile<A> sum[kPixels][kTiles];
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t) {
    const Tile<A> bias = weight(taps.bias, t);
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) sum[p][t] = bias;
  }
  for (int64_t c = 0; c < taps.width; c += kLanes) {
    const int64_t n = kWhole ? kLanes : least(kLanes, taps.width - c);
    for (int y = 0; y < 3; ++y) {
      const A* pixel = from.at + c / kLanes * from.plane + y * from.line;
      const T* w = taps.weights + (y * 3 * taps.width + c) * taps.width;
      for (int x = 0; x < 3; ++x, pixel += kLanes, w += taps.width * taps.width) {
        const T* row = w;
        for (int64_t i = 0; i < n; ++i, row += taps.width) {
          Tile<A> v[kTiles];
#pragma GCC unroll 2
          for (int t = 0; t < kTiles; ++t) v[t] = weight(row, t);
#pragma GCC unroll 16
          for (int p = 0; p < kPixels; ++p) {
            const A value = pixel[p * kLanes + i];
#pragma GCC unroll 2
            for (int t = 0; t < kTiles; ++t) sum[p][t] += value * v[t];
          }
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) Stored<A>::store(out + t * out_plane + p * kLanes, sum[p][t]);
}

// The same for a row of `width` pixels.
template <int kPixels, int kTiles, bool kWhole, class T, class A>
FASTRES_HD void convolve_row(const Taps<T>& taps, Source<A> from, int64_t width, A* out,
                             int64_t out_plane) {
  for (; width >= kPixels; width -= kPixels, from.at += kPixels * kLanes, out += kPixels * kLanes)
    convolve_pixels<kPixels, kTiles, kWhole>(taps, from, out, out_plane);
  if constexpr (kPixels > 1)
    if (width) convolve_row<kPixels / 2, kTiles, kWhole>(taps, from, width, out, out_plane);
}

template <class T, class A>
void convolve_row(const Taps<T>& taps, const Source<A>& from, int64_t width, A* out,
                  int64_t out_plane) {
  const bool whole = taps.width % kLanes == 0;
  if (taps.channels > kLanes && whole)
    convolve_row<kPixelsAtOnce<A, 2>, 2, true>(taps, from, width, out, out_plane);
  else if (taps.channels > kLanes)
    convolve_row<kPixelsAtOnce<A, 2>, 2, false>(taps, from, width, out, out_plane);
  else if (whole) convolve_row<kPixelsAtOnce<A, 1>, 1, true>(taps, from, width, out, out_plane);
  else convolve_row<kPixelsAtOnce<A, 1>, 1, false>(taps, from, width, out, out_plane);
}

}  // namespace fastres::conv_stack::FASTRES_ISA
