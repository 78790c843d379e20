// cuda_weights: the gradients of weights and biases of many blocks on CUDA, in one launch:
//   W1' = dz^T x, b1' = sum of dz, W2' = (gate g)^T h, b2' = sum of gate g, sums over the samples.
// Where the blocks share their weights, groups of blocks are summed up first, and then the groups.
#pragma once
#include "cuda_layers.h"

namespace fastres::mlp_stack {

// Elements of one set of gradients: W1', W2', b1', b2'.
inline int64_t gradient_size(const Shape& s) { return 2 * s.width * s.hidden + s.hidden + s.width; }
// Tiles of W1', and of W2'.
template <class Tile> int64_t gradient_tiles(const Shape& s) {
  return ceil_div(s.width, Tile::kN) * ceil_div(s.hidden, Tile::kM);
}
// Groups of blocks of shared weights, each summed up by itself: for 132 SMs times 4, no more. Fewer
// blocks never make more of them, so that scratch for many blocks serves few.
inline int64_t groups_of(const Shape& s, int64_t blocks) {
  const int64_t tiles = 2 * gradient_tiles<LayerTile<Arithmetic<float, false>>>(s);
  const int64_t most = ceil_div(gpu::kMultiprocessors * 4, tiles);
  return most < blocks ? most : blocks;
}

template <class Tile> struct GradientArgs {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const T *x, *gated, *h, *dz;  // [blocks, B, D] twice, [blocks, B, H] twice
  int64_t batch;
  int width, hidden;
  int64_t blocks, groups;
  T *gw1, *gb1, *gw2, *gb2;  // [blocks, ...]; or null: a group has one block
  A* parts;                  // [groups, gradient_size]; or null
  int64_t size;              // gradient_size
};

// The tile at [row, col] of (rows of) left^T right over the samples of blocks [first, last).
template <class Tile>
__device__ __forceinline__ void add_gradients(Products<Tile>& sums, typename Tile::A& bias,
                                              Matrix<typename Tile::T> left,
                                              Matrix<typename Tile::T> right, int64_t row,
                                              int64_t col, int64_t first, int64_t last) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const bool wants_bias = col == 0 && threadIdx.x < Tile::kM;
  left.data += first * left.rows * left.cols, right.data += first * right.rows * right.cols;
  for (int64_t block = first; block < last; ++block) {
    gpu::add_product<false, false>(sums, gpu::dynamic_shared(), left, row, right, col,
                                   [&](const gpu::Panel<T, false>& panel) {
                                     if (!wants_bias) return;
                                     A sum = 0;
#pragma unroll 4  // of two warps, once per panel: not worth the registers
                                     for (int k = 0; k < gpu::kDepth<T>; ++k)
                                       sum += widen(*panel.at(threadIdx.x, k));
                                     bias += sum;
                                   });
    left.data += left.rows * left.cols, right.data += right.rows * right.cols;
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerSm)
    gradient_kernel(GradientArgs<Tile> a) {  // grid: tiles of W1' and of W2', for each group
  using T = typename Tile::T;
  using A = typename Tile::A;
  static_assert(Tile::kM == Tile::kN && Tile::kThreads >= Tile::kM, "as many tiles of each");
  const int64_t wide = ceil_div(a.width, Tile::kN), high = ceil_div(a.hidden, Tile::kM);
  int64_t tile = blockIdx.x % (2 * wide * high);
  const int64_t group = blockIdx.x / (2 * wide * high);
  const bool second = tile >= wide * high;  // of W2'
  if (second) tile -= wide * high;
  const int64_t tiles = second ? high : wide;  // in a row
  const int64_t row = tile / tiles * Tile::kM, col = tile % tiles * Tile::kN;
  const Matrix<T> gated{a.gated, a.batch, a.width}, h{a.h, a.batch, a.hidden},
      x{a.x, a.batch, a.width}, dz{a.dz, a.batch, a.hidden};
  const int64_t first = group * a.blocks / a.groups, last = (group + 1) * a.blocks / a.groups;
  Products<Tile> sums;
  A bias = 0;
  add_gradients(sums, bias, second ? gated : dz, second ? h : x, row, col, first, last);

  const int64_t rows = second ? a.width : a.hidden, cols = second ? a.hidden : a.width;
  const int64_t weights = int64_t(a.width) * a.hidden;
  T* const own = second ? a.gw2 : a.gw1;
  A* const part = a.parts ? a.parts + group * a.size : nullptr;
  const Rows<T> to_own = rows_of(own ? own + group * weights : nullptr, rows, cols);
  const Rows<A> to_part = rows_of(part ? part + second * weights : nullptr, rows, cols);
  for_spots<Tile>([&](const Spot& s) {
    to_own.store(row + s.row, int(col) + s.col, sums.pair(s));
    to_part.store(row + s.row, int(col) + s.col, sums.pair(s));
  });
  if (col != 0 || threadIdx.x >= Tile::kM || row + threadIdx.x >= rows) return;
  T* const own_bias = second ? a.gb2 : a.gb1;
  if (own_bias) own_bias[group * rows + row + threadIdx.x] = narrow<T>(bias);
  if (part) part[2 * weights + second * a.hidden + row + threadIdx.x] = bias;
}

// out = (add ? out : 0) + the sum of the groups' parts, in order.
template <class A> struct JoinArgs {
  const A* parts;  // [groups, size]: W1', W2', b1', b2'
  int64_t groups, size, width, hidden;
  A *gw1, *gb1, *gw2, *gb2;
  bool add;
};
template <class A> __global__ void __launch_bounds__(kCopyThreads) join_kernel(JoinArgs<A> a) {
  const int64_t step = int64_t(gridDim.x) * kCopyThreads, weights = a.width * a.hidden;
  for (int64_t i = int64_t(blockIdx.x) * kCopyThreads + threadIdx.x; i < a.size; i += step) {
    A sum = 0;
    for (int64_t group = 0; group < a.groups; ++group) sum += a.parts[group * a.size + i];
    A* const out = i < weights                  ? a.gw1 + i
                   : i < 2 * weights            ? a.gw2 + (i - weights)
                   : i < 2 * weights + a.hidden ? a.gb1 + (i - 2 * weights)
                                                : a.gb2 + (i - 2 * weights - a.hidden);
    *out = a.add ? *out + sum : sum;
  }
}

}  // namespace fastres::mlp_stack
