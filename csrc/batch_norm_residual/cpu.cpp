// batch_norm_residual on the CPU: a pass for the sums of each channel, which are float64, and a
// pass that writes. All sums are joined in the order of the samples, whatever the threads.
#include "cpu.h"

#include <cmath>

#include "cpu_walk.h"

namespace fastres::batch_norm_residual::FASTRES_ISA {
namespace {

// The moments are summed about a pivot, one of the values themselves: nothing cancels but what is
// within a factor `count` of the variance, in float64.
template <class T, bool kPixels>
void moments_of(const Args& a, const Run& run, const void* table, double* slot) {
  using A = typename Stored<T>::A;
  const T* f = offset<T>(a.f, run.at(a.shape));
  add_channel_sums<2>(a.shape, run, Table<A, kPixels, 1>(a.shape, table), slot,
                      [&](int64_t i, int64_t, int64_t n, const Tile<A>(&pivot)[1],
                          Tile<double>(&sum)[2]) __attribute__((always_inline)) {
                        const Tile<double> d = widen(first(n, load_ahead(f + i, n) - pivot[0]));
                        sum[0] += d;
                        sum[1] += d * d;
                      });
}

template <class T, bool kPixels, bool kRelu, bool kSkip>
Sums<double> forward_run(const Args& a, const Run& run, const void* table) {
  using A = typename Stored<T>::A;
  const int64_t at = run.at(a.shape);
  const T *x = offset<T>(a.x, at), *f = offset<T>(a.f, at);
  T* y = offset<T>(a.y, at);
  uint8_t* mask = offset<uint8_t>(a.mask, run.mask_at(a.shape));
  const A gate = gate_of<A>(a, run.row);
  Sums<double> total;
  for_each_tile<Sums<Tile<A>>>(
      a.shape, run, Table<A, kPixels, 3>(a.shape, table),
      [&](int64_t i, int64_t mask_at, int64_t n, const Tile<A>(&c)[3], Sums<Tile<A>>& sums)
          __attribute__((always_inline)) {
            const Norm<Tile<A>> norm{c[kMean], c[kScale], c[kBias]};
            const Tile<A> p = first(n, gate * norm(load_ahead(f + i, n)));
            Tile<A> sum = p;
            if constexpr (kSkip) {
              const Tile<A> skip = load_ahead(x + i, n);
              sums.add(skip, p);
              sum = skip + p;
            }
            if constexpr (kRelu) {
              const uint16_t bits = positive_bits(sum) & ((1u << n) - 1);
              if (mask) std::memcpy(mask + mask_at, &bits, ceil_div(n, 8));
              sum = positive_part(sum);
            }
            store_ahead(y + i, sum, n);
          },
      [&](const Sums<Tile<A>>& even, const Sums<Tile<A>>& odd) __attribute__((always_inline)) {
        total.skip_sq += (even.skip_sq + odd.skip_sq).sum();
        total.branch_sq += (even.branch_sq + odd.branch_sq).sum();
        total.dot += (even.dot + odd.dot).sum();
      });
  return total;
}

// The cotangent of the sum, 0 where the ReLU is closed.
template <class T> struct Cotangent {
  const T* gy;
  const uint8_t* mask;
  Cotangent(const BackwardArgs& a, const Run& run)
      : gy(offset<T>(a.gy, run.at(a.shape))), mask(offset<uint8_t>(a.mask, run.mask_at(a.shape))) {}
  FASTRES_HD auto operator()(int64_t i, int64_t mask_at, int64_t n) const {
    const auto g = load_ahead(gy + i, n);
    if (!mask) return g;
    uint16_t bits = 0;
    std::memcpy(&bits, mask + mask_at, ceil_div(n, 8));
    return select(bits, g);
  }
};

// Adds up of_g, of_f; returns the run's part of ggate.
template <class T, bool kPixels>
double reduce_run(const BackwardArgs& a, const Run& run, const void* table, double* slot) {
  using A = typename Stored<T>::A;
  const T* f = offset<T>(a.f, run.at(a.shape));
  const Cotangent<T> cotangent(a, run);
  const A gate = gate_of<A>(a, run.row);
  const bool wants_gate = a.ggate;
  Tile<double> ggate{};
  add_channel_sums<2>(
      a.shape, run, Table<A, kPixels, 3>(a.shape, table), slot,
      [&](int64_t i, int64_t mask_at, int64_t n, const Tile<A>(&c)[3],
          Tile<double>(&sum)[2]) __attribute__((always_inline)) {
        const Tile<A> g = cotangent(i, mask_at, n), branch = load_ahead(f + i, n), gated = gate * g;
        sum[0] += widen(gated);
        sum[1] += widen(first(n, gated * (branch - c[kMean])));
        if (wants_gate)
          ggate += widen(first(n, g * Norm<Tile<A>>{c[kMean], c[kScale], c[kBias]}(branch)));
      });
  return ggate.sum();
}

template <class T, bool kPixels, bool kTraining>
void backward_run(const BackwardArgs& a, const Run& run, const void* table) {
  using A = typename Stored<T>::A;
  const int64_t at = run.at(a.shape);
  const T* f = offset<T>(a.f, at);
  T *gx = offset<T>(a.gx, at), *gf = offset<T>(a.gf, at);
  const Cotangent<T> cotangent(a, run);
  const A gate = gate_of<A>(a, run.row);
  for_each_tile<None>(
      a.shape, run, Table<A, kPixels, kEntries>(a.shape, table),
      [&](int64_t i, int64_t mask_at, int64_t n, const Tile<A>(&c)[kEntries],
          None&) __attribute__((always_inline)) {
        const Tile<A> g = cotangent(i, mask_at, n);
        if (gx) store_ahead(gx + i, g, n);
        const Pull<Tile<A>> pull{c[kMean], c[kScale], c[kPerG], c[kPerF]};
        store_ahead(gf + i,
                    kTraining ? pull(gate * g, load_ahead(f + i, n)) : c[kScale] * (gate * g), n);
      },
      [](const None&, const None&) {});
}

// Calls body(T(), std::bool_constant<pixels>()).
template <class Body> void visit(Dtype dtype, const Shape& shape, const Body& body) {
  visit_stored(dtype, [&](auto t) {
    if (shape.pixels) body(t, std::true_type());
    else body(t, std::false_type());
  });
}

template <class T> double at(const void* values, int64_t c, double otherwise) {
  return values ? double(load(in<T>(values, c), 1).v[0][0]) : otherwise;
}

// From weight and bias of type T. What rounding took of the mean goes to the bias.
template <class T, class Any, class A> void fill_norm(const Any& a, A* table, int64_t c) {
  const int64_t stride = padded(a.shape.channels);
  const auto of = Statistics<A>::of(a.statistics, a.shape.channels, c);
  const double scale = at<T>(a.weight, c, 1) / std::sqrt(double(of.var) + a.eps);
  table[kMean * stride + c] = of.mean;
  table[kScale * stride + c] = static_cast<A>(scale);
  table[kBias * stride + c] = static_cast<A>(at<T>(a.bias, c, 0) - scale * of.lost);
}

// From weight, bias and given statistics of type T: those are kept too.
template <class T, class A> void fill_entry(const Args& a, A* table, int64_t c) {
  if (!a.training)
    Statistics<A>{static_cast<A>(at<T>(a.mean, c, 0)), static_cast<A>(at<T>(a.var, c, 1)),
                  static_cast<A>(at<A>(a.lost, c, 0))}
        .keep(a, c);
  fill_norm<T>(a, table, c);
}

// The sums of all slots, [2, padded].
std::vector<double> join_slots(const Shape& shape, const double* slots, bool any = true) {
  const int64_t size = 2 * padded(shape.channels);
  std::vector<double> total(size);
  for (int64_t i = 0, count = any ? Tasks(shape).slots : 0; i < count; ++i)
    for (int64_t c = 0; c < size; ++c) total[c] += slots[i * size + c];
  return total;
}

}  // namespace

void pivots(const Args& a, void* table) {
  visit_stored(a.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Stored<T>::A;
    const int64_t step = a.shape.pixels ? 1 : a.shape.places;
    for (int64_t c = 0; c < a.shape.channels; ++c) {
      const A value = load(static_cast<const T*>(a.f) + c * step, 1).v[0][0];
      static_cast<A*>(table)[kMean * padded(a.shape.channels) + c] =
          std::isfinite(value) ? value : 0;
    }
  });
}

void moments(const Args& a, const void* table, double* slots, int64_t begin, int64_t end) {
  visit(a.dtype, a.shape, [&](auto t, auto pixels) {
    for_each_run(a.shape, begin, end, [&](const Run& run) {
      moments_of<decltype(t), pixels>(a, run, table, slots + run.slot_at(a.shape));
    });
  });
}

void fill_table(const Args& a, const double* slots, void* table) {
  visit_stored(a.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Stored<T>::A;
    A* values = static_cast<A*>(table);
    const int64_t stride = padded(a.shape.channels);
    const double count = a.shape.count();
    const std::vector<double> total = join_slots(a.shape, slots, a.training);
    if (a.batches) ++*a.batches;
    for (int64_t c = 0; c < a.shape.channels; ++c) {
      if (a.training) {
        const double moved = total[c] / count, mean = values[kMean * stride + c] + moved;
        const double var = total[stride + c] / count - moved * moved;
        keep_moments<A>(a, c, mean, var);
      }
      if (a.narrow) fill_entry<T>(a, values, c);
      else fill_entry<A>(a, values, c);
    }
  });
}

void forward(const Args& a, const void* table, Sums<double>* partial, int64_t begin, int64_t end) {
  visit(a.dtype, a.shape, [&](auto t, auto pixels) {
    using T = decltype(t);
    const auto with =
        a.relu ? forward_run<T, pixels, true, true> : forward_run<T, pixels, false, true>;
    const auto without =
        a.relu ? forward_run<T, pixels, true, false> : forward_run<T, pixels, false, false>;
    const auto one = a.x ? with : without;
    for_each_run(a.shape, begin, end, [&](const Run& run) {
      const Sums<double> sums = one(a, run, table);
      if (partial) partial[run.task] = sums;
      else if (a.sums) store_sums<typename Stored<T>::A>(a.sums, a.shape.rows, run.row, sums);
    });
  });
}

void join_forward(const Args& a, const Sums<double>* partial) {
  visit_stored(a.dtype, [&](auto t) {
    for (int64_t row = 0, segments = Tasks(a.shape).segments; row < a.shape.rows; ++row) {
      Sums<double> total;
      for (int64_t i = 0; i < segments; ++i, ++partial) {
        total.skip_sq += partial->skip_sq;
        total.branch_sq += partial->branch_sq;
        total.dot += partial->dot;
      }
      store_sums<typename Stored<decltype(t)>::A>(a.sums, a.shape.rows, row, total);
    }
  });
}

void begin_table(const BackwardArgs& a, void* table) {
  visit_stored(a.dtype, [&](auto t) {
    using A = typename Stored<decltype(t)>::A;
    for (int64_t c = 0; c < a.shape.channels; ++c) fill_norm<A>(a, static_cast<A*>(table), c);
  });
}

void reduce(const BackwardArgs& a, const void* table, double* slots, double* partial, int64_t begin,
            int64_t end) {
  visit(a.dtype, a.shape, [&](auto t, auto pixels) {
    const int64_t segments = Tasks(a.shape).segments;
    for_each_run(a.shape, begin, end, [&](const Run& run) {
      const double ggate =
          reduce_run<decltype(t), pixels>(a, run, table, slots + run.slot_at(a.shape));
      if (a.ggate) partial[segments > 1 ? run.task : run.row] = ggate;
    });
  });
}

void end_table(const BackwardArgs& a, const double* slots, const double* partial, void* table) {
  visit_stored(a.dtype, [&](auto t) {
    using A = typename Stored<decltype(t)>::A;
    const int64_t channels = a.shape.channels, stride = padded(channels);
    const std::vector<double> total = join_slots(a.shape, slots);
    const double count = a.shape.count();
    A *values = static_cast<A*>(table), *gweight = static_cast<A*>(a.gweight),
      *gbias = static_cast<A*>(a.gbias);
    for (int64_t c = 0; c < channels; ++c) {
      const auto of = Statistics<A>::of(a.statistics, channels, c);
      const double var = of.var + a.eps, lost = of.lost;
      const double of_g = total[c], of_f = total[stride + c] - lost * of_g;
      const double per_f = of_f / (count * var);
      values[kPerG * stride + c] = static_cast<A>(of_g / count - lost * per_f);
      values[kPerF * stride + c] = static_cast<A>(per_f);
      if (gweight) gweight[c] = static_cast<A>(of_f / std::sqrt(var));
      if (gbias) gbias[c] = static_cast<A>(of_g);
    }
    for (int64_t row = 0, segments = Tasks(a.shape).segments; a.ggate && row < a.shape.rows;
         ++row) {
      double sum = 0;
      for (int64_t i = 0; i < segments; ++i) sum += *partial++;
      static_cast<A*>(a.ggate)[row] = static_cast<A>(sum);
    }
  });
}

void backward(const BackwardArgs& a, const void* table, int64_t begin, int64_t end) {
  visit(a.dtype, a.shape, [&](auto t, auto pixels) {
    using T = decltype(t);
    const auto one = a.training ? backward_run<T, pixels, true> : backward_run<T, pixels, false>;
    for_each_run(a.shape, begin, end, [&](const Run& run) { one(a, run, table); });
  });
}

}  // namespace fastres::batch_norm_residual::FASTRES_ISA
