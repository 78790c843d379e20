// cpu_backward: the cotangents of a tile of samples through the blocks, downwards.
#pragma once
#include "cpu_weights.h"

namespace fastres::mlp_stack::FASTRES_ISA {

// From z and q, [rows, stride] both: h <- act(z) over z, dz <- gate * q * act'(z) over q; the sums
// of q * h over the rows, [kGroup].
template <Activation kActivation, int kTiles, class A>
void derive(A* z, A* q, int64_t rows, int64_t stride, const GateTiles<A, kTiles>& gate, A* sums) {
  Tile<A> dot[kTiles]{};
  for (int64_t r = 0; r < rows; ++r)
    for (int t = 0; t < kTiles; ++t) {
      const int64_t at = r * stride + t * kLanes;
      const Tile<A> given = Stored<A>::load(z + at), h = value<kActivation>(given),
                    cotangent = Stored<A>::load(q + at);
      dot[t] += cotangent * h;
      Stored<A>::store(z + at, h);
      Stored<A>::store(q + at, gate.v[t] * (cotangent * derivative<kActivation>(given)));
    }
  for (int t = 0; t < kTiles; ++t) Stored<A>::store(sums + t * kLanes, dot[t]);
}

// Blocks count down: number 0 is the last one.
template <class T, int kTiles, class Weights> class Chain {
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
        place_(row, rows),
        x_(static_cast<A*>(buffer)),
        g_(x_ + place_.lanes() * s_.width),
        sums_(g_ + place_.lanes() * s_.width),
        left_(a.shape, in_turns(a) ? sums_ + place_.lanes() * sums_chunks() : a.scratch,
              !in_turns(a)),
        w1_(s_.width > s_.hidden ? s_.width : s_.hidden, s_, members, -1),
        w2_(s_.width, s_, members, -1) {}

  void run(Member* member) {
    in_order(
        member, a_.last - a_.first, hidden_chunks(), ceil_div(s_.width, kChunk), [&] { load(); },
        [&](int64_t number, int64_t chunk) {
          if (chunk == 0 && number > 0)
            add_gate_gradient(number - 1, hidden_chunks(), sums_chunks());
          hidden(number, Chunk(chunk, s_.hidden), 0, place_.count);
        },
        [&](int64_t number, int64_t chunk) {
          if (chunk == 0) add_gate_gradient(number, 0, hidden_chunks());
          stream(number, Chunk(chunk, s_.width), 0, place_.count);
        },
        [&] { finish(); });
  }

  // Slab after slab, and with the weight gradients.
  void run(const Turn& turn) {
    load();
    for (int64_t number = 0; number < a_.last - a_.first; ++number) {
      if (number > 0) add_gate_gradient(number - 1, hidden_chunks(), sums_chunks());
      for (int64_t from = 0; from < place_.count; from += kSlab / kGroup) {
        const int64_t to = least(from + kSlab / kGroup, place_.count);
        for (int64_t c = 0; c < hidden_chunks(); ++c) hidden(number, Chunk(c, s_.hidden), from, to);
        for (int64_t c = 0; c < ceil_div(s_.width, kChunk); ++c)
          stream(number, Chunk(c, s_.width), from, to);
        if (a_.gw1) weights(number, from, turn);
      }
      turn.done->store(number + 1, std::memory_order_release);
      add_gate_gradient(number, 0, hidden_chunks());
    }
    finish();
  }

 private:
  int64_t local(int64_t number) const { return a_.last - a_.first - 1 - number; }
  int64_t block(int64_t number) const { return a_.last - 1 - number; }
  int64_t set(int64_t number) const { return s_.shared ? 0 : block(number); }
  A* x(int64_t group) const { return x_ + group * kGroup * s_.width; }  // [D, kGroup]
  A* g(int64_t group) const { return g_ + group * kGroup * s_.width; }  // [D, kGroup]
  A* sums(int64_t group, int64_t chunk) const {                         // [kGroup]
    return sums_ + (chunk * place_.count + group) * kGroup;
  }
  int64_t hidden_chunks() const { return ceil_div(s_.hidden, kChunk); }
  int64_t sums_chunks() const { return hidden_chunks() + ceil_div(s_.width, kChunk); }
  // Features from `feature` on of a group's samples, of a [batch, D] tensor of a local block.
  int64_t at(int64_t local, int64_t group, int64_t feature) const {
    return (local * s_.batch + place_.first(group)) * s_.width + feature;
  }

  void load_state(int64_t number, int64_t group, int64_t from, int64_t size) {
    load_samples(in<T>(a_.states, at(local(number), group, from)), s_.width, place_.size(group),
                 size, x(group) + from * kGroup, kGroup, kGroup);
  }

  // Fetches a chunk's share of a group's state into the second cache: memory takes as long as a
  // chunk of a product.
  void fetch_state(int64_t number, int64_t group, int64_t chunk) const {
    const int64_t size = place_.size(group) * s_.width, chunks = hidden_chunks();
    const T* from = in<T>(a_.states, at(local(number), group, 0));
    for (int64_t i = size * chunk / chunks; i < size * (chunk + 1) / chunks; i += 64 / sizeof(T))
      __builtin_prefetch(from + i, 0, 2);
  }

  void load() {
    for (int64_t i = 0; i < place_.count; ++i) {
      load_samples(in<A>(a_.g, at(0, i, 0)), s_.width, place_.size(i), s_.width, g(i), kGroup,
                   kGroup);
      load_state(0, i, 0, s_.width);
    }
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
      const GateTiles<A, kTiles> gate(a_.weights, block(number), place_.first(i), place_.size(i));
      const int64_t at = chunk.first * left_.stride;
      A *h = left_.hidden(local(number), place_.first(i)) + at,
        *delta = left_.delta(local(number), place_.first(i)) + at;
      product<kTiles>(chunk.size, w1, b1, x(i), kGroup, s_.width, h, left_.stride);
      product<kTiles>(chunk.size, w2, kNoBias, g(i), kGroup, s_.width, delta, left_.stride);
      derive_(h, delta, chunk.size, left_.stride, gate, sums(i, chunk.number));
      if (number + 1 < a_.last - a_.first) fetch_state(number + 1, i, chunk.number);
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
      keep_gated(number, chunk, i, b2);
      const A* delta = left_.delta(local(number), place_.first(i));
      product<kTiles>(chunk.size, w1, kNoBias, delta, left_.stride, s_.hidden, sum, kGroup);
      add_tiles(sum, chunk.size * kGroup, g(i) + chunk.first * kGroup);
      if (a_.gstates) add_state_cotangents(number, chunk, i);
      if (number + 1 < a_.last - a_.first) load_state(number + 1, i, chunk.first, chunk.size);
    }
  }

  void keep_gated(int64_t number, const Chunk& chunk, int64_t i, const A* b2) {
    const GateTiles<A, kTiles> gate(a_.weights, block(number), place_.first(i), place_.size(i));
    A* gated = left_.gated(local(number), place_.first(i)) + chunk.first * left_.stride;
    for (int t = 0; t < kTiles; ++t) {
      Tile<A> dot{};
      for (int64_t r = 0; r < chunk.size; ++r) {
        const Tile<A> v = Stored<A>::load(g(i) + (chunk.first + r) * kGroup + t * kLanes);
        dot += b2[r] * v;
        Stored<A>::store(gated + r * left_.stride + t * kLanes, gate.v[t] * v);
      }
      Stored<A>::store(sums(i, hidden_chunks() + chunk.number) + t * kLanes, dot);
    }
  }

  void add_state_cotangents(int64_t number, const Chunk& chunk, int64_t i) {
    alignas(64) A given[kChunk * kGroup];
    load_samples(in<T>(a_.gstates, at(local(number), i, chunk.first)), s_.width, place_.size(i),
                 chunk.size, given, kGroup, kGroup);
    add_tiles(given, chunk.size * kGroup, g(i) + chunk.first * kGroup);
  }

  // Adds the slab from group `from` on to the weight gradients, after the samples before it.
  void weights(int64_t number, int64_t from, const Turn& turn) {
    if (from == 0 && turn.before)
      wait_until([&] { return turn.before->load(std::memory_order_acquire) > number; });
    const int64_t sample = place_.first(from);
    for (const bool second : {true, false}) {
      const int64_t rows = second ? s_.width : s_.hidden, cols = second ? s_.hidden : s_.width;
      WeightRows<A> sum(rows, cols, in<A>(second ? a_.gw2 : a_.gw1, block(number) * rows * cols),
                        in<A>(second ? a_.gb2 : a_.gb1, block(number) * rows), sample == 0);
      add_slab<T>(a_, left_, local(number), sample, second, 0, sum);
    }
  }

  static void add_tiles(const A* from, int64_t count, A* to) {
    for (int64_t k = 0; k < count; k += kLanes)
      Stored<A>::store(to + k, Stored<A>::load(to + k) + Stored<A>::load(from + k));
  }

  // Adds to the gate's gradient what chunks [first, last) left: those of the step before this one.
  void add_gate_gradient(int64_t number, int64_t first, int64_t last) {
    if (!a_.ggate) return;
    for (int64_t i = 0; i < place_.count; ++i)
      for (int64_t lane = 0; lane < place_.size(i); lane += kLanes) {
        A* to = in<A>(a_.ggate, block(number) * s_.batch + place_.first(i) + lane);
        const int64_t n = least(kLanes, place_.size(i) - lane);
        Tile<A> total = first ? fastres::FASTRES_ISA::load(to, n) : Tile<A>{};
        for (int64_t c = first; c < last; ++c) total += Stored<A>::load(sums(i, c) + lane);
        store(to, total, n);
      }
  }

  void finish() {
    add_gate_gradient(a_.last - a_.first - 1, hidden_chunks(), sums_chunks());
    for (int64_t i = 0; i < place_.count; ++i)
      store_samples(g(i), kGroup, place_.size(i), s_.width, in<A>(a_.g, at(0, i, 0)), s_.width);
  }

  const BackwardArgs& a_;
  void (*const derive_)(A*, A*, int64_t, int64_t, const GateTiles<A, kTiles>&, A*);
  const Shape& s_;
  const Groups<kTiles> place_;
  A *const x_, *const g_, *const sums_;  // [groups, D, kGroup] twice, the chunks' sums
  const Left<A> left_;
  Weights w1_, w2_;
};

}  // namespace fastres::mlp_stack::FASTRES_ISA
