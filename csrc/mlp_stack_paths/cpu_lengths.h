// cpu_lengths: all lengths of a tile of samples through the blocks, downwards.
#pragma once
#include "cpu_derivatives.h"
#include "cpu_exponents.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

// Lane i of group q holds sample i % kSamples of row q * kRows + i / kSamples: G_0, ... G_K, R
// where there is a tail, g; then zeros.
template <class A, int kSamples> class Lengths {
  static constexpr int kTiles = kWide<A>;
  static constexpr int kGroup = kTiles * kLanes, kRows = kGroup / kSamples;
  static constexpr int64_t kStep = kRowsAtOnce<A, kTiles>;
  using ScalesOfGroup = Scales<kGroup>;

 public:
  Lengths(const Args& a, int64_t row, void* buffer)
      : a_(a),
        s_(a.shape),
        row_(row),
        samples_(least(kSamples, a.shape.batch - row)),
        rows_(a.shape.rows()),
        groups_(ceil_div(rows_ + 1, kRows)),
        lines_(static_cast<A*>(buffer)),
        source_(lines_ + groups_ * kGroup * s_.width),
        hidden_(source_ + kGroup * s_.width),
        derivative_(hidden_ + kGroup * round_up(s_.hidden, kStep)),
        w1_(derivative_ + kGroup * round_up(s_.hidden, kStep)),
        w2_(w1_ + round_up(s_.width, kStep) * s_.hidden),
        total_(reinterpret_cast<double*>(w2_ + round_up(s_.hidden, kStep) * s_.width)),
        scales_(reinterpret_cast<ScalesOfGroup*>(total_ + kSamples * s_.width)) {}

  void run() {
    load();
    for (int64_t done = 0; done < s_.blocks; ++done) {
      const int64_t block = s_.blocks - 1 - done, reached = least(done + 1, s_.longest);
      load_derivatives(block);
      load_weights(block);
      // Downwards, so that each group still finds the one below as it was.
      for (int64_t q = groups_ - 1; q >= 0; --q)
        if (q * kRows <= reached || (q + 1) * kRows > first_special()) add(q);
    }
    store();
  }

 private:
  // Rows from here on have sources of their own: R, if it has begun, and g.
  int64_t first_special() const { return s_.longest + 1; }
  A* group(int64_t q) const { return lines_ + q * kGroup * s_.width; }  // [D, kGroup]
  A* lane(int64_t row) const { return group(row / kRows) + row % kRows * kSamples; }

  void load() {
    std::memset(lines_, 0, groups_ * kGroup * s_.width * sizeof(A));
    std::memset(derivative_, 0, kGroup * round_up(s_.hidden, kStep) * sizeof(A));
    for (int64_t q = 0; q < groups_; ++q)
      for (int i = 0; i < kGroup; ++i) scales_[q].exponent[i] = 0, scales_[q].size[i] = kNothing;
    const A* from = static_cast<const A*>(a_.cotangent) + row_ * s_.width;
    for (const int64_t row : {int64_t(0), rows_}) {
      for (int64_t i = 0; i < samples_; ++i)
        for (int64_t d = 0; d < s_.width; ++d) lane(row)[d * kGroup + i] = from[i * s_.width + d];
      measure(row / kRows);
    }
  }

  // [H, kGroup]: gate * act'(z) of the samples, again for each row.
  void load_derivatives(int64_t block) {
    const Derivatives<A> from(a_, block, row_ / kLanes);
    alignas(64) A each[kLanes];
    const auto repeat = [&](const auto& sample) {
      for (int i = 0; i < kLanes; ++i) each[i] = sample(i % kSamples);
      return Stored<A>::load(each);
    };
    const Tile<A> gate = repeat(
        [&](int64_t i) { return i < samples_ ? gate_of<A>(a_.weights, block, row_ + i) : A(1); });
    const int shift = static_cast<int>(row_ % kLanes);
    constexpr uint32_t kOnce = kSamples == 16 ? 0xffff : (1u << kSamples) - 1,
                       kTimes = 0xffff / kOnce;
    for (int64_t h = 0; h < s_.hidden; ++h) {
      const Tile<A> v =
          are_bits(s_)
              ? select(static_cast<uint16_t>((from.bits()[h] >> shift & kOnce) * kTimes), gate)
              : gate * repeat([&](int64_t i) { return from.values()[h * kLanes + shift + i]; });
      for (int t = 0; t < kTiles; ++t) Stored<A>::store(derivative_ + h * kGroup + t * kLanes, v);
    }
  }

  // The weights of a block as the products read them: kStep rows side by side, zeros beyond.
  void load_weights(int64_t block) {
    const int64_t matrix = (s_.shared ? 0 : block) * s_.width * s_.hidden;
    pack(static_cast<const A*>(a_.weights.w2) + matrix, s_.width, s_.hidden, w2_);
    pack(static_cast<const A*>(a_.weights.w1) + matrix, s_.hidden, s_.width, w1_);
  }
  static void pack(const A* from, int64_t count, int64_t rows, A* to) {  // from: [count, rows]
    for (int64_t r = 0; r < rows; r += kStep)
      for (int64_t k = 0; k < count; ++k, to += kStep)
        if (const int64_t n = rows - r; n >= kStep) {
          std::memcpy(to, from + k * rows + r, kStep * sizeof(A));
        } else {
          std::memset(to, 0, kStep * sizeof(A));
          std::memcpy(to, from + k * rows + r, n * sizeof(A));
        }
  }

  // Adds J^T source to a group.
  void add(int64_t q) {
    load_source(q);
    for (int64_t h = 0; h < s_.hidden; h += kStep) {
      A* const to = hidden_ + h * kGroup;
      multiply(w2_ + h * s_.width, source_, s_.width, to);
      for (int64_t i = 0; i < kStep * kGroup; i += kLanes)
        Stored<A>::store(to + i,
                         Stored<A>::load(to + i) * Stored<A>::load(derivative_ + h * kGroup + i));
    }
    Tile<A> largest[kTiles]{};
    alignas(64) A sum[kStep * kGroup];
    for (int64_t d = 0; d < s_.width; d += kStep) {
      multiply(w1_ + d * s_.hidden, hidden_, s_.hidden, sum);
      A* const to = group(q) + d * kGroup;
      for (int64_t i = 0; i < least(kStep, s_.width - d) * kTiles; ++i) {
        const Tile<A> v = Stored<A>::load(to + i * kLanes) + Stored<A>::load(sum + i * kLanes);
        Stored<A>::store(to + i * kLanes, v);
        raise(largest[i % kTiles], v);
      }
    }
    note_sizes(q, largest);
  }

  // to [kStep, kGroup] = kStep rows of weights times from [count, kGroup]
  static void multiply(const A* weights, const A* from, int64_t count, A* to) {
    constexpr const A* kNoBias = nullptr;
    product_of_rows<kStep, kTiles, false>(Columns<A>{weights, kStep}, kNoBias, from, kGroup, count,
                                          to, kGroup);
  }

  // The group shifted by one row, with what R and g add of their own; and the exponents for it.
  void load_source(int64_t q) {
    A* const to = group(q);
    const A* const below = q > 0 ? group(q - 1) : nullptr;
    for (int64_t d = 0; d < s_.width; ++d) {
      A* line = source_ + d * kGroup;
      if (below) std::memcpy(line, below + (d + 1) * kGroup - kSamples, kSamples * sizeof(A));
      else std::memset(line, 0, kSamples * sizeof(A));
      std::memcpy(line + kSamples, to + d * kGroup, (kGroup - kSamples) * sizeof(A));
    }
    ScalesOfGroup from;
    for (const auto numbers : {&ScalesOfGroup::exponent, &ScalesOfGroup::size}) {
      constexpr int kAbove = kGroup - kSamples;
      int32_t* const shifted = from.*numbers;
      for (int i = 0; i < kSamples; ++i)
        shifted[i] = below ? (scales_[q - 1].*numbers)[kAbove + i] : kNothing;
      std::memcpy(shifted + kSamples, scales_[q].*numbers, kAbove * sizeof(int32_t));
    }
    alignas(64) A own[kGroup], source[kGroup];
    for (int i = 0; i < kGroup; ++i)  // g, and what stands after it, has no row below
      if (q * kRows + i / kSamples >= rows_) from.size[i] = kNothing;
    if (fit(scales_[q], from, own, source)) scale(own, to), scale(source, source_);
    for (int64_t row = q * kRows; row < (q + 1) * kRows; ++row)
      if (row >= first_special()) add_itself(row);
  }

  void scale(const A* factors, A* lines) const {
    for (int64_t i = 0; i < s_.width * kGroup; i += kLanes)
      Stored<A>::store(lines + i,
                       Stored<A>::load(factors + i % kGroup) * Stored<A>::load(lines + i));
  }

  // The source of R is R + G_K; that of g is g, where the shift has brought another row; after g
  // there is nothing.
  void add_itself(int64_t row) const {
    const int64_t at = row % kRows * kSamples;
    const A* const from = lane(row);
    for (int64_t d = 0; d < s_.width; ++d)
      for (int64_t i = d * kGroup + at; i < d * kGroup + at + kSamples; ++i)
        source_[i] = row < rows_ ? source_[i] + from[i - at] : row == rows_ ? from[i - at] : 0;
  }

  // Notes how large the lanes of a group are.
  void measure(int64_t q) const {
    Tile<A> largest[kTiles]{};
    for (int64_t i = 0; i < s_.width * kTiles; ++i)
      raise(largest[i % kTiles], Stored<A>::load(group(q) + i * kLanes));
    note_sizes(q, largest);
  }
  static void raise(Tile<A>& largest, const Tile<A>& v) {
    largest = Tile<A>::map([&](int i) {
      const typename Tile<A>::Vector size = v.v[i] < 0 ? -v.v[i] : v.v[i];
      return size > largest.v[i] ? size : largest.v[i];
    });
  }
  void note_sizes(int64_t q, const Tile<A> (&largest)[kTiles]) const {
    alignas(64) A each[kGroup];
    for (int t = 0; t < kTiles; ++t) Stored<A>::store(each + t * kLanes, largest[t]);
    for (int i = 0; i < kGroup; ++i) scales_[q].size[i] = binary_order(each[i]);
  }

  // Measures of the rows, and the rows that are wanted.
  void store() {
    const A* const g = lane(rows_);
    const int32_t* const order = &scales_[rows_ / kRows].exponent[rows_ % kRows * kSamples];
    std::memset(total_, 0, kSamples * s_.width * sizeof(double));
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t i = 0; i < samples_; ++i) {
        const A* const from = lane(row) + i;
        const int32_t exponent = scales_[row / kRows].exponent[row % kRows * kSamples + i];
        const double relative = std::ldexp(1.0, order[i] - exponent);
        double square = 0, dot = 0;
        for (int64_t d = 0; d < s_.width; ++d) {
          const double v = from[d * kGroup];
          square += v * v, dot += v * g[d * kGroup + i];
          total_[i * s_.width + d] += v * relative;
        }
        const int64_t at = row * s_.batch + row_ + i;
        a_.log2_norms[at] = std::log2(square) / 2 - exponent;
        a_.dots[at] = std::ldexp(dot, -exponent - order[i]);
        if (a_.kept) store_row(row, i, static_cast<A*>(a_.kept) + at * s_.width);
        if (a_.tail && row == first_special())
          store_row(row, i, static_cast<A*>(a_.tail) + (row_ + i) * s_.width);
      }
    for (int64_t i = 0; i < samples_; ++i) {
      double off = 0, whole = 0;
      for (int64_t d = 0; d < s_.width; ++d) {
        const double v = g[d * kGroup + i], miss = total_[i * s_.width + d] - v;
        off += miss * miss, whole += v * v;
      }
      a_.norms[row_ + i] = std::ldexp(std::sqrt(off), -order[i]);
      a_.norms[s_.batch + row_ + i] = std::ldexp(std::sqrt(whole), -order[i]);
      store_row(rows_, i, static_cast<A*>(a_.gradient) + (row_ + i) * s_.width);
    }
  }

  void store_row(int64_t row, int64_t i, A* to) const {
    const int32_t exponent = scales_[row / kRows].exponent[row % kRows * kSamples + i];
    for (int64_t d = 0; d < s_.width; ++d)
      to[d] = static_cast<A>(std::ldexp(double(lane(row)[d * kGroup + i]), -exponent));
  }

  const Args& a_;
  const Shape& s_;
  const int64_t row_, samples_, rows_, groups_;
  A *const lines_, *const source_, *const hidden_, *const derivative_, *const w1_, *const w2_;
  double* const total_;          // [kSamples, D]: the sum of the rows, held as g is
  ScalesOfGroup* const scales_;  // [groups]
};

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
