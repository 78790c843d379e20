// cpu_forward: a tile of samples through the blocks, upwards.
#pragma once
#include "cpu_tile.h"

namespace fastres::mlp_stack::FASTRES_ISA {

template <Activation kActivation, class A> void activate(A* z, int64_t count) {  // in whole tiles
  for (int64_t i = 0; i < count; i += kLanes)
    Stored<A>::store(z + i, value<kActivation>(Stored<A>::load(z + i)));
}

template <class T, int kTiles> class Forward {
  using A = typename Stored<T>::A;
  static constexpr int64_t kGroup = kTiles * kLanes;

 public:
  Forward(const Args& a, int64_t row, int64_t rows, void* buffer)
      : a_(a),
        activate_(pick_activation(
            a.shape.activation,
            [](auto activation) { return &activate<decltype(activation)::value, A>; })),
        s_(a.shape),
        place_(row, rows),
        x_(static_cast<A*>(buffer)),
        h_(x_ + place_.lanes() * s_.width),
        sums_(h_ + place_.lanes() * s_.hidden),
        weights_(s_.width > s_.hidden ? s_.width : s_.hidden, s_.width * s_.hidden) {}

  void run(Member* member) {
    in_order(
        member, a_.last - a_.first, ceil_div(s_.hidden, kChunk), ceil_div(s_.width, kChunk),
        [&] { load(); },
        [&](int64_t block, int64_t chunk) {
          if (chunk == 0 && block > 0) store_sums(block - 1);
          hidden(block, Chunk(chunk, s_.hidden));
        },
        [&](int64_t block, int64_t chunk) { branch(block, Chunk(chunk, s_.width)); },
        [&] { finish(); });
  }

 private:
  int64_t set(int64_t block) const { return s_.shared ? 0 : a_.first + block; }
  A* x(int64_t group) const { return x_ + group * kGroup * s_.width; }   // [D, kGroup]
  A* h(int64_t group) const { return h_ + group * kGroup * s_.hidden; }  // [H, kGroup]
  A* sums(int64_t group, int64_t chunk) const {                          // [3, kGroup]
    return sums_ + (chunk * place_.count + group) * 3 * kGroup;
  }

  void load() {
    for (int64_t g = 0; g < place_.count; ++g) {
      load_samples(in<T>(a_.x, place_.first(g) * s_.width), s_.width, place_.size(g), s_.width,
                   x(g), kGroup, kGroup);
      keep_state(g, 0, 0, s_.width);
    }
  }

  // Stores features [from, from + size) of a group's stream, where it is a state to be kept.
  void keep_state(int64_t group, int64_t blocks_done, int64_t from, int64_t size) {
    if (!a_.states || blocks_done % a_.every || blocks_done == a_.last - a_.first) return;
    const int64_t row = blocks_done / a_.every * s_.batch + place_.first(group);
    store_samples(x(group) + from * kGroup, kGroup, place_.size(group), size,
                  in<T>(a_.states, row * s_.width + from), s_.width);
  }

  // h <- act(W1 x + b1)
  void hidden(int64_t block, const Chunk& chunk) {
    const int64_t at = set(block) * s_.hidden + chunk.first;
    const Rows<A> w1 = weights_.rows(in<T>(a_.weights.w1, at * s_.width), chunk.size, s_.width);
    const A* b1 = weights_.bias(in<T>(a_.weights.b1, at), chunk.size);
    for (int64_t g = 0; g < place_.count; ++g) {
      A* out = h(g) + chunk.first * kGroup;
      product<kTiles>(chunk.size, w1, b1, x(g), kGroup, s_.width, out, kGroup);
      activate_(out, chunk.size * kGroup);
    }
  }

  // x <- x + gate * (W2 h + b2), and the sums over the features of the chunk.
  void branch(int64_t block, const Chunk& chunk) {
    const int64_t at = set(block) * s_.width + chunk.first;
    const Rows<A> w2 = weights_.rows(in<T>(a_.weights.w2, at * s_.hidden), chunk.size, s_.hidden);
    const A* b2 = weights_.bias(in<T>(a_.weights.b2, at), chunk.size);
    alignas(64) A f[kChunk * kGroup];
    for (int64_t g = 0; g < place_.count; ++g) {
      const GateTiles<A, kTiles> gate(a_.weights, a_.first + block, place_.first(g),
                                      place_.size(g));
      product<kTiles>(chunk.size, w2, b2, h(g), kGroup, s_.hidden, f, kGroup);
      if (a_.weights.gate) scale(f, chunk.size, gate);
      add(f, chunk.size, x(g) + chunk.first * kGroup, a_.sums ? sums(g, chunk.number) : nullptr);
      keep_state(g, block + 1, chunk.first, chunk.size);
    }
  }

  // f <- gate * f. Not in one pass with the add: there it would be rounded once or twice, whichever
  // the compiler likes better with sums or without.
  static void scale(A* f, int64_t rows, const GateTiles<A, kTiles>& gate) {
    for (int64_t i = 0; i < rows * kGroup; i += kGroup)
      for (int t = 0; t < kTiles; ++t) {
        A* place = f + i + t * kLanes;
        Stored<A>::store(place, gate.v[t] * Stored<A>::load(place));
      }
  }

  // stream <- stream + p, [rows, kGroup]; the sums to [3, kGroup], if they are wanted.
  static void add(const A* p_given, int64_t rows, A* stream, A* sums) {
    SumTiles<A> sum[kTiles];
    for (int64_t i = 0; i < rows * kGroup; i += kGroup)
      for (int t = 0; t < kTiles; ++t) {
        A* place = stream + i + t * kLanes;
        const Tile<A> skip = Stored<A>::load(place), p = Stored<A>::load(p_given + i + t * kLanes);
        if (sums) sum[t].add(skip, p);
        Stored<A>::store(place, skip + p);
      }
    if (sums) keep_sums(sum, sums);
  }

  static void keep_sums(const SumTiles<A> (&sums)[kTiles], A* to) {  // to: [3, kGroup]
    for (int t = 0; t < kTiles; ++t, to += kLanes) {
      Stored<A>::store(to, sums[t].skip_sq);
      Stored<A>::store(to + kGroup, sums[t].branch_sq);
      Stored<A>::store(to + 2 * kGroup, sums[t].dot);
    }
  }

  // Adds up what the chunks left of a block's sums.
  void store_sums(int64_t block) {
    if (!a_.sums) return;
    for (int64_t g = 0; g < place_.count; ++g)
      for (int64_t i = 0; i < 3; ++i)
        for (int64_t lane = 0; lane < kGroup; lane += kLanes) {
          Tile<A> total{};
          for (int64_t chunk = 0; chunk < ceil_div(s_.width, kChunk); ++chunk)
            total += Stored<A>::load(sums(g, chunk) + i * kGroup + lane);
          A* to = in<A>(a_.sums, ((a_.first + block) * 3 + i) * s_.batch + place_.first(g) + lane);
          const int64_t n = least(kLanes, place_.size(g) - lane);
          if (n > 0) store(to, total, n);
        }
  }

  void finish() {
    if (a_.last > a_.first) store_sums(a_.last - a_.first - 1);
    if (!a_.y) return;
    for (int64_t g = 0; g < place_.count; ++g)
      store_samples(x(g), kGroup, place_.size(g), s_.width, in<T>(a_.y, place_.first(g) * s_.width),
                    s_.width);
  }

  const Args& a_;
  void (*const activate_)(A*, int64_t);
  const Shape& s_;
  const Groups<kTiles> place_;
  A *const x_, *const h_,
                   *const sums_;  // [groups, D, kGroup], [groups, H, kGroup], the chunks' sums
  Widened<T> weights_;
};

}  // namespace fastres::mlp_stack::FASTRES_ISA
