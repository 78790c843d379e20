// cpu_product: the product that all of mlp_stack is made of, a few rows of a matrix times vectors
// of samples, and what brings tensors into its layout and back.
#pragma once
#include <vector>

#include "../common/tile_math.h"
#include "cpu.h"

namespace fastres::mlp_stack::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

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
// sums stay in registers. in: [count, in_stride]; out: [kRows, out_stride]; bias null: 0.
template <int kRows, int kTiles, class W, class A>
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
    for (int t = 0; t < kTiles; ++t) Stored<A>::store(out + r * out_stride + t * kLanes, sum[r][t]);
}

// The same for any number of rows. What becomes of the product is a pass of its own, over numbers
// that are in the nearest cache: 3 % of the time of a product of 64 columns.
template <int kTiles, class W, class A>
void product(int64_t rows, const W& w, const A* bias, const A* in, int64_t in_stride, int64_t count,
             A* out, int64_t out_stride) {
  constexpr int kMost = kRowsAtOnce<A, kTiles>;
  const auto some = [&](auto size, int64_t r) {
    product_of_rows<decltype(size)::value, kTiles>(w.from_row(r), bias ? bias + r : nullptr, in,
                                                   in_stride, count, out + r * out_stride,
                                                   out_stride);
  };
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) some(std::integral_constant<int, kMost>(), r);
  for (; r < rows; ++r) some(std::integral_constant<int, 1>(), r);
}

// 64 KiB: as far ahead as weights are fetched into the second cache.
constexpr int64_t kMostAhead = 16384;

// Copies elements of one type to another.
template <class From, class To> void move(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = least(kLanes, count - i);
    store(to + i, load(from + i, n), n);
  }
}

// A member's weights in the accumulate type: where they are, or widened to a buffer of its own.
template <class T> class Widened {
  using A = typename Stored<T>::A;
  static constexpr bool kInPlace = std::is_same_v<T, A>;

 public:
  // `most` columns; `matrix`: elements of a block's matrix, which are fetched while those of the
  // block before it are used, unless they would take too much of the second cache.
  Widened(int64_t most, int64_t matrix, int direction = 1)
      : ahead_(direction * least(matrix, kMostAhead)), buffer_(kInPlace ? 0 : kChunk * most) {}

  // `rows` rows of `cols` elements; and the same by columns of a matrix, as its transpose.
  Rows<A> rows(const T* from, int64_t rows, int64_t cols) {
    if constexpr (kInPlace) return {from, cols, ahead_};
    else return {widen(from, cols, rows, cols, buffer_.data()), cols};
  }
  Columns<A> columns(const T* from, int64_t stride, int64_t rows, int64_t cols) {
    if constexpr (kInPlace) return {from, stride, ahead_};
    else return {widen(from, stride, rows, cols, buffer_.data()), cols};
  }
  const A* bias(const T* from, int64_t size) {
    if constexpr (kInPlace) return from;
    else return widen(from, 0, 1, size, bias_);
  }

 private:
  static const A* widen(const T* from, int64_t stride, int64_t rows, int64_t cols, A* to) {
    for (int64_t r = 0; r < rows; ++r) move(from + r * stride, to + r * cols, cols);
    return to;
  }
  const int64_t ahead_;
  std::vector<A> buffer_;
  A bias_[kInPlace ? 1 : kChunk];
};

// Four vectors of four, transposed.
template <class A> FASTRES_HD void transpose4(const A* from, int64_t step, A* to, int64_t to_step) {
  using Four = typename Packed<A, 4>::type;
  using Index = typename Packed<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, 4>::type;
  Four v[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&v[i], from + i * step, sizeof(Four));
#if defined(__clang__)
#define FASTRES_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTRES_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif
  const Four low = FASTRES_SHUFFLE(v[0], v[1], 0, 4, 1, 5),
             high = FASTRES_SHUFFLE(v[0], v[1], 2, 6, 3, 7),
             low2 = FASTRES_SHUFFLE(v[2], v[3], 0, 4, 1, 5),
             high2 = FASTRES_SHUFFLE(v[2], v[3], 2, 6, 3, 7);
  const Four out[4] = {
      FASTRES_SHUFFLE(low, low2, 0, 1, 4, 5), FASTRES_SHUFFLE(low, low2, 2, 3, 6, 7),
      FASTRES_SHUFFLE(high, high2, 0, 1, 4, 5), FASTRES_SHUFFLE(high, high2, 2, 3, 6, 7)};
#undef FASTRES_SHUFFLE
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_step, &out[i], sizeof(Four));
}
template <class A> void transpose16(const A* from, int64_t step, A* to, int64_t to_step) {
  for (int i = 0; i < kLanes; i += 4)
    for (int j = 0; j < kLanes; j += 4)
      transpose4(from + i * step + j, step, to + j * to_step + i, to_step);
}

// to [features, stride], samples in its first lanes  <-  rows [samples, row_stride]; lanes up to
// `lanes`, a multiple of 16, without a sample become 0.
template <class T, class A>
void load_samples(const T* rows, int64_t row_stride, int64_t samples, int64_t features, A* to,
                  int64_t stride, int64_t lanes) {
  alignas(64) A block[kLanes * kLanes], turned[kLanes * kLanes];
  for (int64_t s = 0; s < lanes; s += kLanes)
    for (int64_t c = 0; c < features; c += kLanes) {
      const int64_t n = features - c < kLanes ? features - c : kLanes;
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
      const int64_t n = features - c < kLanes ? features - c : kLanes;
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

}  // namespace fastres::mlp_stack::FASTRES_ISA
