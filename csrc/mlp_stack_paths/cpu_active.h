// cpu_active: the weights of a block that the paths of one sample go through, those of the hidden
// features whose derivative is not 0. A ReLU leaves half of them, and half of the work.
#pragma once
#include "cpu_derivatives.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

template <class A> class Active {
  using Vector = typename Tile<A>::Vector;
  using Places = typename VectorOf<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>::type;
  static constexpr int kWidth = Tile<A>::kWidth;

 public:
  Active(const Args& a, Memory& memory)
      : a_(a),
        s_(a.shape),
        w2_(memory.take<A>(s_.width * hidden_stride(s_))),
        w1_(memory.take<A>(s_.hidden * width_stride(s_))),
        slopes_(memory.take<A>(hidden_stride(s_))),
        which_(memory.take<int32_t>(hidden_stride(s_))),
        moves_(memory.take<Move>(ceil_div(s_.hidden, kWidth))) {}

  void choose(int64_t block, int64_t sample) {
    find(block, sample);
    const int64_t matrix = (s_.shared ? 0 : block) * s_.width * s_.hidden;
    keep_columns(static_cast<const A*>(a_.weights.w2) + matrix);
    keep_rows(static_cast<const A*>(a_.weights.w1) + matrix);
  }

  int64_t count() const { return count_; }
  const A* w2() const { return w2_; }          // [D, hidden_stride], of which `count` columns
  const A* w1() const { return w1_; }          // [count, width_stride]
  const A* slopes() const { return slopes_; }  // [count], gate * act'(z)

 private:
  // Of kWidth features side by side: where those to be kept stand, and where they go.
  struct Move {
    Places from;
    int64_t to;
  };

  void find(int64_t block, int64_t sample) {
    const Derivatives<A> given(a_, block, sample / kLanes);
    const int64_t lane = sample % kLanes;
    const A gate = gate_of<A>(a_.weights, block, sample);
    count_ = 0;
    for (int64_t first = 0; first < s_.hidden; first += kWidth) {
      Move& move = moves_[first / kWidth];
      move.to = count_;
      for (int64_t h = first; h < least(first + kWidth, s_.hidden); ++h) {
        const A slope = are_bits(s_) ? (given.bits()[h] >> lane & 1 ? gate : 0)
                                     : gate * given.values()[h * kLanes + lane];
        move.from[count_ - move.to] = h - first;  // to be overwritten, where it is not kept
        which_[count_] = static_cast<int32_t>(h);
        slopes_[count_] = slope;
        count_ += slope != 0;  // no jump, as nothing could foretell it
      }
    }
  }

  // Moves whole vectors, of which the next one overwrites what is not wanted.
  void keep_columns(const A* from) const {
    const int64_t whole = s_.hidden / kWidth,
                  rest = whole * kWidth < s_.hidden ? moves_[whole].to : count_;
    for (int64_t d = 0; d < s_.width; ++d) {
      const A* const row = from + d * s_.hidden;
      A* const to = w2_ + d * hidden_stride(s_);
      for (int64_t i = 0; i < whole; ++i) {
        Vector v;
        std::memcpy(&v, row + i * kWidth, sizeof v);
        v = picked(v, moves_[i].from);
        std::memcpy(to + moves_[i].to, &v, sizeof v);
      }
      for (int64_t i = rest; i < count_; ++i) to[i] = row[which_[i]];
    }
  }

  void keep_rows(const A* from) const {
    for (int64_t i = 0; i < count_; ++i) {
      const A* const row = from + which_[i] * s_.width;
      A* const to = w1_ + i * width_stride(s_);
      for (int64_t d = 0; d < s_.width; d += kLanes)
        Stored<A>::store(to + d, load(row + d, least(kLanes, s_.width - d)));
    }
  }

  FASTRES_HD static Vector picked(const Vector& v, const Places& from) {
#if defined(__clang__)
    Vector some;
    for (int i = 0; i < kWidth; ++i) some[i] = v[from[i] & (kWidth - 1)];
    return some;
#else
    return __builtin_shuffle(v, from);
#endif
  }

  const Args& a_;
  const Shape& s_;
  A *const w2_, *const w1_, *const slopes_;
  int32_t* const which_;  // [count]
  Move* const moves_;     // [ceil(H / kWidth)]
  int64_t count_ = 0;
};

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
