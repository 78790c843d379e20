// cpu_product: rows of a convolution of 3x3 as sums of products, some pixels at a time.
#pragma once
#include <cstring>
#include <utility>

#include "../common/tile_product.h"
#include "../common/tile_rows.h"

namespace fastres::conv_stack::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

// The weights of some channels that are written, for some that are read.
template <class T> struct Taps {
  const T* weights;  // [3, 3, read, written]: taps are C * C elements apart, channels read C
  int64_t width;     // C
  const T* bias;     // [written]; null: the sums are added to what is there
  int64_t read;      // 16 at most
  int64_t written;   // 32 at most
};

// The rows that are read, of 16 channels: the first of three, of its pixel -1.
template <class A> struct Source {
  const A* at;
  int64_t line;  // elements to the next row
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

// out[t][p] = bias[t] + sum over taps and 16 channels, for kPixels neighbours and kTiles tiles of
// channels; bias null: is added to out. kWhole: both C and the channels that are written fill
// tiles. Every 16 channels are summed up by themselves first: one chain of 9 C additions would
// round more than eager.
template <int kPixels, int kTiles, bool kWhole, class T, class A>
FASTRES_HD void convolve_pixels(const Taps<T>& taps, const Source<A>& from, A* out,
                                int64_t out_plane) {
  const auto load_tile = [&](const T* at, int t) __attribute__((always_inline)) {
    if constexpr (kWhole) return Stored<T>::load(at + t * kLanes);
    else return load(at + t * kLanes, least(kLanes, taps.written - t * kLanes));
  };
  const int64_t n = kWhole ? kLanes : taps.read;
  Tile<A> sum[kPixels][kTiles]{};
  for (int y = 0; y < 3; ++y) {
    const A* pixel = from.at + y * from.line;
    const T* w = taps.weights + y * 3 * taps.width * taps.width;
    for (int x = 0; x < 3; ++x, pixel += kLanes, w += taps.width * taps.width) {
      const T* row = w;
      for (int64_t i = 0; i < n; ++i, row += taps.width) {
        Tile<A> v[kTiles];
#pragma GCC unroll 2
        for (int t = 0; t < kTiles; ++t) v[t] = load_tile(row, t);
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) {
          const A value = pixel[p * kLanes + i];
#pragma GCC unroll 2
          for (int t = 0; t < kTiles; ++t) sum[p][t] += value * v[t];
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t) {
    const Tile<A> bias = taps.bias ? load_tile(taps.bias, t) : Tile<A>{};
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
      A* place = out + t * out_plane + p * kLanes;
      Stored<A>::store(place, (taps.bias ? bias : Stored<A>::load(place)) + sum[p][t]);
    }
  }
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

// The same for rows, which lie `out_line` apart.
template <int kTiles, bool kWhole, class T, class A>
void convolve_rows(const Taps<T>& taps, const Source<A>& from, int64_t rows, int64_t width, A* out,
                   int64_t out_plane, int64_t out_line) {
  for (int64_t r = 0; r < rows; ++r)
    convolve_row<kPixelsAtOnce<A, kTiles>, kTiles, kWhole>(
        taps, Source<A>{from.at + r * from.line, from.line}, width, out + r * out_line, out_plane);
}

template <class T, class A>
void convolve_rows(const Taps<T>& taps, const Source<A>& from, int64_t rows, int64_t width, A* out,
                   int64_t out_plane, int64_t out_line) {
  const bool whole = taps.width % kLanes == 0;
  const auto run = taps.written > kLanes
                       ? whole ? convolve_rows<2, true, T, A> : convolve_rows<2, false, T, A>
                   : whole ? convolve_rows<1, true, T, A>
                           : convolve_rows<1, false, T, A>;
  run(taps, from, rows, width, out, out_plane, out_line);
}

}  // namespace fastres::conv_stack::FASTRES_ISA
