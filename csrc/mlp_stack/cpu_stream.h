// cpu_stream: the stream of a tile of samples on its way up, and the sums of what blocks add to it.
#pragma once
#include "cpu_tile.h"

namespace fastres::mlp_stack::FASTRES_ISA {

template <class T, int kTiles> class Stream {
  using A = typename Stored<T>::A;
  static constexpr int64_t kGroup = kTiles * kLanes;

 public:
  Stream(const Args& a, int64_t row, int64_t rows, void* buffer)
      : place(row, rows),
        a_(a),
        s_(a.shape),
        x_(static_cast<A*>(buffer)),
        sums_(x_ + place.lanes() * s_.width) {}

  const Groups<kTiles> place;
  A* x(int64_t group) const { return x_ + group * kGroup * s_.width; }  // [D, kGroup]
  A* end() const { return sums_ + place.lanes() * 3 * ceil_div(s_.width, kChunk); }

  void load() {
    for (int64_t g = 0; g < place.count; ++g) {
      load_samples(in<T>(a_.x, place.first(g) * s_.width), s_.width, place.size(g), s_.width, x(g),
                   kGroup, kGroup);
      keep_state(g, 0, 0, s_.width);
    }
  }

  // x <- x + gate * (f + bias) for the features of a chunk, and the sums over them. f [chunk.size,
  // kGroup] is used up; without kBias there is none.
  template <bool kBias = false>
  void add(int64_t block, const Chunk& chunk, int64_t group, A* f, const A* bias = nullptr) {
    A* to = a_.sums ? sums(group, chunk.number) : nullptr;
    A* stream = x(group) + chunk.first * kGroup;
    if (a_.weights.gate) {
      scale<kBias>(f, bias, chunk.size,
                   {a_.weights, a_.first + block, place.first(group), place.size(group)});
      add_rows<false>(f, bias, chunk.size, stream, to);
    } else {
      add_rows<kBias>(f, bias, chunk.size, stream, to);
    }
    keep_state(group, block + 1, chunk.first, chunk.size);
  }

  // Adds up what the chunks left of a block's sums.
  void store_sums(int64_t block) {
    if (!a_.sums) return;
    for (int64_t g = 0; g < place.count; ++g)
      for (int64_t i = 0; i < 3; ++i)
        for (int64_t lane = 0; lane < kGroup; lane += kLanes) {
          Tile<A> total{};
          for (int64_t chunk = 0; chunk < ceil_div(s_.width, kChunk); ++chunk)
            total += Stored<A>::load(sums(g, chunk) + i * kGroup + lane);
          A* to = in<A>(a_.sums, ((a_.first + block) * 3 + i) * s_.batch + place.first(g) + lane);
          const int64_t n = least(kLanes, place.size(g) - lane);
          if (n > 0) store(to, total, n);
        }
  }

  void finish() {
    if (a_.last > a_.first) store_sums(a_.last - a_.first - 1);
    if (!a_.y) return;
    for (int64_t g = 0; g < place.count; ++g)
      store_samples(x(g), kGroup, place.size(g), s_.width, in<T>(a_.y, place.first(g) * s_.width),
                    s_.width);
  }

 private:
  A* sums(int64_t group, int64_t chunk) const {  // [3, kGroup]
    return sums_ + (chunk * place.count + group) * 3 * kGroup;
  }

  // Stores features [from, from + size) of a group's stream, where it is a state to be kept.
  void keep_state(int64_t group, int64_t blocks_done, int64_t from, int64_t size) {
    if (!a_.states || blocks_done % a_.every || blocks_done == a_.last - a_.first) return;
    const int64_t row = blocks_done / a_.every * s_.batch + place.first(group);
    store_samples(x(group) + from * kGroup, kGroup, place.size(group), size,
                  in<T>(a_.states, row * s_.width + from), s_.width);
  }

  template <bool kBias> FASTRES_HD static Tile<A> with_bias(const A* f, const A* bias, int64_t r) {
    const Tile<A> given = Stored<A>::load(f);
    if constexpr (kBias) return given + Math<Tile<A>>::of(bias[r]);
    else return given;
  }

  // f <- gate * (f + bias). Not in one pass with the add: there it would be rounded once or twice,
  // whichever the compiler likes better with sums or without.
  template <bool kBias>
  static void scale(A* f, const A* bias, int64_t rows, const GateTiles<A, kTiles>& gate) {
    for (int64_t r = 0; r < rows; ++r)
      for (int t = 0; t < kTiles; ++t) {
        A* place = f + r * kGroup + t * kLanes;
        Stored<A>::store(place, gate.v[t] * with_bias<kBias>(place, bias, r));
      }
  }

  // stream <- stream + p, [rows, kGroup]; the sums to [3, kGroup], if they are wanted.
  template <bool kBias>
  static void add_rows(const A* f, const A* bias, int64_t rows, A* stream, A* sums) {
    SumTiles<A> sum[kTiles];
    for (int64_t r = 0; r < rows; ++r)
      for (int t = 0; t < kTiles; ++t) {
        A* place = stream + r * kGroup + t * kLanes;
        const Tile<A> skip = Stored<A>::load(place),
                      p = with_bias<kBias>(f + r * kGroup + t * kLanes, bias, r);
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

  const Args& a_;
  const Shape& s_;
  A *const x_, *const sums_;  // [groups, D, kGroup], the chunks' sums
};

}  // namespace fastres::mlp_stack::FASTRES_ISA
