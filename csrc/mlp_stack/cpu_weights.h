// cpu_weights: the weight gradients, from what the chain left of each slab of samples.
#pragma once
#include <algorithm>

#include "cpu_tile.h"

namespace fastres::mlp_stack::FASTRES_ISA {

// What the chain leaves of a block from a sample on, feature by feature, each with `stride` samples
// of its slab: gated = gate * g [D], delta = dz [H], hidden = h [H].
template <class A> struct Left {
  const Shape& s;
  const int64_t stride, slabs;
  A* const at;
  // all: there is room for all slabs of all blocks, else for one.
  Left(const Shape& s, void* at, bool all)
      : s(s),
        stride(slab_of(s.batch)),
        slabs(all ? ceil_div(s.batch, stride) : 0),
        at(static_cast<A*>(at)) {}
  A* gated(int64_t block, int64_t sample) const {
    const int64_t slab = slabs ? block * slabs + sample / stride : 0;
    return at + slab * left_size(s) + sample % stride;
  }
  A* delta(int64_t block, int64_t sample) const { return gated(block, sample) + stride * s.width; }
  A* hidden(int64_t block, int64_t sample) const {
    return delta(block, sample) + stride * s.hidden;
  }
};

template <class A> struct Samples {
  const A* at;
  int64_t stride;  // from one sample to the next
};

// A left factor of such sums that products take where it is, any number of samples at a time.
template <class A> struct InPlace {
  static constexpr int64_t kStep = 1;
  static Rows<A> rows(const A* left, int64_t, int64_t stride, int64_t) { return {left, stride}; }
};

// Some rows of one weight gradient and of its bias's: the sum over samples of left (x) right, of
// one block or of several.
//   w2: left = gated, right = hidden;  w1: left = delta, right = x
template <class A, class Factor = InPlace<A>> class WeightRows {
 public:
  static constexpr int kTiles = kWide<A>;
  static constexpr int64_t kCols = kTiles * kLanes;

  // weights: [rows, cols], bias: [rows]; `fresh`: nothing is there yet.
  WeightRows(int64_t rows, int64_t cols, A* weights, A* bias, bool fresh)
      : rows_(rows), cols_(cols), weights_(weights), bias_(bias), fresh_(fresh) {}

  // Adds a slab. left: [rows, stride]; right(c, n, block): where n columns from c on of the samples
  // are, with kCols columns to be read: in `block` [samples, kCols], or in place.
  template <class Right>
  void add(const A* left, int64_t stride, int64_t samples, const Right& right) {
    alignas(64) A block[kSlab * kCols];
    const auto factor = factor_.rows(left, rows_, stride, samples);
    const int64_t count = round_up(samples, Factor::kStep);
    for (int64_t c = 0; c < cols_; c += kCols) {
      const int64_t n = least(kCols, cols_ - c);
      if (n < kCols || samples < count) std::fill_n(block, count * kCols, A(0));
      const Samples<A> found = right(c, n, block);
      if (n == kCols && fresh_) {
        product<kTiles>(rows_, factor, kNoBias, found.at, found.stride, count, weights_ + c, cols_);
      } else if (n == kCols) {
        product<kTiles, true>(rows_, factor, kNoBias, found.at, found.stride, count, weights_ + c,
                              cols_);
      } else {
        for (int64_t r = 0; r < rows_; r += kChunk)
          add_columns(factor.from_row(r), count, found, r, c, n);
      }
    }
    for (int64_t r = 0; r < rows_; r += kLanes) add_bias(left + r * stride, stride, samples, r);
    fresh_ = false;
  }

 private:
  static constexpr const A* kNoBias = nullptr;

  template <class W>
  void add_columns(const W& left, int64_t count, const Samples<A>& right, int64_t row, int64_t c,
                   int64_t cols) const {
    alignas(64) A sum[kChunk * kCols];
    const int64_t rows = least(kChunk, rows_ - row);
    product<kTiles>(rows, left, kNoBias, right.at, right.stride, count, sum, kCols);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < cols; i += kLanes) {
        A* place = weights_ + (row + r) * cols_ + c + i;
        const int64_t n = least(kLanes, cols - i);
        const Tile<A> more = Stored<A>::load(sum + r * kCols + i);
        store(place, fresh_ ? more : load(place, n) + more, n);
      }
  }

  // Adds the sums of 16 rows: each over every 16th sample, and then, transposed, over these.
  void add_bias(const A* left, int64_t stride, int64_t samples, int64_t row) const {
    alignas(64) A sums[kLanes * kLanes] = {}, turned[kLanes * kLanes];
    const int64_t n = least(kLanes, rows_ - row);
    for (int64_t r = 0; r < n; ++r) {
      Tile<A> sum{};
      for (int64_t b = 0; b < samples; b += kLanes)
        sum += load(left + r * stride + b, least(kLanes, samples - b));
      Stored<A>::store(sums + r * kLanes, sum);
    }
    transpose16(sums, kLanes, turned, kLanes);
    Tile<A> total{};
    for (int64_t i = 0; i < kLanes; ++i) total += Stored<A>::load(turned + i * kLanes);
    store(bias_ + row, fresh_ ? total : load(bias_ + row, n) + total, n);
  }

  const int64_t rows_, cols_;
  A *const weights_, *const bias_;
  bool fresh_;
  Factor factor_;
};

// Adds the slab that begins with `sample`, of a local block, to rows from `row` on of the gradient
// of w2 (`second`) or w1.
template <class T, class A, class Sum>
void add_slab(const BackwardArgs& a, const Left<A>& left, int64_t block, int64_t sample,
              bool second, int64_t row, Sum& sum) {
  const Shape& s = a.shape;
  constexpr int64_t kCols = Sum::kCols;
  const int64_t samples = least(left.stride, s.batch - sample);
  if (second) {
    const A* hidden = left.hidden(block, sample);
    sum.add(left.gated(block, sample) + row * left.stride, left.stride, samples,
            [&](int64_t c, int64_t n, A* to) -> Samples<A> {
              store_samples(hidden + c * left.stride, left.stride, samples, n, to, kCols);
              return {to, kCols};
            });
  } else {
    const T* x = in<T>(a.states, (block * s.batch + sample) * s.width);
    sum.add(left.delta(block, sample) + row * left.stride, left.stride, samples,
            [&](int64_t c, int64_t n, A* to) -> Samples<A> {
              if constexpr (std::is_same_v<T, A>)  // few columns: they do not push each other out
                if (n == kCols && s.width <= 2 * kCols) return {x + c, s.width};
              for (int64_t i = 0; i < samples; ++i) move(x + i * s.width + c, to + i * kCols, n);
              return {to, kCols};
            });
  }
}

// Adds up some rows of a gradient to `weights`, `bias`, stored as Out.
template <class A, class Factor, class Out, class Add>
void sum_rows(int64_t rows, int64_t cols, Out* weights, Out* bias, bool fresh, const Add& add) {
  if constexpr (std::is_same_v<Out, A>) {
    WeightRows<A, Factor> sum(rows, cols, weights, bias, fresh);
    add(sum);
  } else {
    std::vector<A> buffer(rows * (cols + 1));
    WeightRows<A, Factor> sum(rows, cols, buffer.data() + rows, buffer.data(), fresh);
    add(sum);
    move(buffer.data() + rows, weights, rows * cols);
    move(buffer.data(), bias, rows);
  }
}

// `of_task` rows of one gradient, of a block or, where all share their weights, of all blocks.
template <class T, class Factor> void weight_task(const BackwardArgs& a, int64_t of_task,
                                                  int64_t task) {
  using A = typename Stored<T>::A;
  const Shape& s = a.shape;
  const int64_t chunks2 = ceil_div(s.width, of_task),
                chunks = chunks2 + ceil_div(s.hidden, of_task);
  const int64_t block = task / chunks, number = task % chunks;
  const bool second = number < chunks2;  // of w2, else of w1
  const int64_t rows = second ? s.width : s.hidden, cols = second ? s.hidden : s.width;
  const int64_t first = (second ? number : number - chunks2) * of_task;
  const Left<A> left(s, a.scratch, true);
  const auto add = [&](auto& sum, int64_t l) {
    for (int64_t b = 0; b < s.batch; b += left.stride)
      add_slab<T>(a, left, l, b, second, first, sum);
  };
  void *const weights = second ? a.gw2 : a.gw1, *const bias = second ? a.gb2 : a.gb1;
  const auto run = [&](auto out, int64_t set, bool fresh, const auto& all) {
    using Out = decltype(out);
    const int64_t row = set * rows + first;
    sum_rows<A, Factor>(least(of_task, rows - first), cols, in<Out>(weights, row * cols),
                        in<Out>(bias, row), fresh, all);
  };
  if (s.shared)
    run(A(), 0, !a.add, [&](auto& sum) {
      for (int64_t l = 0; l < a.last - a.first; ++l) add(sum, l);
    });
  else run(T(), a.first + block, true, [&](auto& sum) { add(sum, block); });
}

}  // namespace fastres::mlp_stack::FASTRES_ISA
