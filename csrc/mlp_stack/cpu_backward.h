// cpu_backward: the cotangents of a tile of samples through the blocks, downwards.
#pragma once
#include "cpu_cotangents.h"

namespace fastres::mlp_stack::FASTRES_ISA {

// From z and q, [rows, stride] both: h <- act(z) over z, dz <- gate * q * act'(z) over q; the sums
// of q * h over the rows, [kGroup].
template <Activation kActivation, int kTiles, class A>
void derive(A* z, A* q, int64_t rows, int64_t stride, const Tile<A>* gate, A* sums) {
  Tile<A> dot[kTiles]{};
  for (int64_t r = 0; r < rows; ++r)
    for (int t = 0; t < kTiles; ++t) {
      const int64_t at = r * stride + t * kLanes;
      const Tile<A> given = Stored<A>::load(z + at), h = value<kActivation>(given),
                    cotangent = Stored<A>::load(q + at);
      dot[t] += cotangent * h;
      Stored<A>::store(z + at, h);
      Stored<A>::store(q + at, gate[t] * (cotangent * derivative<kActivation>(given)));
    }
  for (int t = 0; t < kTiles; ++t) Stored<A>::store(sums + t * kLanes, dot[t]);
}

template <class T, int kTiles> class Chain {
  using A = typename Stored<T>::A;
  static constexpr int64_t kGroup = kTiles * kLanes;
  static constexpr const A* kNoBias = nullptr;

 public:
  Chain(const BackwardArgs& a, int64_t row, int64_t rows, void* buffer, int members)
      : a_(a),
        derive_(pick_activation(
            a.shape.activation,
            [](auto activation) { return &derive<decltype(activation)::value, kTiles, A>; })),
        s_(a.shape),
        cotangents_(a, row, rows, buffer),
        place_(cotangents_.place),
        x_(cotangents_.end()),
        left_(a.shape, in_turns(a) ? x_ + place_.lanes() * s_.width : a.scratch, !in_turns(a)),
        w1_(s_.width > s_.hidden ? s_.width : s_.hidden, s_, members, -1),
        w2_(s_.width, s_, members, -1) {}

  void run(Member* member) {
    downwards(
        member, cotangents_, [&] { load(); },
        [&](int64_t number, const Chunk& chunk) { hidden(number, chunk, 0, place_.count); },
        [&](int64_t number, const Chunk& chunk) { stream(number, chunk, 0, place_.count); });
  }

  // Slab after slab, and with the weight gradients.
  void run(const Turn& turn) {
    const int64_t chunks = cotangents_.hidden_chunks();
    load();
    for (int64_t number = 0; number < cotangents_.blocks; ++number) {
      if (number > 0) cotangents_.add_gate_gradient(number - 1, chunks, cotangents_.sums_chunks());
      for (int64_t from = 0; from < place_.count; from += kSlab / kGroup) {
        const int64_t to = least(from + kSlab / kGroup, place_.count);
        for (int64_t c = 0; c < chunks; ++c) hidden(number, Chunk(c, s_.hidden), from, to);
        for (int64_t c = 0; c < cotangents_.width_chunks(); ++c)
          stream(number, Chunk(c, s_.width), from, to);
        if (a_.gw1) weights(number, from, turn);
      }
      turn.done->store(number + 1, std::memory_order_release);
      cotangents_.add_gate_gradient(number, 0, chunks);
    }
    cotangents_.finish();
  }

 private:
  A* x(int64_t group) const { return x_ + group * kGroup * s_.width; }  // [D, kGroup]
  A* g(int64_t group) const { return cotangents_.g(group); }
  int64_t local(int64_t number) const { return cotangents_.local(number); }
  int64_t set(int64_t number) const { return cotangents_.set(number); }

  void load() {
    cotangents_.load();
    for (int64_t i = 0; i < place_.count; ++i) load_state(0, i, 0, s_.width);
  }
  void load_state(int64_t number, int64_t group, int64_t from, int64_t size) {
    load_samples(cotangents_.state(number, group, from), s_.width, place_.size(group), size,
                 x(group) + from * kGroup, kGroup, kGroup);
  }

  // h <- act(z), dz <- gate * q * act'(z) with z = W1 x + b1, q = W2^T g; and the chunk's share of
  // <q, h>.
  void hidden(int64_t number, const Chunk& chunk, int64_t from, int64_t to) {
    const int64_t row_at = set(number) * s_.hidden + chunk.first;
    const auto w1 = w1_.rows(in<T>(a_.weights.w1, row_at * s_.width), chunk.size, s_.width);
    const auto w2 =
        w2_.columns(in<T>(a_.weights.w2, set(number) * s_.width * s_.hidden + chunk.first),
                    s_.hidden, s_.width, chunk.size);
    const A* b1 = w1_.bias(in<T>(a_.weights.b1, row_at), chunk.size);
    for (int64_t i = from; i < to; ++i) {
      const int64_t at = chunk.first * left_.stride;
      A *h = left_.hidden(local(number), place_.first(i)) + at,
        *delta = left_.delta(local(number), place_.first(i)) + at;
      product<kTiles>(chunk.size, w1, b1, x(i), kGroup, s_.width, h, left_.stride);
      product<kTiles>(chunk.size, w2, kNoBias, g(i), kGroup, s_.width, delta, left_.stride);
      derive_(h, delta, chunk.size, left_.stride, cotangents_.gate(number, i).v,
              cotangents_.sums(i, chunk.number));
      cotangents_.fetch_state(number, i, chunk.number);
    }
  }

  // g <- g + W1^T dz; the chunk's share of <g, b2>; and x of the block below.
  void stream(int64_t number, const Chunk& chunk, int64_t from, int64_t to) {
    const auto w1 =
        w1_.columns(in<T>(a_.weights.w1, set(number) * s_.hidden * s_.width + chunk.first),
                    s_.width, s_.hidden, chunk.size);
    const A* b2 = w2_.bias(in<T>(a_.weights.b2, set(number) * s_.width + chunk.first), chunk.size);
    alignas(64) A sum[kChunk * kGroup];
    for (int64_t i = from; i < to; ++i) {
      A* gated = left_.gated(local(number), place_.first(i)) + chunk.first * left_.stride;
      cotangents_.gated(number, chunk, i, b2, [&](int64_t r, int t, const Tile<A>& v) {
        Stored<A>::store(gated + r * left_.stride + t * kLanes, v);
      });
      const A* delta = left_.delta(local(number), place_.first(i));
      product<kTiles>(chunk.size, w1, kNoBias, delta, left_.stride, s_.hidden, sum, kGroup);
      cotangents_.add(number, chunk, i, sum);
      if (number + 1 < cotangents_.blocks) load_state(number + 1, i, chunk.first, chunk.size);
    }
  }

  // Adds the slab from group `from` on to the weight gradients, after the samples before it.
  void weights(int64_t number, int64_t from, const Turn& turn) {
    if (from == 0 && turn.before)
      wait_until([&] { return turn.before->load(std::memory_order_acquire) > number; });
    const int64_t sample = place_.first(from);
    for (const bool second : {true, false}) {
      const int64_t rows = second ? s_.width : s_.hidden, cols = second ? s_.hidden : s_.width;
      WeightRows<A> sum(rows, cols, in<A>(second ? a_.gw2 : a_.gw1, set(number) * rows * cols),
                        in<A>(second ? a_.gb2 : a_.gb1, set(number) * rows), sample == 0);
      add_slab<T>(a_, left_, local(number), sample, second, 0, sum);
    }
  }

  const BackwardArgs& a_;
  void (*const derive_)(A*, A*, int64_t, int64_t, const Tile<A>*, A*);
  const Shape& s_;
  Cotangents<T, kTiles> cotangents_;
  const Groups<kTiles>& place_;
  A* const x_;  // [groups, D, kGroup]
  const Left<A> left_;
  Widened<T> w1_, w2_;
};

}  // namespace fastres::mlp_stack::FASTRES_ISA
