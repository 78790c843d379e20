// cuda_tile: what is done with the products of a tile of samples and features while they are in
// registers: bias, activation, gate, residual and sums, and the same backwards. Used by the kernels
// of one layer and of the whole stack.
#pragma once
#include "../common/activation.h"
#include "../common/gpu_math.h"
#include "../common/gpu_memory.h"
#include "../common/gpu_tile.h"
#include "kernel.h"

namespace fastres::mlp_stack {

using gpu::Arithmetic;
using gpu::at;
using gpu::Columns;
using gpu::Corner;
using gpu::for_spots;
using gpu::Matrix;
using gpu::narrow;
using gpu::Pair;
using gpu::Products;
using gpu::Rows;
using gpu::rows_of;
using gpu::RowSums;
using gpu::Spot;
using gpu::tiles_of;
using gpu::widen;

template <class A> __device__ __forceinline__ Pair<A> scaled(A factor, const Pair<A>& v) {
  return {{gpu::product(factor, v.v[0]), gpu::product(factor, v.v[1])}};
}

template <class A> __device__ __forceinline__ Pair<A> plus(const Pair<A>& a, const Pair<A>& b) {
  return {{a.v[0] + b.v[0], a.v[1] + b.v[1]}};
}

// The gates of a thread's rows, from row `top` on; 1 without gates and beyond the batch.
template <class Tile> struct Gates {
  using A = typename Tile::A;
  A v[Tile::kRows];
  __device__ __forceinline__ Gates(const Weights& w, int64_t block, int64_t top, int64_t batch) {
    const int64_t first = top + gpu::first_row<Tile>();
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const int64_t row = first + 8 * r;
      v[r] = w.gate && row < batch
                 ? *at<A>(w.gate, block * w.gate_block_stride + row * w.gate_row_stride)
                 : A(1);
    }
  }
};

// z <- act(z + b1), of the tile's columns from `left` on.
template <class Tile>
__device__ __forceinline__ void activate(Products<Tile>& z, const Columns<Tile>& bias,
                                         Activation activation) {
  pick_activation(activation, [&](auto constant) {
    for_spots<Tile>([&](const Spot& s) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        z.at(s, e) = value<decltype(constant)::value>(z.at(s, e) + bias.v[s.j][e]);
    });
  });
}

// z <- act(z + b1) and q <- q * act'(z + b1); adds q * h to `dots`, with h the new z and q the old,
// of the first `cols` columns.
template <class Tile>
__device__ __forceinline__ void derive(Products<Tile>& z, Products<Tile>& q,
                                       const Columns<Tile>& bias, Activation activation, int cols,
                                       RowSums<Tile, 1>& dots) {
  using A = typename Tile::A;
  pick_activation(activation, [&](auto constant) {
    constexpr Activation kActivation = decltype(constant)::value;
    for_spots<Tile>([&](const Spot& s) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const A given = z.at(s, e) + bias.v[s.j][e], h = value<kActivation>(given);
        if (s.col + e < cols) dots.v[s.of_row()][0] += q.at(s, e) * h;
        q.at(s, e) *= derivative<kActivation>(given);
        z.at(s, e) = h;
      }
    });
  });
}

// x + p with p = gate * (f + b2) of a tile, to store(spot, pair); x is load(spot). Adds to the sums
// x * x, p * p, x * p. Of the tile, the first `rows` rows and `cols` columns are in the batch.
template <class Tile, class Load, class Store>
__device__ __forceinline__ void add_branch(Products<Tile>& f, const Columns<Tile>& bias,
                                           const Gates<Tile>& gate, int64_t rows, int cols,
                                           RowSums<Tile, 3>& sums, const Load& load,
                                           const Store& store) {
  using A = typename Tile::A;
  for_spots<Tile>([&](const Spot& s) {
    if (s.row >= rows || s.col >= cols) return;
    Pair<A> x = load(s);
    A(&sum)[3] = sums.v[s.of_row()];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (s.col + e >= cols) continue;
      const A p = gpu::product(gate.v[s.of_row()], f.at(s, e) + bias.v[s.j][e]);
      sum[0] += x.v[e] * x.v[e], sum[1] += p * p, sum[2] += x.v[e] * p;
      x.v[e] += p;
    }
    store(s, x);
  });
}

}  // namespace fastres::mlp_stack
