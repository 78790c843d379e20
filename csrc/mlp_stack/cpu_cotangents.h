// cpu_cotangents: the cotangent of the stream of a tile of samples on its way down, where the
// states are that it meets, and what the gate's gradient takes. Number 0 is the last block.
#pragma once
#include "cpu_weights.h"

namespace fastres::mlp_stack::FASTRES_ISA {

template <class T, int kTiles> class Cotangents : public Descent {
  using A = typename Stored<T>::A;
  static constexpr int64_t kGroup = kTiles * kLanes;

 public:
  Cotangents(const BackwardArgs& a, int64_t row, int64_t rows, void* buffer)
      : Descent(a),
        place(row, rows),
        g_(static_cast<A*>(buffer)),
        sums_(g_ + place.lanes() * s.width) {}

  const Groups<kTiles> place;
  A* g(int64_t group) const { return g_ + group * kGroup * s.width; }  // [D, kGroup]
  A* sums(int64_t group, int64_t chunk) const {                        // [kGroup]
    return sums_ + (chunk * place.count + group) * kGroup;
  }
  A* end() const { return sums_ + place.lanes() * sums_chunks(); }

  // Features from `feature` on of a group's samples, rows of [batch, D].
  const T* state(int64_t number, int64_t group, int64_t feature) const {
    return in<T>(a.states, at(local(number), group, feature));
  }
  GateTiles<A, kTiles> gate(int64_t number, int64_t group) const {
    return {a.weights, block(number), place.first(group), place.size(group)};
  }

  void load() {
    for (int64_t i = 0; i < place.count; ++i)
      load_samples(in<A>(a.g, at(0, i, 0)), s.width, place.size(i), s.width, g(i), kGroup, kGroup);
  }

  // Fetches a chunk's share of a group's next state into the second cache: memory takes as long as
  // a chunk of a product.
  void fetch_state(int64_t number, int64_t group, int64_t chunk) const {
    if (number + 1 >= blocks) return;
    const int64_t size = place.size(group) * s.width, chunks = hidden_chunks();
    const T* from = state(number + 1, group, 0);
    for (int64_t i = size * chunk / chunks; i < size * (chunk + 1) / chunks; i += 64 / sizeof(T))
      __builtin_prefetch(from + i, 0, 2);
  }

  // keep(r, t, gate * g) for the features of a chunk; the chunk's share of <g, b2>.
  template <class Keep>
  void gated(int64_t number, const Chunk& chunk, int64_t group, const A* b2, const Keep& keep) {
    const GateTiles<A, kTiles> gates = gate(number, group);
    for (int t = 0; t < kTiles; ++t) {
      Tile<A> dot{};
      for (int64_t r = 0; r < chunk.size; ++r) {
        const Tile<A> v = Stored<A>::load(g(group) + (chunk.first + r) * kGroup + t * kLanes);
        dot += b2[r] * v;
        keep(r, t, gates.v[t] * v);
      }
      Stored<A>::store(sums(group, hidden_chunks() + chunk.number) + t * kLanes, dot);
    }
  }

  // g <- g + more, and the cotangents of the block's state; more [chunk.size, kGroup].
  void add(int64_t number, const Chunk& chunk, int64_t group, const A* more) {
    add_tiles(more, chunk.size * kGroup, g(group) + chunk.first * kGroup);
    if (!a.gstates) return;
    alignas(64) A given[kChunk * kGroup];
    load_samples(in<T>(a.gstates, at(local(number), group, chunk.first)), s.width,
                 place.size(group), chunk.size, given, kGroup, kGroup);
    add_tiles(given, chunk.size * kGroup, g(group) + chunk.first * kGroup);
  }

  // Adds to the gate's gradient what chunks [first, last) left: those of the step before this one.
  void add_gate_gradient(int64_t number, int64_t first, int64_t last) {
    if (!a.ggate) return;
    for (int64_t i = 0; i < place.count; ++i)
      for (int64_t lane = 0; lane < place.size(i); lane += kLanes) {
        A* to = in<A>(a.ggate, block(number) * s.batch + place.first(i) + lane);
        const int64_t n = least(kLanes, place.size(i) - lane);
        Tile<A> total = first ? fastres::FASTRES_ISA::load(to, n) : Tile<A>{};
        for (int64_t c = first; c < last; ++c) total += Stored<A>::load(sums(i, c) + lane);
        store(to, total, n);
      }
  }

  void finish() {
    add_gate_gradient(blocks - 1, hidden_chunks(), sums_chunks());
    for (int64_t i = 0; i < place.count; ++i)
      store_samples(g(i), kGroup, place.size(i), s.width, in<A>(a.g, at(0, i, 0)), s.width);
  }

 private:
  int64_t at(int64_t local, int64_t group, int64_t feature) const {
    return (local * s.batch + place.first(group)) * s.width + feature;
  }
  static void add_tiles(const A* from, int64_t count, A* to) {
    for (int64_t k = 0; k < count; k += kLanes)
      Stored<A>::store(to + k, Stored<A>::load(to + k) + Stored<A>::load(from + k));
  }

  A *const g_, *const sums_;  // [groups, D, kGroup], the chunks' sums
};

// Downwards: load(); then for every block hidden(number, chunk) and stream(number, chunk) for the
// chunks of H and of D, and the gate's gradient; then cotangents.finish().
template <class C, class Load, class Hidden, class Down>
void downwards(Member* member, C& cotangents, const Load& load, const Hidden& hidden,
               const Down& stream) {
  const int64_t chunks = cotangents.hidden_chunks();
  in_order(
      member, cotangents.blocks, chunks, cotangents.width_chunks(), load,
      [&](int64_t number, int64_t chunk) {
        if (chunk == 0 && number > 0) {
          cotangents.has_left(number);
          cotangents.add_gate_gradient(number - 1, chunks, cotangents.sums_chunks());
        }
        hidden(number, Chunk(chunk, cotangents.s.hidden));
      },
      [&](int64_t number, int64_t chunk) {
        if (chunk == 0) cotangents.add_gate_gradient(number, 0, chunks);
        stream(number, Chunk(chunk, cotangents.s.width));
      },
      [&] {
        cotangents.has_left(cotangents.blocks);
        cotangents.finish();
      });
}

}  // namespace fastres::mlp_stack::FASTRES_ISA
