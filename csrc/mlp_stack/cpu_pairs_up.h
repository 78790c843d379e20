// cpu_pairs_up: bfloat16 through the blocks by the tile registers of AMX. Their products take
// features in pairs, of the stream and of the hidden units, rounded to bfloat16 as on a GPU; the
// stream itself stays in float32.
#pragma once
#include "../common/pairs.h"
#include "cpu_stream.h"

#if defined(FASTRES_PAIRS)
namespace fastres::mlp_stack::FASTRES_ISA {

// to [kChunk / 2, columns, 2] <- act(z + bias), rounded; z [kChunk, columns].
template <Activation kActivation, int kTiles>
void activate_to_pairs(const float* z, const float* bias, BFloat16* to) {
  constexpr int64_t kGroup = kTiles * kLanes;
  const auto at = [&](int64_t r, int64_t i) {
    const Tile<float> given = Stored<float>::load(z + r * kGroup + i);
    return value<kActivation>(given + Math<Tile<float>>::of(bias[r]));
  };
  for (int64_t r = 0; r < kChunk; r += 2)
    for (int64_t i = 0; i < kGroup; i += kLanes)
      store_pairs(to + r * kGroup + 2 * i, at(r, i), at(r + 1, i));
}

template <int kTiles> class ForwardInPairs {
  // Up to 32 KiB a matrix both stay near, and samples go through a block group after group: so the
  // products of one group overlap too, 2.5 ms instead of 3.0 for 16 samples of 128 features.
  static constexpr int64_t kMostAlone = 16 << 10;
  static constexpr int64_t kGroup = kTiles * kLanes;
  struct Range {
    int64_t first, last;
    int64_t size() const { return last - first; }
  };

 public:
  ForwardInPairs(const Args& a, int64_t row, int64_t rows, void* buffer, int members)
      : a_(a),
        activate_(pick_activation(a.shape.activation,
                                  [](auto activation) {
                                    return &activate_to_pairs<decltype(activation)::value, kTiles>;
                                  })),
        s_(a.shape),
        ahead_(elements_ahead<BFloat16>(s_, members, 1)),
        stream_(a, row, rows, buffer),
        x_(reinterpret_cast<BFloat16*>(stream_.end())),
        h_(x_ + stream_.place.lanes() * s_.width) {}

  void run(Member* member) {
    const AmxTiles registers;
    if (!member && s_.width * s_.hidden <= kMostAlone) return alone();
    const Range all{0, stream_.place.count};
    upwards(
        member, a_, stream_, [&] { load(); },
        [&](int64_t block, const Chunk& chunk) {
          hidden(block, {chunk.number, chunk.number + 1}, all);
        },
        [&](int64_t block, const Chunk& chunk) {
          branch(block, {chunk.number, chunk.number + 1}, all);
        });
  }

 private:
  // One thread, group after group.
  void alone() {
    load();
    for (int64_t block = 0; block < a_.last - a_.first; ++block) {
      if (block > 0) stream_.store_sums(block - 1);
      for (int64_t g = 0; g < stream_.place.count; ++g) {
        hidden(block, {0, s_.hidden / kChunk}, {g, g + 1});
        branch(block, {0, s_.width / kChunk}, {g, g + 1});
      }
    }
    stream_.finish();
  }

  // [D / 2, kGroup, 2], [H / 2, kGroup, 2]
  BFloat16* x(int64_t group) const { return x_ + group * kGroup * s_.width; }
  BFloat16* h(int64_t group) const { return h_ + group * kGroup * s_.hidden; }

  void load() {
    stream_.load();
    for (int64_t g = 0; g < stream_.place.count; ++g) round_stream(g, 0, s_.width);
  }
  void round_stream(int64_t group, int64_t from, int64_t rows) {
    to_pairs<kTiles>(stream_.x(group) + from * kGroup, kGroup, rows, x(group) + from * kGroup);
  }

  // use(chunk, group, w factors(group), bias) for some chunks of a matrix of `count` columns, each
  // with some groups.
  template <class Factors, class Use>
  void products(const void* w, const void* bias, int64_t set, int64_t rows, int64_t count,
                const Range& chunks, const Range& groups, const Factors& factors, const Use& use) {
    alignas(64) float out[2][kChunk * kGroup], wide[kChunk];
    const BFloat16 *matrix = in<BFloat16>(w, set * rows * count),
                   *biases = in<BFloat16>(bias, set * rows);
    const int64_t size = groups.size();
    const auto start = [&](int64_t i) {
      const int64_t chunk = chunks.first + i / size, g = groups.first + i % size;
      product_of_pairs<kTiles>(matrix + chunk * kChunk * count, count, factors(g), count,
                               out[i % 2], kGroup, g ? 0 : ahead_);
    };
    overlapped(chunks.size() * size, start, [&](int64_t i) {
      const Chunk chunk(chunks.first + i / size, rows);
      if (i % size == 0) move(biases + chunk.first, wide, kChunk);
      use(chunk, groups.first + i % size, out[i % 2], wide);
    });
  }

  // h <- act(W1 x + b1)
  void hidden(int64_t block, const Range& chunks, const Range& groups) {
    products(
        a_.weights.w1, a_.weights.b1, set_of(a_, block), s_.hidden, s_.width, chunks, groups,
        [&](int64_t g) { return x(g); },
        [&](const Chunk& chunk, int64_t g, float* z, const float* bias) {
          activate_(z, bias, h(g) + chunk.first * kGroup);
        });
  }

  // x <- x + gate * (W2 h + b2), and the sums over the features of the chunk.
  void branch(int64_t block, const Range& chunks, const Range& groups) {
    products(
        a_.weights.w2, a_.weights.b2, set_of(a_, block), s_.width, s_.hidden, chunks, groups,
        [&](int64_t g) { return h(g); },
        [&](const Chunk& chunk, int64_t g, float* f, const float* bias) {
          stream_.template add<true>(block, chunk, g, f, bias);
          round_stream(g, chunk.first, kChunk);
        });
  }

  const Args& a_;
  void (*const activate_)(const float*, const float*, BFloat16*);
  const Shape& s_;
  const int64_t ahead_;
  Stream<BFloat16, kTiles> stream_;
  BFloat16 *const x_, *const h_;
};

}  // namespace fastres::mlp_stack::FASTRES_ISA
#endif
