// cpu_pairs_down: bfloat16 down the blocks by the tile registers of AMX. What products take, the
// stream's cotangent and those of hidden units, is rounded to bfloat16 for them, as eager's is; the
// cotangent itself and all sums stay in float32.
#pragma once
#include "../common/amx.h"
#include "cpu_cotangents.h"

#if defined(FASTRES_PAIRS)
namespace fastres::mlp_stack::FASTRES_ISA {

// to [32, 2] <- 32 elements of each of two rows, pair by pair.
FASTRES_HD void interleave(const BFloat16* a, const BFloat16* b, BFloat16* to) {
  alignas(64) static constexpr uint16_t kOrder[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i first = _mm512_loadu_si512(a), second = _mm512_loadu_si512(b);
  for (int i = 0; i < 2; ++i)
    _mm512_store_si512(
        to + 32 * i, _mm512_permutex2var_epi16(first, _mm512_load_si512(kOrder + 32 * i), second));
}

// to [16, to_stride, 2] <- 32 elements of each of `rows` rows, up to 32: a pair of elements is one
// of 32 bits, to be transposed. Rows that are not there become 0.
inline void turn_pairs(const BFloat16* from, int64_t stride, int64_t rows, BFloat16* to,
                       int64_t to_stride) {
  const auto turn = [&](const BFloat16* rows, int64_t stride, int64_t first) {
    transpose16(reinterpret_cast<const float*>(rows), stride / 2,
                reinterpret_cast<float*>(to + 2 * first), to_stride);
  };
  for (int64_t first = 0; first < 32; first += kLanes) {
    if (first + kLanes <= rows) {
      turn(from + first * stride, stride, first);
    } else {
      alignas(64) BFloat16 some[kLanes * 32] = {};
      for (int64_t r = first; r < rows; ++r)
        std::memcpy(some + (r - first) * 32, from + r * stride, 32 * sizeof(BFloat16));
      turn(some, 32, first);
    }
  }
}

// As derive(), to rows of rounded samples, and dz in pairs [kChunk / 2, kGroup, 2]. z, q [kChunk,
// kGroup]; h of lanes without a sample becomes 0.
template <Activation kActivation>
void derive_to_pairs(const float* z, const float* q, const float* bias, int64_t samples,
                     const GateTiles<float, 2>& gate, float* sums, BFloat16* h, BFloat16* delta,
                     int64_t stride, BFloat16* pairs) {
  constexpr int64_t kGroup = 2 * kLanes;
  for (int t = 0; t < 2; ++t) {
    const int64_t there = samples - t * kLanes;
    const uint16_t live = there >= kLanes ? 0xffff : there <= 0 ? 0 : (1u << there) - 1;
    Tile<float> dot{};
    const auto derived = [&](int64_t r) {
      const int64_t at = r * kGroup + t * kLanes, to = r * stride + t * kLanes;
      const Tile<float> given = Stored<float>::load(z + at) + Math<Tile<float>>::of(bias[r]),
                        cotangent = Stored<float>::load(q + at), out = value<kActivation>(given);
      const Tile<float> dz = gate.v[t] * (cotangent * derivative<kActivation>(given));
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
        turned_(kChunk * (s_.width > s_.hidden ? s_.width : s_.hidden) * sizeof(BFloat16)) {}

  void run(Member* member) {
    const AmxTiles registers;
    downwards(
        member, s_, cotangents_, [&] { load(); },
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
    turn_pairs(cotangents_.state(number, i, chunk.first), s_.width, place_.size(i),
               x(i) + chunk.first * kGroup, kGroup);
  }
  void round_cotangent(const Chunk& chunk, int64_t i) {
    to_pairs<2>(cotangents_.g(i) + chunk.first * kGroup, kGroup, kChunk,
                g(i) + chunk.first * kGroup);
  }

  // Columns [0, 32) of a matrix of `count` rows as rows.
  const BFloat16* turn(const BFloat16* from, int64_t stride, int64_t count) {
    BFloat16* const to = static_cast<BFloat16*>(turned_.data());
    alignas(64) BFloat16 pairs[kLanes * 2 * kChunk];
    for (int64_t k = 0; k < count; k += 2 * kLanes) {
      for (int64_t i = 0; i < 2 * kLanes; i += 2) {
        const BFloat16* two = from + (k + i) * stride;
        __builtin_prefetch(two + ahead_, 0, 2);
        __builtin_prefetch(two + stride + ahead_, 0, 2);
        interleave(two, two + stride, pairs + i * kChunk);
      }
      for (int64_t c = 0; c < kChunk; c += kLanes)
        transpose16(reinterpret_cast<float*>(pairs + 2 * c), kChunk,
                    reinterpret_cast<float*>(to + c * count + k), count / 2);
    }
    return to;
  }

  // h <- act(z), dz <- gate * q * act'(z) with z = W1 x + b1, q = W2^T g; and the chunk's share of
  // <q, h>. The products of the next group are under way meanwhile.
  void hidden(int64_t number, const Chunk& chunk) {
    const int64_t set = cotangents_.set(number), row = set * s_.hidden + chunk.first;
    const BFloat16 *w1 = in<BFloat16>(a_.weights.w1, row * s_.width),
                   *w2 = turn(in<BFloat16>(a_.weights.w2, set * s_.width * s_.hidden + chunk.first),
                              s_.hidden, s_.width);
    alignas(64) float z[2][kChunk * kGroup], q[2][kChunk * kGroup], b1[kChunk];
    move(in<BFloat16>(a_.weights.b1, row), b1, kChunk);
    const auto start = [&](int64_t i) {
      product_of_pairs<2>(w1, s_.width, x(i), s_.width, z[i % 2], kGroup, i ? 0 : ahead_);
      product_of_pairs<2>(w2, s_.width, g(i), s_.width, q[i % 2], kGroup);
    };
    start(0);
    for (int64_t i = 0; i < place_.count; ++i) {
      if (i + 1 < place_.count) start(i + 1);
      const int64_t at = chunk.first * left_.stride, local = cotangents_.local(number),
                    sample = place_.first(i);
      derive_(z[i % 2], q[i % 2], b1, place_.size(i), cotangents_.gate(number, i),
              cotangents_.sums(i, chunk.number), left_.hidden(local, sample) + at,
              left_.delta(local, sample) + at, left_.stride, delta(i) + chunk.first * kGroup);
      cotangents_.fetch_state(number, i, chunk.number);
    }
  }

  // g <- g + W1^T dz; the chunk's share of <g, b2>; and x of the block below.
  void stream(int64_t number, const Chunk& chunk) {
    const int64_t set = cotangents_.set(number);
    const BFloat16* w1 = turn(in<BFloat16>(a_.weights.w1, set * s_.hidden * s_.width + chunk.first),
                              s_.width, s_.hidden);
    alignas(64) float sum[2][kChunk * kGroup], b2[kChunk];
    move(in<BFloat16>(a_.weights.b2, set * s_.width + chunk.first), b2, kChunk);
    const auto start = [&](int64_t i) {
      product_of_pairs<2>(w1, s_.hidden, delta(i), s_.hidden, sum[i % 2], kGroup);
    };
    start(0);
    for (int64_t i = 0; i < place_.count; ++i) {
      if (i + 1 < place_.count) start(i + 1);
      BFloat16* gated =
          left_.gated(cotangents_.local(number), place_.first(i)) + chunk.first * left_.stride;
      cotangents_.gated(number, chunk, i, b2, [&](int64_t r, int t, const Tile<float>& v) {
        store_rounded(gated + r * left_.stride + t * kLanes, v);
      });
      cotangents_.add(number, chunk, i, sum[i % 2]);
      round_cotangent(chunk, i);
      if (number + 1 < cotangents_.blocks) load_state(number + 1, chunk, i);
    }
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
  const Buffer turned_;
};

// As WeightRows, of rows by 32 and columns by 32.
class WeightRowsInPairs {
 public:
  using Element = BFloat16;
  WeightRowsInPairs(int64_t rows, int64_t cols, float* weights, float* bias, bool fresh)
      : rows_(rows), cols_(cols), weights_(weights), bias_(bias), fresh_(fresh) {}

  void add_hidden(const BFloat16* left, int64_t stride, int64_t samples, const BFloat16* hidden) {
    add(left, stride, samples, [&](int64_t c, int64_t b, BFloat16* to) {
      turn_pairs(hidden + c * stride + b, stride, kCols, to, kCols);
    });
  }
  void add_states(const BFloat16* left, int64_t stride, int64_t samples, const BFloat16* states) {
    static constexpr BFloat16 kNone[kCols] = {};
    const auto row = [&](int64_t b, int64_t c) {
      return b < samples ? states + b * cols_ + c : kNone;
    };
    add(left, stride, samples, [&](int64_t c, int64_t b, BFloat16* to) {
      for (int64_t i = b; i < b + 32; i += 2, to += 2 * kCols)
        interleave(row(i, c), row(i + 1, c), to);
    });
  }

 private:
  static constexpr int64_t kCols = 2 * kLanes;

  // right(c, b, to): to [16, kCols, 2] <- columns from c on of 32 samples from b on.
  template <class Right>
  void add(const BFloat16* left, int64_t stride, int64_t samples, const Right& right) {
    alignas(64) BFloat16 pairs[kSlab * kCols];
    const int64_t count = round_up(samples, 32);
    for (int64_t c = 0; c < cols_; c += kCols) {
      for (int64_t b = 0; b < count; b += 32) right(c, b, pairs + b * kCols);
      for (int64_t r = 0; r < rows_; r += 32) {
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
