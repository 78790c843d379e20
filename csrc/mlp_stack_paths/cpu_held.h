// cpu_held: the rows of one sample, each held with a power of two of its own.
#pragma once
#include "cpu.h"
#include "cpu_exponents.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

// The largest of some numbers, as an integer: of positive numbers the bits are in their order.
template <class A> class Largest {
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using Vector = typename Tile<A>::Vector;
  static constexpr int kWidth = Tile<A>::kWidth;

 public:
  FASTRES_HD void raise(const Vector& v) {
    const auto size = (typename VectorOf<Bits>::type)v & std::numeric_limits<Bits>::max();
    bits_ = size > bits_ ? size : bits_;
  }
  FASTRES_HD int32_t order() const { return order_of<kWidth>(bits_); }

 private:
  template <int N> FASTRES_HD static int32_t order_of(const typename Packed<Bits, N>::type& v) {
    if constexpr (N == 1) {
      return binary_order<A>(v[0]);
    } else {
      using Half = typename Packed<Bits, N / 2>::type;
      const Half a = half_of<Half>(v, 0), b = half_of<Half>(v, 1);
      return order_of<N / 2>(a > b ? a : b);
    }
  }

  typename VectorOf<Bits>::type bits_{};
};

// G_0, ... G_K, R where there is a tail, g.
template <class A> struct Held {
  A* lines;  // [rows + 1, width_stride], zeros beyond D
  Scale* scales;
  int64_t count, width, stride;

  Held(const Shape& s, Memory& memory)
      : lines(memory.take<A>((s.rows() + 1) * width_stride(s))),
        scales(memory.take<Scale>(s.rows() + 1)),
        count(s.rows() + 1),
        width(s.width),
        stride(width_stride(s)) {}

  A* line(int64_t row) const { return lines + row * stride; }

  // G_0 and g are the cotangent, [D].
  void load(const A* cotangent) const {
    std::memset(lines, 0, count * stride * sizeof(A));
    for (int64_t row = 0; row < count; ++row) scales[row] = {0, kNothing};
    for (const int64_t row : {int64_t(0), count - 1}) {
      std::memcpy(line(row), cotangent, width * sizeof(A));
      scales[row] = fill(line(row), 0, [&](int64_t d) { return at(line(row), d); });
      fit(row);
    }
  }

  void fit(int64_t row) const {
    const int32_t to = fitting(scales[row], {0, kNothing}), by = to - scales[row].exponent;
    const A factor = power_of_two<A>(by);
    if (by) scales[row] = fill(line(row), to, [&](int64_t d) { return factor * at(line(row), d); });
  }

  // to <- a row and other numbers, [width_stride], held so that the larger one fits.
  Scale sum(int64_t row, const A* other, const Scale& of_other, A* to) const {
    const int32_t exponent = of_sum(scales[row], of_other);
    const A own = power_of_two<A>(exponent - scales[row].exponent),
            factor = power_of_two<A>(exponent - of_other.exponent);
    return fill(to, exponent,
                [&](int64_t d) { return own * at(line(row), d) + factor * at(other, d); });
  }

  // The true numbers, zero where they are below the range of A.
  void store(int64_t row, A* to) const {
    for (int64_t d = 0; d < width; ++d)
      to[d] = static_cast<A>(std::ldexp(double(line(row)[d]), -scales[row].exponent));
  }

 private:
  FASTRES_HD static Tile<A> at(const A* from, int64_t d) { return Stored<A>::load(from + d); }

  // to <- tile(d) for each tile of a line, held by an exponent.
  template <class OfTile> Scale fill(A* to, int32_t exponent, const OfTile& tile) const {
    Largest<A> largest;
    for (int64_t d = 0; d < stride; d += kLanes) {
      const Tile<A> v = tile(d);
      Stored<A>::store(to + d, v);
      for (int i = 0; i < Tile<A>::kCount; ++i) largest.raise(v.v[i]);
    }
    return {exponent, largest.order()};
  }
};

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
