// cpu_weights: the weight gradients, from what the chain left of each slab of samples.
#pragma once
#include <algorithm>

#include "../common/buffer.h"
#include "cpu_tile.h"

namespace fastres::mlp_stack::FASTRES_ISA {

// What the chain leaves of a block from a sample on, feature by feature, each with `stride` samples
// of its slab: gated = gate * g [D], delta = dz [H], hidden = h [H].
template <class E> struct Left {
  const Shape& s;
  const int64_t stride, slabs;
  E* const at;
  // all: there is room for all slabs of all blocks, else for one.
  Left(const Shape& s, void* at, bool all)
      : s(s),
        stride(slab_of(s.batch)),
        slabs(all ? ceil_div(s.batch, stride) : 0),
        at(static_cast<E*>(at)) {}
  E* gated(int64_t block, int64_t sample) const {
    const int64_t slab = slabs ? block * slabs + sample / stride : 0;
    return at + slab * left_size(s) + sample % stride;
  }
  E* delta(int64_t block, int64_t sample) const { return gated(block, sample) + stride * s.width; }
  E* hidden(int64_t block, int64_t sample) const {
    return delta(block, sample) + stride * s.hidden;
  }
};

// bias [rows] <- the sums over samples of rows [rows, stride], or bias and them: each over every
// 16th sample, and then, transposed, over these.
template <class E, class A>
void add_sums(const E* left, int64_t stride, int64_t samples, int64_t rows, bool fresh, A* bias) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    alignas(64) A sums[kLanes * kLanes] = {}, turned[kLanes * kLanes];
    const int64_t n = least(kLanes, rows - row);
    for (int64_t r = 0; r < n; ++r) {
      Tile<A> sum{};
      for (int64_t b = 0; b < samples; b += kLanes)
        sum += load(left + (row + r) * stride + b, least(kLanes, samples - b));
      Stored<A>::store(sums + r * kLanes, sum);
    }
    transpose16(sums, kLanes, turned, kLanes);
    Tile<A> total{};
    for (int64_t i = 0; i < kLanes; ++i) total += Stored<A>::load(turned + i * kLanes);
    store(bias + row, fresh ? total : load(bias + row, n) + total, n);
  }
}

// Some rows of one weight gradient and of its bias's: the sum over samples of left (x) right, of
// one block or of several.
//   w2: left = gated, right = hidden;  w1: left = delta, right = x
template <class A> class WeightRows {
 public:
  static constexpr int kTiles = kWide<A>;
  static constexpr int64_t kCols = kTiles * kLanes;
  struct Samples {
    const A* at;
    int64_t stride;  // from one sample to the next
  };

  // weights: [rows, cols], bias: [rows]; `fresh`: nothing is there yet.
  WeightRows(int64_t rows, int64_t cols, A* weights, A* bias, bool fresh)
      : rows_(rows), cols_(cols), weights_(weights), bias_(bias), fresh_(fresh) {}

  // Adds a slab of hidden units [cols, stride], or of rows of states, [samples, cols].
  void add_hidden(const A* left, int64_t stride, int64_t samples, const A* hidden) {
    add(left, stride, samples, [&](int64_t c, int64_t n, A* to) -> Samples {
      store_samples(hidden + c * stride, stride, samples, n, to, kCols);
      return {to, kCols};
    });
  }
  template <class T>
  void add_states(const A* left, int64_t stride, int64_t samples, const T* states) {
    add(left, stride, samples, [&](int64_t c, int64_t n, A* to) -> Samples {
      if constexpr (std::is_same_v<T, A>)  // few columns: they do not push each other out
        if (n == kCols && cols_ <= 2 * kCols) return {states + c, cols_};
      for (int64_t i = 0; i < samples; ++i) move(states + i * cols_ + c, to + i * kCols, n);
      return {to, kCols};
    });
  }

 private:
  static constexpr const A* kNoBias = nullptr;

  // left: [rows, stride]; right(c, n, block): where n columns from c on of the samples are, with
  // kCols columns to be read: in `block` [samples, kCols], or in place.
  template <class Right>
  void add(const A* left, int64_t stride, int64_t samples, const Right& right) {
    alignas(64) A block[kSlab * kCols];
    const Rows<A> factor{left, stride};
    for (int64_t c = 0; c < cols_; c += kCols) {
      const int64_t n = least(kCols, cols_ - c);
      if (n < kCols) std::fill_n(block, samples * kCols, A(0));
      const Samples found = right(c, n, block);
      if (n == kCols && fresh_) {
        product<kTiles>(rows_, factor, kNoBias, found.at, found.stride, samples, weights_ + c,
                        cols_);
      } else if (n == kCols) {
        product<kTiles, true>(rows_, factor, kNoBias, found.at, found.stride, samples, weights_ + c,
                              cols_);
      } else {
        for (int64_t r = 0; r < rows_; r += kChunk)
          add_columns(factor.from_row(r), samples, found, r, c, n);
      }
    }
    add_sums(left, stride, samples, rows_, fresh_, bias_);
    fresh_ = false;
  }

  void add_columns(const Rows<A>& left, int64_t samples, const Samples& right, int64_t row,
                   int64_t c, int64_t cols) const {
    alignas(64) A sum[kChunk * kCols];
    const int64_t rows = least(kChunk, rows_ - row);
    product<kTiles>(rows, left, kNoBias, right.at, right.stride, samples, sum, kCols);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < cols; i += kLanes) {
        A* place = weights_ + (row + r) * cols_ + c + i;
        const int64_t n = least(kLanes, cols - i);
        const Tile<A> more = Stored<A>::load(sum + r * kCols + i);
        store(place, fresh_ ? more : load(place, n) + more, n);
      }
  }

  const int64_t rows_, cols_;
  A *const weights_, *const bias_;
  bool fresh_;
};

// Adds the slab that begins with `sample`, of a local block, to rows from `row` on of the gradient
// of w2 (`second`) or w1.
template <class T, class E, class Sum>
void add_slab(const BackwardArgs& a, const Left<E>& left, int64_t block, int64_t sample,
              bool second, int64_t row, Sum& sum) {
  const Shape& s = a.shape;
  const int64_t samples = least(left.stride, s.batch - sample), at = row * left.stride;
  if (second)
    sum.add_hidden(left.gated(block, sample) + at, left.stride, samples,
                   left.hidden(block, sample));
  else
    sum.add_states(left.delta(block, sample) + at, left.stride, samples,
                   in<T>(a.states, (block * s.batch + sample) * s.width));
}

// Adds all slabs of a local block likewise.
template <class T, class E, class Sum>
void add_block(const BackwardArgs& a, const Left<E>& left, int64_t block, bool second, int64_t row,
               Sum& sum) {
  for (int64_t b = 0; b < a.shape.batch; b += left.stride)
    add_slab<T>(a, left, block, b, second, row, sum);
}

// Adds up some rows of a gradient to `weights`, `bias`, stored as Out.
template <class Sum, class A, class Out, class Add>
void sum_rows(int64_t rows, int64_t cols, Out* weights, Out* bias, bool fresh, const Add& add) {
  if constexpr (std::is_same_v<Out, A>) {
    Sum sum(rows, cols, weights, bias, fresh);
    add(sum);
  } else {
    const Buffer buffer(rows * (cols + 1) * sizeof(A));
    A *const of_weights = static_cast<A*>(buffer.data()), *const of_bias = of_weights + rows * cols;
    Sum sum(rows, cols, of_weights, of_bias, fresh);
    add(sum);
    move(of_weights, weights, rows * cols);
    move(of_bias, bias, rows);
  }
}

// `of_task` rows of one gradient: of a block, as soon as the chain has left it and in its order, or
// of all blocks, where these share their weights.
template <class T, class Sum, class From>
void weight_task(const BackwardArgs& a, const From& left, int64_t of_task, int64_t task) {
  using A = typename Stored<T>::A;
  const Shape& s = a.shape;
  const int64_t chunks2 = ceil_div(s.width, of_task),
                chunks = chunks2 + ceil_div(s.hidden, of_task);
  const Descent down(a);
  const int64_t before = task / chunks, number = task % chunks;
  const bool second = number < chunks2;  // of w2, else of w1
  const int64_t rows = second ? s.width : s.hidden, cols = second ? s.hidden : s.width;
  const int64_t first = (second ? number : number - chunks2) * of_task;
  const auto add = [&](auto& sum, int64_t l) { add_block<T>(a, left, l, second, first, sum); };
  void *const weights = second ? a.gw2 : a.gw1, *const bias = second ? a.gb2 : a.gb1;
  const auto run = [&](auto out, int64_t set, bool fresh, const auto& all) {
    using Out = decltype(out);
    const int64_t row = set * rows + first;
    sum_rows<Sum, A>(least(of_task, rows - first), cols, in<Out>(weights, row * cols),
                     in<Out>(bias, row), fresh, all);
  };
  if (s.shared)
    return run(A(), 0, !a.add, [&](auto& sum) {
      for (int64_t l = 0; l < down.blocks; ++l) add(sum, l);
    });
  if (a.done) wait_until([&] { return a.done->load(std::memory_order_acquire) > before; });
  run(T(), down.block(before), true, [&](auto& sum) { add(sum, down.local(before)); });
}

}  // namespace fastres::mlp_stack::FASTRES_ISA
