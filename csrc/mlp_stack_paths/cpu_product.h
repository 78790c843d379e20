// cpu_product: rows times a matrix, whose own rows may be anywhere and are read in vectors.
#pragma once
#include "../common/tile_product.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

// Rows whose sums stay in registers beside two vectors of the matrix.
constexpr int kRowsOfTwo = kVectorBytes == 64 ? 8 : 6;

// Calls use(r, v, sum) with sum = sum_k in[r][k] * w(k)[v], k < count in order, for kRows rows and
// kVectors vectors from `first` on, which stay in registers.
template <int kRows, int kVectors, class A, class W, class Use>
FASTRES_HD void product_of_vectors(const A* const* in, const W& w, int64_t count, int64_t row,
                                   int64_t first, const Use& use) {
  using Vector = typename Tile<A>::Vector;
  constexpr int kWidth = Tile<A>::kWidth;
  Vector sum[kRows][kVectors] = {};
  const A* from[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) from[r] = in[row + r];
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) {
    const A* const at = w(k) + first * kWidth;
    Vector v[kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) std::memcpy(&v[i], at + i * kWidth, sizeof v[i]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const A number = from[r][k];
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) sum[r][i] += number * v[i];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) use(row + r, first + i, sum[r][i]);
}

// The same for any number of rows and of vectors.
template <class A, class W, class Use>
FASTRES_HD void rows_times(const A* const* in, int64_t rows, const W& w, int64_t count,
                           int64_t vectors, const Use& use) {
  const auto some_vectors = [&](auto wide, int64_t first) {
    constexpr int kVectors = decltype(wide)::value, kMost = kVectors == 2 ? kRowsOfTwo : 8;
    int64_t r = 0;
    const auto some_rows = [&](auto high) {
      constexpr int kRows = decltype(high)::value;
      for (; r + kRows <= rows; r += kRows)
        product_of_vectors<kRows, kVectors>(in, w, count, r, first, use);
    };
    some_rows(std::integral_constant<int, kMost>());
    if constexpr (kMost > 4) some_rows(std::integral_constant<int, 4>());
    if constexpr (kMost > 2) some_rows(std::integral_constant<int, 2>());
    some_rows(std::integral_constant<int, 1>());
  };
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2) some_vectors(std::integral_constant<int, 2>(), v);
  if (v < vectors) some_vectors(std::integral_constant<int, 1>(), v);
}

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
