// path_accumulate on the CPU: one pass over memory. Sums of a segment are float64 and joined in
// order, so that the result does not depend on the number of threads.
#include "cpu.h"

#include "../common/tile_rows.h"

namespace fastres::path_accumulate::FASTRES_ISA {
namespace {

using namespace fastres::FASTRES_ISA;

// Elements [begin, begin + size) of a line.
template <class T, class A>
Sums<double> accumulate_segment(const Line<T, A>& line, int64_t begin, int64_t size) {
  using Tile = Tile<A>;
  Sums<double> total;
  for_each_tile<Sums<Tile>>(
      size,
      [&](int64_t at, int64_t n, Sums<Tile>& sums) __attribute__((always_inline)) {
        const int64_t c = begin + at;
        Tile sum = line.skip ? load_ahead(line.skip + c, n) : Tile{};
        if (line.from) sum += line.power * load_ahead(line.from + c, n);
        if (line.own) sum += load_ahead(line.own + c, n);
        sums.square += sum * sum;
        if (line.gradient) sums.dot += sum * load_ahead(line.gradient + c, n);
        store_ahead(line.out + c, sum, n);
      },
      [&](const Sums<Tile>& even, const Sums<Tile>& odd) __attribute__((always_inline)) {
        total.square += (even.square + odd.square).sum();
        if (line.gradient) total.dot += (even.dot + odd.dot).sum();
      });
  return total;
}

template <class A> void store_sums(const Args& a, int64_t line, const Sums<double>& sums) {
  A* out = static_cast<A*>(a.sums) + line;
  out[0] = static_cast<A>(sums.square);
  if (a.dot) out[a.lines()] = static_cast<A>(sums.dot);
}

}  // namespace

void accumulate(const Args& a, Sums<double>* partial, int64_t begin, int64_t end) {
  visit_stored(a.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Stored<T>::A;
    const int64_t segments = segments_of(a.cols);
    int64_t i = begin / segments, c = begin % segments * kSegment;
    int64_t row = i / a.samples, sample = i % a.samples;  // stepped on: a division costs 10 ns
    for (int64_t task = begin; task < end; ++task) {
      const Sums<double> sums = accumulate_segment(Line<T, A>(a, i, row, sample), c,
                                                   kSegment < a.cols - c ? kSegment : a.cols - c);
      if (partial) partial[task] = sums;
      else store_sums<A>(a, i, sums);
      c += kSegment;
      if (c < a.cols) continue;
      c = 0;
      ++i;
      if (++sample == a.samples) {
        sample = 0;
        ++row;
      }
    }
  });
}

void join(const Args& a, const Sums<double>* partial) {
  visit_stored(a.dtype, [&](auto t) {
    for (int64_t i = 0, segments = segments_of(a.cols); i < a.lines(); ++i) {
      Sums<double> total;
      for (int64_t s = 0; s < segments; ++s, ++partial) {
        total.square += partial->square;
        total.dot += partial->dot;
      }
      store_sums<typename Stored<decltype(t)>::A>(a, i, total);
    }
  });
}

}  // namespace fastres::path_accumulate::FASTRES_ISA
