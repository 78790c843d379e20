// cpu_lengths: all lengths of a tile of samples through the blocks, downwards.
#pragma once
#include "cpu_active.h"
#include "cpu_measures.h"
#include "cpu_product.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

template <class A> class Lengths {
  using Vector = typename Tile<A>::Vector;
  static constexpr int kWidth = Tile<A>::kWidth;

 public:
  Lengths(const Args& a, int64_t sample, int64_t samples, void* buffer)
      : a_(a),
        s_(a.shape),
        sample_(sample),
        samples_(least(samples, s_.batch - sample)),
        last_(s_.rows()),
        memory_(buffer),
        hidden_(memory_.take<A>(kChunk * hidden_stride(s_))),
        spare_(memory_.take<A>(kChunk * width_stride(s_))),
        of_tail_(memory_.take<A>(width_stride(s_))),
        total_(memory_.take<double>(s_.width)),
        active_(a, memory_),
        held_(memory_.take<Held<A>>(samples)) {
    for (int64_t i = 0; i < samples_; ++i) held_[i] = Held<A>(s_, memory_);
  }

  void run() {
    for (int64_t i = 0; i < samples_; ++i)
      held_[i].load(static_cast<const A*>(a_.cotangent) + (sample_ + i) * s_.width);
    for (int64_t done = 0; done < s_.blocks; ++done)
      for (int64_t i = 0; i < samples_; ++i) {
        const int64_t reached = least(done + 1, s_.longest);
        active_.choose(s_.blocks - 1 - done, sample_ + i, reached + last_ - s_.longest);
        add(held_[i], reached);
      }
    for (int64_t i = 0; i < samples_; ++i) store_measures(a_, held_[i], sample_ + i, total_);
  }

 private:
  // The rows that something is added to are g, R where there is a tail, G_reached, ... G_1, in this
  // order, in which each finds the one below as it was.
  int64_t next(int64_t row, int64_t reached) const {
    return row - 1 == s_.longest ? reached : row - 1;
  }

  // Adds J^T times its source to each row.
  void add(const Held<A>& held, int64_t reached) const {
    for (int64_t row = last_; row > 0; row = next(row, reached)) held.fit(row);
    for (int64_t row = last_; row > 0;) {
      Step steps[kChunk];
      int64_t count = 0;
      for (; row > 0 && count < kChunk; row = next(row, reached), ++count)
        steps[count] = step(held, row, spare_ + count * width_stride(s_));
      multiply(steps, count);
      for (int64_t i = 0; i < count; ++i) finish(held, steps[i]);
    }
  }

  // The row whose numbers come to this one, if it is not g.
  int64_t below(int64_t row) const { return row > s_.longest ? s_.longest : row - 1; }

  // A row, what J^T takes for it, by what the product and the row are multiplied, and where the sum
  // goes.
  struct Step {
    int64_t row;
    const A* source;
    Scale scale;  // of the source, then of the sum
    A factor, own;
    A* to;
  };

  // J^T takes G_{k-1} for G_k, R + G_K for R, and g for g.
  Step step(const Held<A>& held, int64_t row, A* spare) const {
    const Scale& of_row = held.scales[row];
    Step step{row, held.line(row), of_row, 1, 1, held.line(row)};
    if (row == last_) return step;
    const int64_t from = below(row);
    step.source = held.line(from);
    step.scale = held.scales[from];
    if (row > s_.longest) {
      step.scale = held.sum(row, step.source, step.scale, of_tail_);
      step.source = of_tail_;
    }
    if (is_beyond(step.scale, of_row)) {
      std::memset(spare, 0, width_stride(s_) * sizeof(A));
      step.to = spare;  // the product alone, which may be as small as the row
    } else {
      const int32_t exponent = fitting(of_row, step.scale);
      if (step.scale.size != kNothing)
        step.factor = power_of_two<A>(exponent - step.scale.exponent);
      step.own = power_of_two<A>(exponent - of_row.exponent);
      step.scale.exponent = exponent;
    }
    return step;
  }

  void finish(const Held<A>& held, const Step& step) const {
    Scale& scale = held.scales[step.row];
    A* const line = held.line(step.row);
    if (step.to == line) scale = step.scale;
    else scale = held.sum(step.row, step.to, step.scale, line);
  }

  // Adds the products of J^T and the sources, and measures the sums.
  void multiply(Step* steps, int64_t count) const {
    const int64_t stride = hidden_stride(s_);
    const A *sources[kChunk], *hidden[kChunk];
    Largest<A> largest[kChunk];
    for (int64_t i = 0; i < count; ++i)
      sources[i] = steps[i].source, hidden[i] = hidden_ + i * stride;
    rows_times(sources, count, active_.w2(), s_.width, ceil_div(active_.columns(), kWidth),
               [&](int64_t r, int64_t v, const Vector& sum) __attribute__((always_inline)) {
                 active_.store(hidden_ + r * stride, v, steps[r].factor * sum);
               });
    rows_times(hidden, count, active_.w1(), active_.count(), ceil_div(s_.width, kWidth),
               [&](int64_t r, int64_t v, const Vector& sum) __attribute__((always_inline)) {
                 A* const to = steps[r].to + v * kWidth;
                 Vector number;
                 std::memcpy(&number, to, sizeof number);
                 number = steps[r].own * number + sum;
                 std::memcpy(to, &number, sizeof number);
                 largest[r].raise(number);
               });
    for (int64_t r = 0; r < count; ++r) steps[r].scale.size = largest[r].order();
  }

  const Args& a_;
  const Shape& s_;
  const int64_t sample_, samples_, last_;  // last_: where g is held
  Memory memory_;
  A *const hidden_, *const spare_, *const of_tail_;  // [kChunk, hidden_stride],
                                                     // [kChunk, width_stride], [width_stride]
  double* const total_;                              // [D]
  Active<A> active_;
  Held<A>* const held_;  // [samples]
};

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
