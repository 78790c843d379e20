// cpu_few: a few samples through the blocks. There the weights' way through the caches is all that
// counts: features stand in the lanes, so that a row of weights is read from end to end, once.
#pragma once
#include "cpu_forward.h"

namespace fastres::mlp_stack::FASTRES_ISA {

// 4: a sample costs a fifth of what 16 or fewer cost with the samples in the lanes.
constexpr int64_t kMostFew = 4;
inline bool are_few(const Shape& s) {
  return s.batch <= kMostFew && s.width % kLanes == 0 && s.hidden % kLanes == 0;
}

template <class T> class Few {
  using A = typename Stored<T>::A;

 public:
  Few(const Args& a, void* buffer)
      : a_(a),
        activate_(pick_activation(
            a.shape.activation,
            [](auto activation) { return &activate<decltype(activation)::value, A>; })),
        s_(a.shape),
        ahead_(least(s_.width * s_.hidden, kMostAhead)),
        x_(static_cast<A*>(buffer)),
        h_(x_ + s_.batch * s_.width),
        sums_(h_ + s_.batch * s_.hidden) {}

  void run(Member* member) {
    in_order(
        member, a_.last - a_.first, ceil_div(s_.hidden, kChunk), chunks(), [&] { load(); },
        [&](int64_t block, int64_t chunk) {
          if (chunk == 0 && block > 0) store_sums(block - 1);
          hidden(block, Chunk(chunk, s_.hidden));
        },
        [&](int64_t block, int64_t chunk) { branch(block, Chunk(chunk, s_.width)); },
        [&] {
          if (a_.last > a_.first) store_sums(a_.last - a_.first - 1);
          for (int64_t i = 0; a_.y && i < s_.batch; ++i)
            move(x(i), in<T>(a_.y, i * s_.width), s_.width);
        });
  }

 private:
  int64_t chunks() const { return ceil_div(s_.width, kChunk); }
  int64_t set(int64_t block) const { return s_.shared ? 0 : a_.first + block; }
  A* x(int64_t sample) const { return x_ + sample * s_.width; }
  A* h(int64_t sample) const { return h_ + sample * s_.hidden; }
  A* sums(int64_t sample, int64_t chunk) const { return sums_ + (sample * chunks() + chunk) * 3; }

  void load() {
    for (int64_t i = 0; i < s_.batch; ++i) {
      move(in<T>(a_.x, i * s_.width), x(i), s_.width);
      keep_state(i, 0, Chunk(0, s_.width), s_.width);
    }
  }

  void keep_state(int64_t sample, int64_t blocks_done, const Chunk& chunk, int64_t size) {
    if (!a_.states || blocks_done % a_.every || blocks_done == a_.last - a_.first) return;
    const int64_t row = blocks_done / a_.every * s_.batch + sample;
    move(x(sample) + chunk.first, in<T>(a_.states, row * s_.width + chunk.first), size);
  }

  // out[r] = <row r of w, v> for the rows of a chunk.
  void dots(const T* w, int64_t rows, const A* v, int64_t count, A* out) const {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dots_of_rows<4>(w + r * count, v, count, out + r);
    for (; r < rows; ++r) dots_of_rows<1>(w + r * count, v, count, out + r);
  }
  template <int kRows>
  FASTRES_HD void dots_of_rows(const T* w, const A* v, int64_t count, A* out) const {
    Tile<A> sum[kRows]{};
    for (int64_t k = 0; k < count; k += kLanes) {
      const Tile<A> part = Stored<A>::load(v + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const T* from = w + r * count + k;
        __builtin_prefetch(from + ahead_, 0, 2);
        sum[r] += Stored<T>::load(from) * part;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) out[r] = sum[r].sum();
  }

  void hidden(int64_t block, const Chunk& chunk) {
    const int64_t at = set(block) * s_.hidden + chunk.first;
    for (int64_t i = 0; i < s_.batch; ++i) {
      A* z = h(i) + chunk.first;
      dots(in<T>(a_.weights.w1, at * s_.width), chunk.size, x(i), s_.width, z);
      for (int64_t r = 0; r < chunk.size; r += kLanes)
        Stored<A>::store(z + r,
                         Stored<T>::load(in<T>(a_.weights.b1, at + r)) + Stored<A>::load(z + r));
      activate_(z, chunk.size);
    }
  }

  void branch(int64_t block, const Chunk& chunk) {
    const int64_t at = set(block) * s_.width + chunk.first;
    alignas(64) A f[kChunk];
    for (int64_t i = 0; i < s_.batch; ++i) {
      dots(in<T>(a_.weights.w2, at * s_.hidden), chunk.size, h(i), s_.hidden, f);
      const A gate = gate_of<A>(a_.weights, a_.first + block, i);
      SumTiles<A> sum;
      for (int64_t r = 0; r < chunk.size; r += kLanes) {
        const Tile<A> p = gate *
                          (Stored<T>::load(in<T>(a_.weights.b2, at + r)) + Stored<A>::load(f + r)),
                      skip = Stored<A>::load(x(i) + chunk.first + r);
        sum.add(skip, p);
        Stored<A>::store(x(i) + chunk.first + r, skip + p);
      }
      A* to = sums(i, chunk.number);
      to[0] = sum.skip_sq.sum();
      to[1] = sum.branch_sq.sum();
      to[2] = sum.dot.sum();
      keep_state(i, block + 1, chunk, chunk.size);
    }
  }

  void store_sums(int64_t block) {
    if (!a_.sums) return;
    for (int64_t i = 0; i < s_.batch; ++i)
      for (int64_t k = 0; k < 3; ++k) {
        A total = 0;
        for (int64_t chunk = 0; chunk < chunks(); ++chunk) total += sums(i, chunk)[k];
        in<A>(a_.sums, ((a_.first + block) * 3 + k) * s_.batch)[i] = total;
      }
  }

  const Args& a_;
  void (*const activate_)(A*, int64_t);
  const Shape& s_;
  const int64_t ahead_;
  A *const x_, *const h_, *const sums_;  // [batch, D], [batch, H], [batch, chunks, 3]
};

}  // namespace fastres::mlp_stack::FASTRES_ISA
