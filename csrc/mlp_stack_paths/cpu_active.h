// cpu_active: the weights of a block that the paths of one sample go through, those of the hidden
// features whose derivative is not 0. A ReLU leaves half of them, and half of the work.
#pragma once
#include "cpu_derivatives.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

template <class A> class Active {
  using Vector = typename Tile<A>::Vector;
  static constexpr int kWidth = Tile<A>::kWidth;

 public:
  Active(const Args& a, Memory& memory)
      : a_(a),
        s_(a.shape),
        columns_(memory.take<A>(s_.width * hidden_stride(s_))),
        rows_(memory.take<A>(s_.hidden * width_stride(s_))),
        slopes_(memory.take<A>(hidden_stride(s_))),
        w1_(memory.take<const A*>(s_.hidden)),
        which_(memory.take<int32_t>(hidden_stride(s_))),
        places_(memory.take<int32_t>(hidden_stride(s_))) {}

  // For so many cotangents.
  void choose(int64_t block, int64_t sample, int64_t cotangents) {
    find(block, sample);
    const int64_t set = s_.shared ? 0 : block, matrix = set * s_.width * s_.hidden;
    const A *const w1 = in<A>(a_.weights.w1, matrix), *const w2 = in<A>(a_.weights.w2, matrix);
    if (set_of_rows_ != set) copy(w1, s_.hidden, s_.width, rows_, width_stride(s_));
    set_of_rows_ = set;
    for (int64_t i = 0; i < count_; ++i) w1_[i] = rows_ + which_[i] * width_stride(s_);
    all_ = cotangents < kWorthChoosing || count_ == s_.hidden;
    if (!all_) keep_columns(w2);
    else if (set_of_columns_ != set) copy(w2, s_.width, s_.hidden, columns_, hidden_stride(s_));
    set_of_columns_ = all_ ? set : -1;
    picks_ = all_ && count_ < s_.hidden;
  }

  int64_t count() const { return count_; }
  // Row d of W2, in which `columns` stand: those of the features, or of all.
  auto w2() const {
    return [from = columns_, stride = hidden_stride(s_)](int64_t d) { return from + d * stride; };
  }
  int64_t columns() const { return all_ ? s_.hidden : count_; }
  // Row i of W1, that of feature i.
  auto w1() const {
    return [rows = w1_](int64_t i) { return rows[i]; };
  }

  // Of vector v of a product with w2 what belongs to the features, times their slopes, gate *
  // act'(z), to where they are in [hidden_stride]. For vectors in their order, as the next one
  // overwrites what is not wanted.
  void store(A* to, int64_t v, const Vector& product) const {
    const int64_t place = picks_ ? places_[v] : v * kWidth;
    Vector slope, kept = picks_ ? picked(product, which_ + place) : product;
    std::memcpy(&slope, slopes_ + place, sizeof slope);
    kept *= slope;
    std::memcpy(to + place, &kept, sizeof kept);
  }

 private:
  // With fewer, a product with all columns and a choice from what comes out takes less time.
  static constexpr int64_t kWorthChoosing = 12;

  void find(int64_t block, int64_t sample) {
    const Derivatives<A> given(a_, block, sample / kLanes);
    const int64_t lane = sample % kLanes;
    const A gate = gate_of<A>(a_.weights, block, sample);
    int64_t count = 0;
    for (int64_t h = 0; h < s_.hidden; h += 4) {
      const unsigned some = gate == 0 ? 0 : four(given, lane, h);
      for (int i = 0; i < 4; ++i)
        if ((h + i) % kWidth == 0)
          places_[(h + i) / kWidth] = static_cast<int32_t>(count + kSize[some & ((1 << i) - 1)]);
      const Four which = kPlaces[some] + static_cast<int32_t>(h);
      std::memcpy(which_ + count, &which, sizeof which);
      count += kSize[some];
    }
    count_ = count;
    for (int64_t i = 0; i < count; ++i)
      slopes_[i] = are_bits(s_) ? gate : gate * given.values()[which_[i] * kLanes + lane];
  }

  // A bit for each of four features: whether it has a derivative.
  unsigned four(const Derivatives<A>& given, int64_t lane, int64_t h) const {
    const int64_t n = least(4, s_.hidden - h);
    unsigned some = 0;
    if (are_bits(s_))
      for (int i = 0; i < n; ++i) some |= (given.bits()[h + i] >> lane & 1u) << i;
    else
      for (int i = 0; i < n; ++i)
        some |= unsigned(given.values()[(h + i) * kLanes + lane] != 0) << i;
    return some;
  }

  void keep_columns(const A* from) const {
    const int32_t *const which = which_, *const places = places_;
    const int64_t whole = s_.hidden / kWidth, count = count_, stride = hidden_stride(s_),
                  rest = whole * kWidth < s_.hidden ? places[whole] : count;
    A* to = columns_;
    for (int64_t d = 0; d < s_.width; ++d, from += s_.hidden, to += stride) {
      for (int64_t v = 0; v < whole; ++v) {
        Vector columns;
        std::memcpy(&columns, from + v * kWidth, sizeof columns);
        columns = picked(columns, which + places[v]);
        std::memcpy(to + places[v], &columns, sizeof columns);
      }
      for (int64_t i = rest; i < count; ++i) to[i] = from[which[i]];
    }
  }

  // [height, width] to rows that stand apart, with zeros up to a whole tile.
  static void copy(const A* from, int64_t height, int64_t width, A* to, int64_t stride) {
    for (int64_t i = 0; i < height; ++i)
      for (int64_t k = 0; k < width; k += kLanes)
        Stored<A>::store(to + i * stride + k, load(from + i * width + k, least(kLanes, width - k)));
  }

  // Of a vector of features some, given by the last bits of their indices.
  static Vector picked(const Vector& v, const int32_t* which) {
    using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    typename Packed<int32_t, kWidth>::type at;
    std::memcpy(&at, which, sizeof at);
    const auto from = __builtin_convertvector(at, typename VectorOf<Index>::type);
#if defined(__clang__)
    Vector some;
    for (int i = 0; i < kWidth; ++i) some[i] = v[from[i] & (kWidth - 1)];
    return some;
#else
    return __builtin_shuffle(v, from);
#endif
  }

  // Of the set bits of four: how many, and where they are.
  using Four = Packed<int32_t, 4>::type;
  static constexpr int32_t kSize[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
  static constexpr Four kPlaces[16] = {{},     {0},       {1},       {0, 1},      {2},    {0, 2},
                                       {1, 2}, {0, 1, 2}, {3},       {0, 3},      {1, 3}, {0, 1, 3},
                                       {2, 3}, {0, 2, 3}, {1, 2, 3}, {0, 1, 2, 3}};

  const Args& a_;
  const Shape& s_;
  A *const columns_, *const rows_, *const slopes_;  // [D, hidden_stride], [H, width_stride]
  const A** const w1_;                              // [count]
  int32_t *const which_, *const places_;            // [count]; of each vector of features its first
  int64_t set_of_rows_ = -1, set_of_columns_ = -1;  // whose weights are copied, all of them
  int64_t count_ = 0;
  bool all_ = false, picks_ = false;  // all columns; some of what comes out
};

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
