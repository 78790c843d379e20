// cpu_few_down: few samples down the blocks. Features stand side by side in a tile, as going up:
// every product is of rows of samples, and none of its lanes is idle.
#pragma once
#include "cpu_backward.h"
#include "cpu_few.h"

namespace fastres::mlp_stack::FASTRES_ISA {

// out [rows, out_stride] <- w times in [count, cols], or out and it.
template <bool kAdd = false, class W, class A>
void product_of_columns(int64_t rows, const W& w, const A* in, int64_t in_stride, int64_t count,
                        int64_t cols, A* out, int64_t out_stride) {
  constexpr const A* kNoBias = nullptr;
  constexpr int64_t kCols = kWide<A> * kLanes;
  int64_t c = 0;
  for (; c + kCols <= cols; c += kCols)
    product<kWide<A>, kAdd>(rows, w, kNoBias, in + c, in_stride, count, out + c, out_stride);
  for (; c < cols; c += kLanes)
    product<1, kAdd>(rows, w, kNoBias, in + c, in_stride, count, out + c, out_stride);
}

// What the chain leaves of a block: gated = gate * g, x [B, D]; delta = dz, hidden = h [B, H].
template <class A> struct FewLeft {
  const Shape& s;
  A* const at;
  FewLeft(const Shape& s, void* at) : s(s), at(static_cast<A*>(at)) {}
  A* gated(int64_t block) const { return at + block * left_size(s); }
  A* x(int64_t block) const { return gated(block) + s.batch * s.width; }
  A* delta(int64_t block) const { return x(block) + s.batch * s.width; }
  A* hidden(int64_t block) const { return delta(block) + s.batch * s.hidden; }
};

// As Chain, of all samples.
template <class T> class FewChain : public Descent {
  using A = typename Stored<T>::A;
  using Up = Few<T, 1, 1>;

 public:
  FewChain(const BackwardArgs& a, void* buffer, int members)
      : Descent(a),
        derive_(pick_activation(
            a.shape.activation,
            [](auto activation) { return &derive<decltype(activation)::value, 1, A>; })),
        g_(static_cast<A*>(a.g)),
        sums_(static_cast<A*>(buffer)),
        left_(s, a.scratch),
        w1_(s.hidden, s, members, -1),
        w2_(s.width, s, members, -1) {}

  void run(Member* member) {
    downwards(
        member, *this, [&] { load_state(0, 0, s.width); },
        [&](int64_t number, const Chunk& chunk) { hidden(number, chunk); },
        [&](int64_t number, const Chunk& chunk) { stream(number, chunk); });
  }

  void add_gate_gradient(int64_t number, int64_t first, int64_t last) {
    if (!a.ggate) return;
    for (int64_t i = 0; i < s.batch; ++i) {
      A& total = *in<A>(a.ggate, block(number) * s.batch + i);
      if (first == 0) total = 0;
      for (int64_t c = first; c < last; ++c) total += sum(i, c);
    }
  }
  void finish() { add_gate_gradient(blocks - 1, hidden_chunks(), sums_chunks()); }

 private:
  A& sum(int64_t sample, int64_t chunk) const { return sums_[chunk * s.batch + sample]; }

  // h <- act(z), dz <- gate * q * act'(z) with z = W1 x + b1, q = W2^T g; and the chunk's share of
  // <q, h>.
  void hidden(int64_t number, const Chunk& chunk) {
    const int64_t row_at = set(number) * s.hidden + chunk.first;
    const T* from = in<T>(a.weights.w2, set(number) * s.width * s.hidden + chunk.first);
    w2_.fetch(from, s.hidden, s.width, chunk.size);
    const Columns<A> w2 = w2_.columns(from, s.hidden, s.width, chunk.size);
    const Rows<T> w1 = w1_.in_place(in<T>(a.weights.w1, row_at * s.width), s.width);
    const A *b1 = w1_.bias(in<T>(a.weights.b1, row_at), chunk.size), *x = left_.x(local(number));
    A *h = left_.hidden(local(number)) + chunk.first,
      *dz = left_.delta(local(number)) + chunk.first;
    product_of_columns(s.batch, Rows<A>{g_, s.width}, w2.at, w2.stride, s.width, chunk.size, dz,
                       s.hidden);
    for (int64_t i = 0; i < s.batch; ++i) {
      Up::product(chunk.size, w1, b1, x + i * s.width, s.width, h + i * s.hidden, 0);
      const Tile<A> gate = gate_of_sample(number, i);
      alignas(64) A share[kLanes];
      derive_(h + i * s.hidden, dz + i * s.hidden, chunk.size / kLanes, kLanes, &gate, share);
      sum(i, chunk.number) = Stored<A>::load(share).sum();
    }
  }

  // g <- g + W1^T dz; the chunk's share of <g, b2>; and x of the block below.
  void stream(int64_t number, const Chunk& chunk) {
    const auto w1 = w1_.columns(in<T>(a.weights.w1, set(number) * s.hidden * s.width + chunk.first),
                                s.width, s.hidden, chunk.size);
    const A* b2 = w2_.bias(in<T>(a.weights.b2, set(number) * s.width + chunk.first), chunk.size);
    alignas(64) A more[kFour * kChunk];
    product_of_columns(s.batch, Rows<A>{left_.delta(local(number)), s.hidden}, w1.at, w1.stride,
                       s.hidden, chunk.size, more, kChunk);
    for (int64_t i = 0; i < s.batch; ++i) {
      const int64_t at = i * s.width + chunk.first;
      const Tile<A> gate = gate_of_sample(number, i);
      Tile<A> dot{};
      for (int64_t c = 0; c < chunk.size; c += kLanes) {
        const Tile<A> g = Stored<A>::load(g_ + at + c);
        dot += Stored<A>::load(b2 + c) * g;
        Stored<A>::store(left_.gated(local(number)) + at + c, gate * g);
        Tile<A> sum = g + Stored<A>::load(more + i * kChunk + c);
        if (a.gstates) sum += Stored<T>::load(state(a.gstates, number) + at + c);
        Stored<A>::store(g_ + at + c, sum);
      }
      sum(i, hidden_chunks() + chunk.number) = dot.sum();
    }
    if (number + 1 < blocks) load_state(number + 1, chunk.first, chunk.size);
  }

  const T* state(const void* states, int64_t number) const {
    return in<T>(states, local(number) * s.batch * s.width);
  }
  void load_state(int64_t number, int64_t from, int64_t size) {
    for (int64_t at = from; at < s.batch * s.width; at += s.width)
      move(state(a.states, number) + at, left_.x(local(number)) + at, size);
  }
  Tile<A> gate_of_sample(int64_t number, int64_t sample) const {
    return Math<Tile<A>>::of(gate_of<A>(a.weights, block(number), sample));
  }

  void (*const derive_)(A*, A*, int64_t, int64_t, const Tile<A>*, A*);
  A *const g_, *const sums_;  // [B, D], the chunks' sums
  const FewLeft<A> left_;
  Widened<T> w1_, w2_;
};

// As WeightRows, from what FewChain leaves.
template <class A> class FewWeightRows {
 public:
  FewWeightRows(int64_t rows, int64_t cols, A* weights, A* bias, bool fresh)
      : rows_(rows), cols_(cols), weights_(weights), bias_(bias), fresh_(fresh) {}

  // left [samples, stride], right [samples, cols]
  void add(const A* left, int64_t stride, int64_t samples, const A* right) {
    const Columns<A> factor{left, stride};
    if (fresh_) product_of_columns(rows_, factor, right, cols_, samples, cols_, weights_, cols_);
    else product_of_columns<true>(rows_, factor, right, cols_, samples, cols_, weights_, cols_);
    for (int64_t r = 0; r < rows_; r += kLanes) {
      Tile<A> total = fresh_ ? Tile<A>{} : Stored<A>::load(bias_ + r);
      for (int64_t i = 0; i < samples; ++i) total += Stored<A>::load(left + i * stride + r);
      Stored<A>::store(bias_ + r, total);
    }
    fresh_ = false;
  }

 private:
  const int64_t rows_, cols_;
  A *const weights_, *const bias_;
  bool fresh_;
};

// Adds a block to rows from `row` on of the gradient of w2 (`second`) or w1.
template <class T, class A>
void add_block(const BackwardArgs& a, const FewLeft<A>& left, int64_t block, bool second,
               int64_t row, FewWeightRows<A>& sum) {
  const Shape& s = a.shape;
  if (second) sum.add(left.gated(block) + row, s.width, s.batch, left.hidden(block));
  else sum.add(left.delta(block) + row, s.hidden, s.batch, left.x(block));
}

}  // namespace fastres::mlp_stack::FASTRES_ISA
