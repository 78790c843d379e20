// batch_norm_residual on the CPU: the walk over the tiles of a run of lines, with what belongs to
// their channels at hand, and sums along the way.
#pragma once
#include <algorithm>
#include <vector>

#include "../common/cpu_rows.h"
#include "cpu.h"

namespace fastres::batch_norm_residual::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

// Lines [first, last) of one sample, in one task.
struct Run {
  int64_t task, row, first, last;
  int64_t at(const Shape& s) const { return row * s.cols(); }
  int64_t mask_at(const Shape& s) const { return row * s.mask_cols(); }
  int64_t slot_at(const Shape& s) const {  // [2, padded] doubles each
    const Tasks tasks(s);
    return (s.pixels ? task : row / tasks.samples) * 2 * padded(s.channels);
  }
};

// Calls body(run) for all runs of tasks [begin, end).
template <class Body>
void for_each_run(const Shape& s, int64_t begin, int64_t end, const Body& body) {
  const Tasks tasks(s);
  for (int64_t task = begin; task < end; ++task) {
    if (tasks.segments > 1) {
      const int64_t row = task / tasks.segments, first = task % tasks.segments * tasks.lines;
      body(Run{task, row, first, std::min(first + tasks.lines, s.lines())});
    } else {
      const int64_t last = std::min((task + 1) * tasks.samples, s.rows);
      for (int64_t row = task * tasks.samples; row < last; ++row)
        body(Run{task, row, 0, s.lines()});
    }
  }
}

// The first kCount rows of the table, as tiles: of planes one number in all lanes, of pixels a
// number per lane.
template <class A, bool kPixels, int kCount> struct Table {
  const A* values;
  int64_t stride;
  Table(const Shape& s, const void* table)
      : values(static_cast<const A*>(table)), stride(padded(s.channels)) {}

  FASTRES_HD void line(int64_t line, Tile<A> (&c)[kCount]) const {
    if constexpr (!kPixels)
      for (int i = 0; i < kCount; ++i) {
        const A value = values[i * stride + line];
        c[i] = Tile<A>::map([&](int) { return value + typename Tile<A>::Vector{}; });
      }
  }
  FASTRES_HD void tile(int64_t channel, Tile<A> (&c)[kCount]) const {
    if constexpr (kPixels)
      for (int i = 0; i < kCount; ++i) c[i] = Stored<A>::load(values + i * stride + channel);
  }
};

// The first n lanes, 0 elsewhere. With n = kLanes a constant it is free.
template <class A> FASTRES_HD Tile<A> first(int64_t n, const Tile<A>& t) {
  return n == kLanes ? t : select(static_cast<uint16_t>((1u << n) - 1), t);
}

FASTRES_HD Tile<double> widen(const Tile<double>& t) { return t; }
FASTRES_HD Tile<double> widen(const Tile<float>& t) {
  return Tile<double>::map([&](int i) {
    using Vector = typename Tile<double>::Vector;
    using Part = typename Packed<float, Tile<double>::kWidth>::type;
    const Part part = half_of<Part>(t.v[i / 2], i % 2);
#if defined(__AVX512F__)  // gcc would convert it in two halves
    return (Vector)_mm512_maskz_cvtps_pd(0xff, (__m256)part);
#else
    return __builtin_convertvector(part, Vector);
#endif
  });
}

struct None {};

// After so many values float32 sums go on to float64: a lane has then added 128 at most.
constexpr int64_t kChunk = 1024;

// Calls tile(i, mask_at, n, channel, partial) for the tiles of a run: n values from i on in the
// sample. partial is one of two accumulators, because a single chain of additions would be bound by
// their latency; `fold` takes both now and then.
template <class Partial, class A, bool kPixels, int kCount, class OneTile, class Fold>
FASTRES_HD void for_each_tile(const Shape& s, const Run& run,
                              const Table<A, kPixels, kCount>& table, const OneTile& tile,
                              const Fold& fold) {
  const int64_t length = s.length(), mask_length = ceil_div(length, 8);
  Partial even{}, odd{};
  int64_t unfolded = 0;
  for (int64_t line = run.first; line < run.last; ++line) {
    Tile<A> channel[kCount];
    table.line(line, channel);
    const int64_t at = line * length, mask_at = line * mask_length;
    auto do_tile = [&](int64_t c, int64_t n, Partial& partial) __attribute__((always_inline)) {
      table.tile(c, channel);
      tile(at + c, mask_at + c / 8, n, channel, partial);
    };
    for (int64_t begin = 0; begin < length; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, length);
      int64_t c = begin;
      for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
        do_tile(c, kLanes, even);
        do_tile(c + kLanes, kLanes, odd);
      }
      if (c + kLanes <= end) {
        do_tile(c, kLanes, even);
        c += kLanes;
      }
      if (c < end) do_tile(c, end - c, odd);
      unfolded += end - begin;
      if (unfolded < kChunk) continue;
      fold(even, odd);
      even = odd = Partial{};
      unfolded = 0;
    }
  }
  fold(even, odd);
}

// So many tiles side by side are read at once: their sums fill the registers that there are, in
// chains enough.
constexpr int kGroup = kVectorBytes == 64 ? 4 : 1;

// Adds kSums sums of each channel over a run to its slot, [kSums, padded]. tile(i, mask_at, n,
// channel, sums) adds those of a tile. Lines of pixels cross all channels: 32 of them are done at a
// time, so that a slot is read and written once for 32 tiles.
template <int kSums, class A, int kCount, class OneTile>
FASTRES_HD void add_channel_sums(const Shape& s, const Run& run,
                                 const Table<A, true, kCount>& table, double* slot,
                                 const OneTile& tile) {
  const int64_t length = s.length(), mask_length = ceil_div(length, 8), stride = padded(s.channels);
  for (int64_t top = run.first; top < run.last; top += 32) {
    const int64_t bottom = std::min<int64_t>(top + 32, run.last);
    int64_t c = 0;
    auto add = [&](auto tiles, auto n) __attribute__((always_inline)) {
      constexpr int kTiles = decltype(tiles)::value;
      Tile<A> channel[kTiles][kCount];
      Tile<double> sums[kTiles][kSums] = {};
      for (int t = 0; t < kTiles; ++t) table.tile(c + t * kLanes, channel[t]);
      for (int64_t line = top; line < bottom; ++line)
        for (int t = 0; t < kTiles; ++t)
          tile(line * length + c + t * kLanes, line * mask_length + c / 8 + t * (kLanes / 8), n,
               channel[t], sums[t]);
      for (int t = 0; t < kTiles; ++t)
        for (int k = 0; k < kSums; ++k) {
          double* to = slot + k * stride + c + t * kLanes;
          Stored<double>::store(to, Stored<double>::load(to) + sums[t][k]);
        }
      c += kTiles * kLanes;
    };
    constexpr std::integral_constant<int, kGroup> group;
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int64_t, kLanes> whole;
    while (c + kGroup * kLanes <= length) add(group, whole);
    while (c + kLanes <= length) add(one, whole);
    if (c < length) add(one, length - c);
  }
}

// Of planes: a line is one channel, whose sums have two accumulators each, as in for_each_tile.
template <int kSums, class A, int kCount, class OneTile>
FASTRES_HD void add_channel_sums(const Shape& s, const Run& run,
                                 const Table<A, false, kCount>& table, double* slot,
                                 const OneTile& tile) {
  const int64_t length = s.length(), mask_length = ceil_div(length, 8), stride = padded(s.channels);
  for (int64_t line = run.first; line < run.last; ++line) {
    Tile<A> channel[kCount];
    table.line(line, channel);
    Tile<double> even[kSums] = {}, odd[kSums] = {};
    const int64_t i = line * length, mask_at = line * mask_length;
    int64_t c = 0;
    for (; c + 2 * kLanes <= length; c += 2 * kLanes) {
      tile(i + c, mask_at + c / 8, kLanes, channel, even);
      tile(i + c + kLanes, mask_at + c / 8 + kLanes / 8, kLanes, channel, odd);
    }
    if (c + kLanes <= length) {
      tile(i + c, mask_at + c / 8, kLanes, channel, even);
      c += kLanes;
    }
    if (c < length) tile(i + c, mask_at + c / 8, length - c, channel, odd);
    for (int k = 0; k < kSums; ++k) slot[k * stride + line] += (even[k] + odd[k]).sum();
  }
}

}  // namespace fastres::batch_norm_residual::FASTRES_ISA
