// tile_product: the product that a stack is made of, a few rows of a matrix times vectors of
// samples, and what brings tensors into its layout and back.
#pragma once
#include <utility>

#include "stack.h"
#include "tile_math.h"

namespace fastres::FASTRES_ISA {

FASTRES_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(__AVX512F__)
constexpr int kAccumulators = 16;  // registers, of 32: 2 multiply-adds a cycle with a latency of 4
#else
constexpr int kAccumulators = 8;  // of 16
#endif
// Tiles side by side, and rows at once, such that their sums stay in registers: in float32 8 rows
// of 2 tiles with AVX-512 (a weight then serves two multiply-adds), 4 of 1 with AVX2. No more than
// 8, as each has a pointer.
template <class A> constexpr int kWide = kAccumulators / Tile<A>::kCount >= 16 ? 2 : 1;
template <class A, int kTiles>
constexpr int kRowsAtOnce =
    kAccumulators / Tile<A>::kCount / kTiles < 1   ? 1
    : kAccumulators / Tile<A>::kCount / kTiles < 8 ? kAccumulators / Tile<A>::kCount / kTiles
                                                   : 8;

// A matrix that is read a few rows at a time: element (r, k) is at[r * stride + k], or, of a
// transpose, at[k * stride + r].
template <class A, bool kTransposed> struct Matrix {
  const A* at;
  int64_t stride;
  int64_t ahead = 0;  // elements from one that is read to one to be fetched for later
  FASTRES_HD const A& operator()(int64_t r, int64_t k) const {
    return kTransposed ? at[k * stride + r] : at[r * stride + k];
  }
  Matrix from_row(int64_t r) const { return {&(*this)(r, 0), stride, ahead}; }
  // Fetches, into the second cache, what is `ahead` of columns [k, k + 4) of `rows` rows; where
  // rows lie one after the other it goes along them. Without it a stack of 64 features and 16
  // samples takes twice the time: a product is over before the cache sees a pattern.
  FASTRES_HD void fetch(int64_t k, int rows) const {
    if constexpr (kTransposed) {
      for (int i = 0; i < 4; ++i) __builtin_prefetch(at + (k + i) * stride + ahead, 0, 2);
    } else {
      for (int i = 0; i < 4 * rows; i += 64 / sizeof(A))
        __builtin_prefetch(at + k * rows + i + ahead, 0, 2);
    }
  }
};
template <class A> using Rows = Matrix<A, false>;
template <class A> using Columns = Matrix<A, true>;

// out[r][t] = bias[r] + sum_k w(r, k) in[k][t], k in order, for kRows rows and kTiles tiles, whose
// sums stay in registers. in: [count, in_stride]; out: [kRows, out_stride], to be added to if kAdd;
// bias null: 0.
template <int kRows, int kTiles, bool kAdd, class W, class A>
FASTRES_HD void product_of_rows(const W& w, const A* bias, const A* in, int64_t in_stride,
                                int64_t count, A* out, int64_t out_stride) {
  Tile<A> sum[kRows][kTiles];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) sum[r][t] = Math<Tile<A>>::of(bias ? bias[r] : 0);
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Tile<A> v[kTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) v[t] = Stored<A>::load(in + k * in_stride + t * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const A weight = w(r, k);
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) sum[r][t] += weight * v[t];
    }
  };
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {  // 4: the pointers move on every fourth step
    w.fetch(k, kRows);
    step(k);
    step(k + 1);
    step(k + 2);
    step(k + 3);
  }
  for (; k < count; ++k) step(k);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
      A* place = out + r * out_stride + t * kLanes;
      Stored<A>::store(place, kAdd ? Stored<A>::load(place) + sum[r][t] : sum[r][t]);
    }
}

// The same for any number of rows. What becomes of the product is a pass of its own, over numbers
// that are in the nearest cache: 3 % of the time of a product of 64 columns.
template <int kTiles, bool kAdd = false, class W, class A>
void product(int64_t rows, const W& w, const A* bias, const A* in, int64_t in_stride, int64_t count,
             A* out, int64_t out_stride) {
  constexpr int kMost = kRowsAtOnce<A, kTiles>;
  const auto some = [&](auto size, int64_t r) {
    product_of_rows<decltype(size)::value, kTiles, kAdd>(w.from_row(r), bias ? bias + r : nullptr,
                                                         in, in_stride, count, out + r * out_stride,
                                                         out_stride);
  };
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) some(std::integral_constant<int, kMost>(), r);
  for (; r < rows; ++r) some(std::integral_constant<int, 1>(), r);
}

// Copies elements of one type to another.
template <class From, class To> void move(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Stored<To>::store(to + i, Stored<From>::load(from + i));
  if (i < count) store(to + i, load(from + i, count - i), count - i);
}

// Four vectors, each kQuads times four elements side by side: of each four of fours, the transpose.
template <class A, int kQuads> struct Quads {
  static constexpr int kCount = 4 * kQuads;
  using Vector = typename Packed<A, kCount>::type;
  using Index = typename Packed<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, kCount>::type;
  Vector v[4];

  // Element i of a shuffle of two vectors, given those of the first four: 0 to 3 from a, else b.
  template <int... kFour> static constexpr int place(int i) {
    constexpr int four[4] = {kFour...};
    const int at = four[i % 4];
    return (at < 4 ? at : kCount + at - 4) + i / 4 * 4;
  }
  template <int... kFour, size_t... kAt>
  FASTRES_HD static Vector shuffle(const Vector& a, const Vector& b, std::index_sequence<kAt...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, place<kFour...>(kAt)...);
#else
    return __builtin_shuffle(a, b, Index{place<kFour...>(kAt)...});
#endif
  }
  template <int... kFour> FASTRES_HD static Vector shuffle(const Vector& a, const Vector& b) {
    return shuffle<kFour...>(a, b, std::make_index_sequence<kCount>());
  }
  FASTRES_HD Quads transposed() const {
    const Vector low = shuffle<0, 4, 1, 5>(v[0], v[1]), high = shuffle<2, 6, 3, 7>(v[0], v[1]),
                 low2 = shuffle<0, 4, 1, 5>(v[2], v[3]), high2 = shuffle<2, 6, 3, 7>(v[2], v[3]);
    return {{shuffle<0, 1, 4, 5>(low, low2), shuffle<2, 3, 6, 7>(low, low2),
             shuffle<0, 1, 4, 5>(high, high2), shuffle<2, 3, 6, 7>(high, high2)}};
  }
};

// Fours of consecutive elements, `step` elements apart, side by side in a vector. By hand, as
// compilers take them through memory.
template <class V, class A> FASTRES_HD V side_by_side(const A* from,
                                                      [[maybe_unused]] int64_t step) {
  V v;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return (V)_mm512_insertf32x8(_mm512_castps256_ps512(side_by_side<__m256>(from, step)),
                                 side_by_side<__m256>(from + 2 * step, step), 1);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32 && sizeof(A) == 4)
    return (V)_mm256_set_m128(_mm_loadu_ps(from + step), _mm_loadu_ps(from));
#endif
  std::memcpy(&v, from, sizeof v);
  return v;
}

// 16 by 16 elements. Fours are put side by side on their way into a register: that leaves half of
// the shuffles to do.
template <class A>
FASTRES_HD void transpose16(const A* from, int64_t step, A* to, int64_t to_step) {
  constexpr int kQuads = sizeof(A) == 4 ? kVectorBytes / 16 : 1;
  using Block = Quads<A, kQuads>;
  for (int i = 0; i < kLanes; i += Block::kCount)
    for (int j = 0; j < kLanes; j += 4) {
      Block block;
      for (int r = 0; r < 4; ++r)
        block.v[r] = side_by_side<typename Block::Vector>(from + (i + r) * step + j, 4 * step);
      block = block.transposed();
      for (int r = 0; r < 4; ++r)
        std::memcpy(to + (j + r) * to_step + i, &block.v[r], sizeof block.v[r]);
    }
}

// to [features, stride], samples in its first lanes  <-  rows [samples, row_stride]; lanes up to
// `lanes`, a multiple of 16, without a sample become 0.
template <class T, class A>
void load_samples(const T* rows, int64_t row_stride, int64_t samples, int64_t features, A* to,
                  int64_t stride, int64_t lanes) {
  alignas(64) A block[kLanes * kLanes], turned[kLanes * kLanes];
  for (int64_t s = 0; s < lanes; s += kLanes)
    for (int64_t c = 0; c < features; c += kLanes) {
      const int64_t n = least(kLanes, features - c);
      if constexpr (std::is_same_v<T, A>)
        if (n == kLanes && s + kLanes <= samples) {
          transpose16(rows + s * row_stride + c, row_stride, to + c * stride + s, stride);
          continue;
        }
      for (int64_t i = 0; i < kLanes; ++i)
        Stored<A>::store(block + i * kLanes,
                         s + i < samples ? load(rows + (s + i) * row_stride + c, n) : Tile<A>{});
      if (n == kLanes) {
        transpose16(block, kLanes, to + c * stride + s, stride);
      } else {
        transpose16(block, kLanes, turned, kLanes);
        for (int64_t i = 0; i < n; ++i)
          Stored<A>::store(to + (c + i) * stride + s, Stored<A>::load(turned + i * kLanes));
      }
    }
}

// rows [samples, row_stride]  <-  from [features, stride].
template <class T, class A>
void store_samples(const A* from, int64_t stride, int64_t samples, int64_t features, T* rows,
                   int64_t row_stride) {
  alignas(64) A turned[kLanes * kLanes];
  for (int64_t s = 0; s < samples; s += kLanes)
    for (int64_t c = 0; c < features; c += kLanes) {
      const int64_t n = least(kLanes, features - c);
      if constexpr (std::is_same_v<T, A>)
        if (n == kLanes && s + kLanes <= samples) {
          transpose16(from + c * stride + s, stride, rows + s * row_stride + c, row_stride);
          continue;
        }
      if (n == kLanes) {
        transpose16(from + c * stride + s, stride, turned, kLanes);
      } else {
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < kLanes; ++j)
            turned[j * kLanes + i] = from[(c + i) * stride + s + j];
      }
      for (int64_t i = 0; i < kLanes && s + i < samples; ++i)
        store(rows + (s + i) * row_stride + c, Stored<A>::load(turned + i * kLanes), n);
    }
}

template <class A> A gate_of(const StackWeights& w, int64_t block, int64_t sample) {
  if (!w.gate) return A(1);
  return static_cast<const A*>(w.gate)[block * w.gate_block_stride + sample * w.gate_row_stride];
}

// The gate of a block for the samples of a group.
template <class A, int kTiles> struct GateTiles {
  Tile<A> v[kTiles];
  GateTiles(const StackWeights& w, int64_t block, int64_t first, int64_t size) {
    for (int t = 0; t < kTiles; ++t) v[t] = Math<Tile<A>>::of(1);
    if (!w.gate) return;
    alignas(64) A each[kTiles * kLanes];
    for (int64_t i = 0; i < kTiles * kLanes; ++i)
      each[i] = i < size ? gate_of<A>(w, block, first + i) : A(1);
    for (int t = 0; t < kTiles; ++t) v[t] = Stored<A>::load(each + t * kLanes);
  }
};

}  // namespace fastres::FASTRES_ISA
