// residual_add on the CPU: one pass over memory. Sums of a segment are float64 and joined in order,
// so that the result does not depend on the number of threads.
#include "cpu.h"

#include "../common/cpu_rows.h"
#include "../common/tile_rows.h"

namespace fastres::residual_add::FASTRES_ISA {
namespace {

using namespace fastres::FASTRES_ISA;

// One segment of a row: where it begins in a [rows, cols] tensor and in the mask, and its length.
struct Segment {
  int64_t row, at, mask_at, size;
  Segment(int64_t row, int64_t c, int64_t cols)
      : row(row),
        at(row * cols + c),
        mask_at(row * ((cols + 7) / 8) + c / 8),
        size(kSegment < cols - c ? kSegment : cols - c) {}
};

template <class T, bool kGated, bool kRelu>
Sums<double> forward_segment(const Args& a, const Segment& s) {
  using A = typename Stored<T>::A;
  using Tile = Tile<A>;
  const T *x = offset<T>(a.x, s.at), *f = offset<T>(a.f, s.at);
  T* y = offset<T>(a.y, s.at);
  uint8_t* mask = offset<uint8_t>(a.mask, s.mask_at);
  const A gate = gate_of<A>(a, s.row);
  Sums<double> total;
  for_each_tile<Sums<Tile>>(
      s.size,
      [&](int64_t c, int64_t n, Sums<Tile>& sums) __attribute__((always_inline)) {
        const Tile skip = load_ahead(x + c, n), branch = load_ahead(f + c, n),
                   p = kGated ? gate * branch : branch;
        sums.add(skip, p);
        Tile sum = skip + p;
        if constexpr (kRelu) {
          const uint16_t bits = positive_bits(sum) & ((1u << n) - 1);
          if (mask) std::memcpy(mask + c / 8, &bits, ceil_div(n, 8));
          sum = positive_part(sum);
        }
        store_ahead(y + c, sum, n);
      },
      [&](const Sums<Tile>& even, const Sums<Tile>& odd) __attribute__((always_inline)) {
        total.skip_sq += (even.skip_sq + odd.skip_sq).sum();
        total.branch_sq += (even.branch_sq + odd.branch_sq).sum();
        total.dot += (even.dot + odd.dot).sum();
      });
  return total;
}

template <class T> auto pick_forward(const Args& a) {
  if (a.relu) return a.gate ? forward_segment<T, true, true> : forward_segment<T, false, true>;
  return a.gate ? forward_segment<T, true, false> : forward_segment<T, false, false>;
}

template <class T> double backward_segment(const BackwardArgs& a, const Segment& s) {
  using A = typename Stored<T>::A;
  using Tile = Tile<A>;
  const T *gy = offset<T>(a.gy, s.at), *x = offset<T>(a.x, s.at), *f = offset<T>(a.f, s.at);
  T *gx = offset<T>(a.gx, s.at), *gf = offset<T>(a.gf, s.at);
  const uint8_t* mask = offset<uint8_t>(a.mask, s.mask_at);
  const A gate = gate_of<A>(a, s.row), *gs = offset<A>(a.gs, s.row);
  const SumGrads<A> sums =
      a.gs ? SumGrads<A>{gs[0], gs[a.rows], gs[2 * a.rows]} : SumGrads<A>{0, 0, 0};
  const bool wants_gate = a.ggate;
  double total = 0;
  for_each_tile<Tile>(
      s.size,
      [&](int64_t c, int64_t n, Tile& gate_grad) __attribute__((always_inline)) {
        Tile g = gy ? load_ahead(gy + c, n) : Tile{};
        if (mask) {
          uint16_t bits = 0;
          std::memcpy(&bits, mask + c / 8, ceil_div(n, 8));
          g = select(bits, g);
        }
        Tile gp = g;
        if (a.gs) {
          const Tile skip = load_ahead(x + c, n), p = gate * load_ahead(f + c, n);
          gp = sums.perturbation(g, skip, p);
          g = sums.skip(g, skip, p);
        }
        if (wants_gate) gate_grad += gp * load_ahead(f + c, n);
        if (gx) store_ahead(gx + c, g, n);
        if (gf) store_ahead(gf + c, gate * gp, n);
      },
      [&](const Tile& even, const Tile& odd)
          __attribute__((always_inline)) { total += (even + odd).sum(); });
  return total;
}

// Does the tasks, each sum to its partial or, with one segment a row, to keep(row, sum).
template <class Any, class Sum, class OneSegment, class Keep>
void do_tasks(const Any& a, Sum* partial, int64_t begin, int64_t end, const OneSegment& segment,
              const Keep& keep) {
  const int64_t segments = segments_of(a.cols);
  int64_t row = begin / segments, c = begin % segments * kSegment;
  for (int64_t task = begin; task < end; ++task) {
    const Sum sum = segment(a, Segment(row, c, a.cols));
    if (partial) partial[task] = sum;
    else keep(row, sum);
    c += kSegment;
    if (c >= a.cols) {
      c = 0;
      ++row;
    }
  }
}

}  // namespace

void forward(const Args& a, Sums<double>* partial, int64_t begin, int64_t end) {
  visit_stored(a.dtype, [&](auto t) {
    using T = decltype(t);
    do_tasks(a, partial, begin, end, pick_forward<T>(a),
             [&](int64_t row, const Sums<double>& sums) {
               store_sums<typename Stored<T>::A>(a.sums, a.rows, row, sums);
             });
  });
}

void join_forward(const Args& a, const Sums<double>* partial) {
  visit_stored(a.dtype, [&](auto t) {
    for (int64_t row = 0, segments = segments_of(a.cols); row < a.rows; ++row) {
      Sums<double> total;
      for (int64_t i = 0; i < segments; ++i, ++partial) {
        total.skip_sq += partial->skip_sq;
        total.branch_sq += partial->branch_sq;
        total.dot += partial->dot;
      }
      store_sums<typename Stored<decltype(t)>::A>(a.sums, a.rows, row, total);
    }
  });
}

void backward(const BackwardArgs& a, double* partial, int64_t begin, int64_t end) {
  visit_stored(a.dtype, [&](auto t) {
    using T = decltype(t);
    do_tasks(a, partial, begin, end, backward_segment<T>, [&](int64_t row, double sum) {
      if (a.ggate)
        static_cast<typename Stored<T>::A*>(a.ggate)[row] = static_cast<typename Stored<T>::A>(sum);
    });
  });
}

void join_backward(const BackwardArgs& a, const double* partial) {
  visit_stored(a.dtype, [&](auto t) {
    using A = typename Stored<decltype(t)>::A;
    for (int64_t row = 0, segments = segments_of(a.cols); row < a.rows; ++row) {
      double total = 0;
      for (int64_t i = 0; i < segments; ++i) total += *partial++;
      static_cast<A*>(a.ggate)[row] = static_cast<A>(total);
    }
  });
}

}  // namespace fastres::residual_add::FASTRES_ISA
