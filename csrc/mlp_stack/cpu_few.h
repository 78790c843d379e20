// cpu_few: few samples through the blocks. Features stand side by side in a tile: 16 of one sample,
// or four of each of four samples, which four weights of a row then meet at once. The sums of
// rows, joined, are features of the next product.
#pragma once
#include "cpu_forward.h"

namespace fastres::mlp_stack::FASTRES_ISA {

// Tiles of kSamples samples with kFeatures features each.
template <class A, int kSamples> struct Abreast {
  static constexpr int kFeatures = kLanes / kSamples, kWidth = Tile<A>::kWidth;
  using V = typename Tile<A>::Vector;

  // kFeatures numbers, once for each sample.
  template <class T> FASTRES_HD static Tile<A> of(const T* numbers) {
    if constexpr (kSamples == 1) return Stored<T>::load(numbers);
    else return repeated(numbers);
  }
  // Feature i of each sample: the sum of what t[i] has of the sample.
  FASTRES_HD static Tile<A> joined(const Tile<A> (&t)[kFeatures]) {
    if constexpr (kSamples == 4) {
      return join(t[0], t[1], t[2], t[3]);
#if defined(__AVX512F__)
    } else if constexpr (sizeof(A) == 4) {
      V four[4];
      for (int i = 0; i < 4; ++i)
        four[i] = join(t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]).v[0];
      return {{parts(parts(four[0], four[1]), parts(four[2], four[3]))}};
#endif
    } else {
      alignas(64) A sums[kLanes];
      for (int i = 0; i < kFeatures; ++i) sums[i] = t[i].sum();
      return Stored<A>::load(sums);
    }
  }
  // In every lane of a sample the sum of its lanes.
  FASTRES_HD static Tile<A> totals(const Tile<A>& t) {
    if constexpr (kSamples == 4) return join(t, t, t, t);
    else return Math<Tile<A>>::of(t.sum());
  }

 private:
  FASTRES_HD static Tile<A> repeated(const A* four) {
    return Tile<A>::map([&](int i) {
      V v;
#if defined(__AVX512F__)
      if constexpr (sizeof(A) == 4) return (V)_mm512_broadcast_f32x4(_mm_loadu_ps(four));
      else return (V)_mm512_broadcast_f64x4(_mm256_loadu_pd(four));
#elif defined(__AVX2__)
      if constexpr (sizeof(A) == 4) return (V)_mm256_broadcast_ps((const __m128*)four);
#endif
      std::memcpy(&v, four + i * kWidth % 4, sizeof v);
      return v;
    });
  }

  // Lane i of each four lanes: the sum of these lanes of argument i.
  FASTRES_HD static Tile<A> join(const Tile<A>& a, const Tile<A>& b, const Tile<A>& c,
                                 const Tile<A>& d) {
    if constexpr (kWidth >= 4) {
      return Tile<A>::map(
          [&](int i) { return pairs(pairs(a.v[i], b.v[i]), pairs(c.v[i], d.v[i])); });
    } else {
      const Tile<A>* const from[4] = {&a, &b, &c, &d};
      alignas(64) A sums[kLanes], part[kLanes];
      for (int r = 0; r < 4; ++r) {
        Stored<A>::store(part, *from[r]);
        for (int i = 0; i < kLanes; i += 4)
          sums[i + r] = (part[i] + part[i + 1]) + (part[i + 2] + part[i + 3]);
      }
      return Stored<A>::load(sums);
    }
  }
  // Of each four of a, then of b: the sums of the first two and of the last two.
  FASTRES_HD static V pairs(const V& a, const V& b) {
    using Fours = Quads<A, kWidth / 4>;
    return Fours::template shuffle<0, 2, 4, 6>(a, b) + Fours::template shuffle<1, 3, 5, 7>(a, b);
  }
#if defined(__AVX512F__)
  // The same with four lanes for one.
  FASTRES_HD static V parts(const V& a, const V& b) {
    return (V)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) +
           (V)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
  }
#endif
};

// kGroups groups of kSamples samples share a weight on its way.
template <class T, int kSamples, int kGroups> class Few {
  using A = typename Stored<T>::A;
  using W = std::conditional_t<kSamples == 1, T, A>;  // what is used once is widened as it is used
  using Tiles = Abreast<A, kSamples>;
  static constexpr int64_t kFeatures = Tiles::kFeatures;
  static constexpr int kRegisters = kAccumulators / Tile<A>::kCount / kGroups;
  // Rows whose sums stay in registers, and rows after which they are joined.
  static constexpr int kRows = kRegisters < 4 ? 4 : kSamples > 1 && kRegisters > 8 ? 8 : kRegisters;
  static constexpr int kJoined = kRows < kFeatures ? kFeatures : kRows;

 public:
  Few(const Args& a, int64_t row, int64_t rows, void* buffer, int members)
      : a_(a),
        activate_(pick_activation(
            a.shape.activation,
            [](auto activation) { return &activate<decltype(activation)::value, A>; })),
        s_(a.shape),
        row_(row),
        rows_(rows),
        groups_(round_up(ceil_div(rows, kSamples), kGroups)),
        x_(static_cast<A*>(buffer)),
        h_(x_ + groups_ * kSamples * s_.width),
        sums_(h_ + groups_ * kSamples * s_.hidden),
        weights_(s_.width > s_.hidden ? s_.width : s_.hidden, s_, members) {}

  void run(Member* member) {
    upwards(
        member, a_, *this, [&] { load(); },
        [&](int64_t block, const Chunk& chunk) { hidden(block, chunk); },
        [&](int64_t block, const Chunk& chunk) { branch(block, chunk); });
  }

  // Adds up what the chunks left of a block's sums.
  void store_sums(int64_t block) {
    if (!a_.sums) return;
    for (int64_t g = 0; g < groups_; ++g)
      for (int64_t k = 0; k < 3; ++k) {
        Tile<A> total{};
        for (int64_t chunk = 0; chunk < chunks(); ++chunk)
          total += Stored<A>::load(sums(g, chunk) + k * kLanes);
        alignas(64) A lanes[kLanes];
        Stored<A>::store(lanes, Tiles::totals(total));
        A* to = in<A>(a_.sums, ((a_.first + block) * 3 + k) * s_.batch + row_) + g * kSamples;
        for (int64_t i = 0; i < least(kSamples, rows_ - g * kSamples); ++i)
          to[i] = lanes[i * kFeatures];
      }
  }

  void finish() {
    if (a_.last > a_.first) store_sums(a_.last - a_.first - 1);
    if (a_.y) store_rows(a_.y, 0, s_.width);
  }

  // out[g] <- bias + w in[g] for kGroups groups.
  static void product(int64_t rows, const Rows<W>& w, const A* bias, const A* in, int64_t count,
                      A* out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r += kJoined) {
      Tile<A> sums[kGroups][kJoined];
#pragma GCC unroll 4
      for (int i = 0; i < kJoined; i += kRows) add_rows(w.from_row(r + i), in, count, i, sums);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
        for (int i = 0; i < kJoined; i += kFeatures) {
          Tile<A> some[kFeatures];
#pragma GCC unroll 16
          for (int k = 0; k < kFeatures; ++k) some[k] = sums[g][i + k];
          Stored<A>::store(out + g * out_stride + (r + i) * kSamples,
                           Tiles::of(bias + r + i) + Tiles::joined(some));
        }
    }
  }

 private:
  int64_t chunks() const { return ceil_div(s_.width, kChunk); }
  // [features / kFeatures, kSamples, kFeatures]
  A* x(int64_t group) const { return x_ + group * kSamples * s_.width; }
  A* h(int64_t group) const { return h_ + group * kSamples * s_.hidden; }
  A* sums(int64_t group, int64_t chunk) const {  // 3 tiles
    return sums_ + (group * chunks() + chunk) * 3 * kLanes;
  }
  // Where features [from, from + kFeatures) of a sample stand.
  A* place(int64_t sample, int64_t from) const {
    return x(sample / kSamples) + from * kSamples + sample % kSamples * kFeatures;
  }

  Rows<W> rows(const T* from, int64_t rows, int64_t cols) {
    if constexpr (std::is_same_v<W, T>) return weights_.in_place(from, cols);
    else return weights_.rows(from, rows, cols);
  }

  void load() {
    for (int64_t i = 0; i < groups_ * kSamples; ++i)
      for (int64_t c = 0; c < s_.width; c += kLanes) {
        alignas(64) A some[kLanes] = {};
        if (i < rows_) move(in<T>(a_.x, (row_ + i) * s_.width + c), some, kLanes);
        for (int64_t k = 0; k < kLanes; k += kFeatures)
          std::memcpy(place(i, c + k), some + k, kFeatures * sizeof(A));
      }
    keep_state(0, Chunk(0, s_.width), s_.width);
  }

  // Features [from, from + size) of all samples, to [samples, D].
  void store_rows(void* to, int64_t from, int64_t size) const {
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t c = from; c < from + size; c += kLanes) {
        alignas(64) A some[kLanes];
        for (int64_t k = 0; k < kLanes; k += kFeatures)
          std::memcpy(some + k, place(i, c + k), kFeatures * sizeof(A));
        move(some, in<T>(to, (row_ + i) * s_.width + c), kLanes);
      }
  }

  void keep_state(int64_t blocks_done, const Chunk& chunk, int64_t size) {
    if (!a_.states || blocks_done % a_.every || blocks_done == a_.last - a_.first) return;
    store_rows(in<T>(a_.states, blocks_done / a_.every * s_.batch * s_.width), chunk.first, size);
  }

  FASTRES_HD static void add_rows(const Rows<W>& w, const A* in, int64_t count, int at,
                                  Tile<A> (&sums)[kGroups][kJoined]) {
    Tile<A> sum[kGroups][kRows]{};
    for (int64_t k = 0; k < count; k += kFeatures) {
      for (int64_t i = 0; i < kFeatures; i += 4) w.fetch(k + i, kRows);
      Tile<A> v[kGroups];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) v[g] = Stored<A>::load(in + (g * count + k) * kSamples);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Tile<A> weights = Tiles::of(&w(r, k));
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) sum[g][r] += weights * v[g];
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sums[g][at + r] = sum[g][r];
  }

  // h <- act(W1 x + b1)
  void hidden(int64_t block, const Chunk& chunk) {
    const int64_t at = set_of(a_, block) * s_.hidden + chunk.first;
    const Rows<W> w1 = rows(in<T>(a_.weights.w1, at * s_.width), chunk.size, s_.width);
    const A* b1 = weights_.bias(in<T>(a_.weights.b1, at), chunk.size);
    for (int64_t g = 0; g < groups_; g += kGroups) {
      A* out = h(g) + chunk.first * kSamples;
      product(chunk.size, w1, b1, x(g), s_.width, out, s_.hidden * kSamples);
      for (int64_t i = 0; i < kGroups; ++i)
        activate_(out + i * s_.hidden * kSamples, chunk.size * kSamples);
    }
  }

  // x <- x + gate * (W2 h + b2), and the sums over the features of the chunk.
  void branch(int64_t block, const Chunk& chunk) {
    const int64_t at = set_of(a_, block) * s_.width + chunk.first;
    const Rows<W> w2 = rows(in<T>(a_.weights.w2, at * s_.hidden), chunk.size, s_.hidden);
    const A* b2 = weights_.bias(in<T>(a_.weights.b2, at), chunk.size);
    alignas(64) A f[kGroups][kChunk * kSamples];
    for (int64_t first = 0; first < groups_; first += kGroups) {
      product(chunk.size, w2, b2, h(first), s_.hidden, f[0], kChunk * kSamples);
      for (int64_t g = first; g < first + kGroups; ++g) {
        const Tile<A> gate = gates(block, g);
        SumTiles<A> sum;
        for (int64_t r = 0; r < chunk.size * kSamples; r += kLanes) {
          A* stream = x(g) + chunk.first * kSamples + r;
          const Tile<A> skip = Stored<A>::load(stream),
                        p = gate * Stored<A>::load(f[g - first] + r);
          sum.add(skip, p);
          Stored<A>::store(stream, skip + p);
        }
        A* to = sums(g, chunk.number);
        Stored<A>::store(to, sum.skip_sq);
        Stored<A>::store(to + kLanes, sum.branch_sq);
        Stored<A>::store(to + 2 * kLanes, sum.dot);
      }
    }
    keep_state(block + 1, chunk, chunk.size);
  }

  Tile<A> gates(int64_t block, int64_t group) const {
    if (!a_.weights.gate) return Math<Tile<A>>::of(1);
    alignas(64) A each[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t sample = group * kSamples + i / kFeatures;
      each[i] = sample < rows_ ? gate_of<A>(a_.weights, a_.first + block, row_ + sample) : A(1);
    }
    return Stored<A>::load(each);
  }

  const Args& a_;
  void (*const activate_)(A*, int64_t);
  const Shape& s_;
  const int64_t row_, rows_, groups_;
  A *const x_, *const h_,
                   *const sums_;  // [groups, kSamples * D], the same with H, the chunks' sums
  Widened<T> weights_;
};

}  // namespace fastres::mlp_stack::FASTRES_ISA
