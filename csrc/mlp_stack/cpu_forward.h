// cpu_forward: a tile of samples through the blocks, upwards.
#pragma once
#include "cpu_stream.h"

namespace fastres::mlp_stack::FASTRES_ISA {

template <Activation kActivation, class A> void activate(A* z, int64_t count) {  // in whole tiles
  for (int64_t i = 0; i < count; i += kLanes)
    Stored<A>::store(z + i, value<kActivation>(Stored<A>::load(z + i)));
}

template <class T, int kTiles> class Forward {
  using A = typename Stored<T>::A;
  static constexpr int64_t kGroup = kTiles * kLanes;

 public:
  Forward(const Args& a, int64_t row, int64_t rows, void* buffer, int members)
      : a_(a),
        activate_(pick_activation(
            a.shape.activation,
            [](auto activation) { return &activate<decltype(activation)::value, A>; })),
        s_(a.shape),
        stream_(a, row, rows, buffer),
        h_(stream_.end()),
        weights_(s_.width > s_.hidden ? s_.width : s_.hidden, s_, members) {}

  void run(Member* member) {
    upwards(
        member, a_, stream_, [&] { stream_.load(); },
        [&](int64_t block, const Chunk& chunk) { hidden(block, chunk); },
        [&](int64_t block, const Chunk& chunk) { branch(block, chunk); });
  }

 private:
  A* h(int64_t group) const { return h_ + group * kGroup * s_.hidden; }  // [H, kGroup]

  // h <- act(W1 x + b1)
  void hidden(int64_t block, const Chunk& chunk) {
    const int64_t at = set_of(a_, block) * s_.hidden + chunk.first;
    const Rows<A> w1 = weights_.rows(in<T>(a_.weights.w1, at * s_.width), chunk.size, s_.width);
    const A* b1 = weights_.bias(in<T>(a_.weights.b1, at), chunk.size);
    for (int64_t g = 0; g < stream_.place.count; ++g) {
      A* out = h(g) + chunk.first * kGroup;
      product<kTiles>(chunk.size, w1, b1, stream_.x(g), kGroup, s_.width, out, kGroup);
      activate_(out, chunk.size * kGroup);
    }
  }

  // x <- x + gate * (W2 h + b2), and the sums over the features of the chunk.
  void branch(int64_t block, const Chunk& chunk) {
    const int64_t at = set_of(a_, block) * s_.width + chunk.first;
    const Rows<A> w2 = weights_.rows(in<T>(a_.weights.w2, at * s_.hidden), chunk.size, s_.hidden);
    const A* b2 = weights_.bias(in<T>(a_.weights.b2, at), chunk.size);
    alignas(64) A f[kChunk * kGroup];
    for (int64_t g = 0; g < stream_.place.count; ++g) {
      product<kTiles>(chunk.size, w2, b2, h(g), kGroup, s_.hidden, f, kGroup);
      stream_.add(block, chunk, g, f);
    }
  }

  const Args& a_;
  void (*const activate_)(A*, int64_t);
  const Shape& s_;
  Stream<T, kTiles> stream_;
  A* const h_;  // [groups, H, kGroup]
  Widened<T> weights_;
};

}  // namespace fastres::mlp_stack::FASTRES_ISA
