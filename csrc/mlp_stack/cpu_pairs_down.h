// cpu_pairs_down: bfloat16 down the blocks by the tile registers of AMX. What products take, the
// stream's cotangent and those of hidden units, is rounded to bfloat16 for them, as eager's is; the
// cotangent itself and all sums stay in float32.
#pragma once
#include "../common/pairs.h"
#include "cpu_cotangents.h"

#if defined(FASTRES_PAIRS)
namespace fastres::mlp_stack::FASTRES_ISA {

// The lanes of a tile of a group's `samples`: a bit each.
inline uint16_t live_lanes(int64_t samples, int t) {
  const int64_t there = samples - t * kLanes;
  return there >= kLanes ? 0xffff : there <= 0 ? 0 : (1u << there) - 1;
}

// h <- act(z + bias), dz <- gate * q * act'(z + bias), rounded: rows of samples both, and dz in
// pairs [kChunk / 2, kGroup, 2]; the sums of q * h over the rows, [kGroup]. z, q [kChunk, kGroup].
// Lanes without a sample become 0: sums over samples take them too.
template <Activation kActivation>
void derive_to_pairs(const float* z, const float* q, const float* bias, int64_t samples,
                     const GateTiles<float, 2>& gate, float* sums, BFloat16* h, BFloat16* delta,
                     int64_t stride, BFloat16* pairs) {
  constexpr int64_t kGroup = 2 * kLanes;
  for (int t = 0; t < 2; ++t) {
    const uint16_t live = live_lanes(samples, t);
    Tile<float> dot{};
    const auto derived = [&](int64_t r) {
      const int64_t at = r * kGroup + t * kLanes, to = r * stride + t * kLanes;
      const Tile<float> given = Stored<float>::load(z + at) + Math<Tile<float>>::of(bias[r]),
                        cotangent = Stored<float>::load(q + at), out = value<kActivation>(given);
      const Tile<float> dz = select(live, gate.v[t] * (cotangent * derivative<kActivation>(given)));
      dot += cotangent * out;
      store_rounded(h + to, select(live, out));
      store_rounded(delta + to, dz);
      return dz;
    };
    for (int64_t r = 0; r < kChunk; r += 2) {
      const Tile<float> a = derived(r), b = derived(r + 1);
      store_pairs(pairs + r * kGroup + 2 * t * kLanes, a, b);
    }
    Stored<float>::store(sums + t * kLanes, dot);
  }
}

// As Chain, with 32 samples side by side.
class ChainInPairs {
  static constexpr int64_t kGroup = 2 * kLanes;

 public:
  ChainInPairs(const BackwardArgs& a, int64_t row, int64_t rows, void* buffer, int members)
      : a_(a),
        derive_(pick_activation(
            a.shape.activation,
            [](auto activation) { return &derive_to_pairs<decltype(activation)::value>; })),
        s_(a.shape),
        cotangents_(a, row, rows, buffer),
        place_(cotangents_.place),
        x_(reinterpret_cast<BFloat16*>(cotangents_.end())),
        g_(x_ + place_.lanes() * s_.width),
        delta_(g_ + place_.lanes() * s_.width),
        left_(a.shape, a.scratch, true),
        ahead_(elements_ahead<BFloat16>(s_, members, -1)),
        columns_(kChunk * (s_.width > s_.hidden ? s_.width : s_.hidden) * sizeof(BFloat16)) {}

  void run(Member* member) {
    const AmxTiles registers;
    downwards(
        member, cotangents_, [&] { load(); },
        [&](int64_t number, const Chunk& chunk) { hidden(number, chunk); },
        [&](int64_t number, const Chunk& chunk) { stream(number, chunk); });
  }

 private:
  // [D / 2, kGroup, 2], [H / 2, kGroup, 2]
  BFloat16* x(int64_t group) const { return x_ + group * kGroup * s_.width; }
  BFloat16* g(int64_t group) const { return g_ + group * kGroup * s_.width; }
  BFloat16* delta(int64_t group) const { return delta_ + group * kGroup * s_.hidden; }

  void load() {
    cotangents_.load();
    for (int64_t c = 0; c < s_.width / kChunk; ++c)
      for (int64_t i = 0; i < place_.count; ++i) {
        load_state(0, Chunk(c, s_.width), i);
        round_cotangent(Chunk(c, s_.width), i);
      }
  }
  void load_state(int64_t number, const Chunk& chunk, int64_t i) {
    rows_to_pairs(cotangents_.state(number, i, chunk.first), s_.width, place_.size(i),
                  x(i) + chunk.first * kGroup);
  }
  void round_cotangent(const Chunk& chunk, int64_t i) {
    to_pairs<2>(cotangents_.g(i) + chunk.first * kGroup, kGroup, kChunk,
                g(i) + chunk.first * kGroup);
  }

  // A chunk of columns of a matrix of `count` rows, as rows.
  const BFloat16* columns(const BFloat16* from, int64_t stride, int64_t count) {
    BFloat16* const to = static_cast<BFloat16*>(columns_.data());
    columns_to_rows(from, stride, count, to, ahead_);
    return to;
  }

  // h <- act(z), dz <- gate * q * act'(z) with z = W1 x + b1, q = W2^T g; and the chunk's share of
  // <q, h>.
  void hidden(int64_t number, const Chunk& chunk) {
    const int64_t set = cotangents_.set(number), row = set * s_.hidden + chunk.first;
    const BFloat16 *w1 = in<BFloat16>(a_.weights.w1, row * s_.width),
                   *w2 = columns(
                       in<BFloat16>(a_.weights.w2, set * s_.width * s_.hidden + chunk.first),
                       s_.hidden, s_.width);
    alignas(64) float z[2][kChunk * kGroup], q[2][kChunk * kGroup], b1[kChunk];
    move(in<BFloat16>(a_.weights.b1, row), b1, kChunk);
    const auto start = [&](int64_t i) {
      product_of_pairs<2>(w1, s_.width, x(i), s_.width, z[i % 2], kGroup, i ? 0 : ahead_);
      product_of_pairs<2>(w2, s_.width, g(i), s_.width, q[i % 2], kGroup);
    };
    overlapped(place_.count, start, [&](int64_t i) {
      const int64_t at = chunk.first * left_.stride, local = cotangents_.local(number),
                    sample = place_.first(i);
      derive_(z[i % 2], q[i % 2], b1, place_.size(i), cotangents_.gate(number, i),
              cotangents_.sums(i, chunk.number), left_.hidden(local, sample) + at,
              left_.delta(local, sample) + at, left_.stride, delta(i) + chunk.first * kGroup);
      cotangents_.fetch_state(number, i, chunk.number);
    });
  }

  // g <- g + W1^T dz; the chunk's share of <g, b2>; and x of the block below.
  void stream(int64_t number, const Chunk& chunk) {
    const int64_t set = cotangents_.set(number);
    const BFloat16* w1 = columns(
        in<BFloat16>(a_.weights.w1, set * s_.hidden * s_.width + chunk.first), s_.width, s_.hidden);
    alignas(64) float sum[2][kChunk * kGroup], b2[kChunk];
    move(in<BFloat16>(a_.weights.b2, set * s_.width + chunk.first), b2, kChunk);
    const auto start = [&](int64_t i) {
      product_of_pairs<2>(w1, s_.hidden, delta(i), s_.hidden, sum[i % 2], kGroup);
    };
    overlapped(place_.count, start, [&](int64_t i) {
      const uint16_t live[2] = {live_lanes(place_.size(i), 0), live_lanes(place_.size(i), 1)};
      BFloat16* gated =
          left_.gated(cotangents_.local(number), place_.first(i)) + chunk.first * left_.stride;
      cotangents_.gated(number, chunk, i, b2, [&](int64_t r, int t, const Tile<float>& v) {
        store_rounded(gated + r * left_.stride + t * kLanes, select(live[t], v));
      });
      cotangents_.add(number, chunk, i, sum[i % 2]);
      round_cotangent(chunk, i);
      if (number + 1 < cotangents_.blocks) load_state(number + 1, chunk, i);
    });
  }

  const BackwardArgs& a_;
  void (*const derive_)(const float*, const float*, const float*, int64_t,
                        const GateTiles<float, 2>&, float*, BFloat16*, BFloat16*, int64_t,
                        BFloat16*);
  const Shape& s_;
  Cotangents<BFloat16, 2> cotangents_;
  const Groups<2>& place_;
  BFloat16 *const x_, *const g_, *const delta_;
  const Left<BFloat16> left_;
  const int64_t ahead_;
  const Buffer columns_;
};

// As WeightRows, of rows and columns by 32.
class WeightRowsInPairs {
 public:
  WeightRowsInPairs(int64_t rows, int64_t cols, float* weights, float* bias, bool fresh)
      : rows_(rows), cols_(cols), weights_(weights), bias_(bias), fresh_(fresh) {}

  void add_hidden(const BFloat16* left, int64_t stride, int64_t samples, const BFloat16* hidden) {
    add(left, stride, samples, [&](int64_t c, int64_t b, BFloat16* to) {
      rows_to_pairs(hidden + c * stride + b, stride, kPaired, to);
    });
  }
  void add_states(const BFloat16* left, int64_t stride, int64_t samples, const BFloat16* states) {
    static constexpr BFloat16 kNone[kPaired] = {};
    const auto row = [&](int64_t b, int64_t c) {
      return b < samples ? states + b * cols_ + c : kNone;
    };
    add(left, stride, samples, [&](int64_t c, int64_t b, BFloat16* to) {
      for (int64_t i = b; i < b + kPaired; i += 2, to += 2 * kPaired)
        interleave(row(i, c), row(i + 1, c), to);
    });
  }

 private:
  // right(c, b, to): to [kPaired / 2, kPaired, 2] <- columns from c on of samples from b on.
  template <class Right>
  void add(const BFloat16* left, int64_t stride, int64_t samples, const Right& right) {
    alignas(64) BFloat16 pairs[kSlab * kPaired];
    const int64_t count = round_up(samples, kPaired);
    for (int64_t c = 0; c < cols_; c += kPaired) {
      for (int64_t b = 0; b < count; b += kPaired) right(c, b, pairs + b * kPaired);
      for (int64_t r = 0; r < rows_; r += kPaired) {
        float* const to = weights_ + r * cols_ + c;
        if (fresh_) product_of_pairs<2>(left + r * stride, stride, pairs, count, to, cols_);
        else product_of_pairs<2, true>(left + r * stride, stride, pairs, count, to, cols_);
      }
    }
    add_sums(left, stride, samples, rows_, fresh_, bias_);
    fresh_ = false;
  }

  const int64_t rows_, cols_;
  float *const weights_, *const bias_;
  bool fresh_;
};

}  // namespace fastres::mlp_stack::FASTRES_ISA
#endif
