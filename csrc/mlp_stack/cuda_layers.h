// cuda_layers: the stack on CUDA layer by layer, for every width: two launches per block, each a
// product of matrices with all that follows it done in registers. Forward and chain of the backward
// pass.
#pragma once
#include "cuda_tile.h"

namespace fastres::mlp_stack {

// 64 x 64 by 4 warps: 32 results per thread; of float64 8, as its elementary functions are long.
template <class Arithmetic>
using LayerTile = std::conditional_t<sizeof(typename Arithmetic::T) == 8,
                                     gpu::ProductTile<Arithmetic, 32, 32, 16, 16>,
                                     gpu::ProductTile<Arithmetic, 64, 64, 32, 32>>;

// 3 blocks of threads to an SM: 168 registers each, where 4 would make some kernels spill.
constexpr int kBlocksPerSm = 3;

// How many partial sums each row of `cols` columns has.
inline int64_t parts_of(Dtype dtype, int64_t cols) {
  return ceil_div(cols, dtype == Dtype::kFloat64 ? LayerTile<Arithmetic<double, false>>::kN
                                                 : LayerTile<Arithmetic<float, false>>::kN);
}

struct NoVisit {
  template <class Panel> __device__ __forceinline__ void operator()(const Panel&) const {}
};

// h = act(x W1^T + b1)
template <class Tile> struct HiddenArgs {
  using T = typename Tile::T;
  Matrix<T> x, w1;  // [B, D], [H, D]
  const T* b1;      // [H]
  Rows<T> h;        // [B, H]
  Activation activation;
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerSm) hidden_kernel(HiddenArgs<Tile> a) {
  const Corner<Tile> corner(a.h.cols);
  Products<Tile> z;
  gpu::add_product<true, true>(z, gpu::dynamic_shared(), a.x, corner.row, a.w1, corner.col,
                               NoVisit());
  activate(z, Columns<Tile>(a.b1, corner.col, a.h.cols), a.activation);
  for_spots<Tile>(
      [&](const Spot& s) { a.h.store(corner.row + s.row, corner.col + s.col, z.pair(s)); });
}

// y = x + gate * (h W2^T + b2), with its sums
template <class Tile> struct StreamArgs {
  using T = typename Tile::T;
  using A = typename Tile::A;
  Matrix<T> h, w2;  // [B, H], [D, H]
  const T* b2;      // [D]
  Weights weights;  // for the gate
  int64_t block;    // of the gate
  Rows<const A> x;  // [B, D]
  Rows<A> stream;   // y, [B, D]; or null; may be x
  Rows<T> y, also;  // y, [B, D]; or null; may be x
  A* sums;          // [3, B, tiles of a row]; null: not wanted
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerSm) stream_kernel(StreamArgs<Tile> a) {
  using A = typename Tile::A;
  SHARED_ARRAY(A, shared_sums, [3 * Tile::kWarpsN * Tile::kM]);
  const int64_t batch = a.x.rows;
  const Corner<Tile> corner(a.x.cols);
  Products<Tile> f;
  gpu::add_product<true, true>(f, gpu::dynamic_shared(), a.h, corner.row, a.w2, corner.col,
                               NoVisit());
  const Gates<Tile> gate(a.weights, a.block, corner.row, batch);
  RowSums<Tile, 3> sums;
  add_branch(
      f, Columns<Tile>(a.b2, corner.col, a.x.cols), gate, batch - corner.row, a.x.cols - corner.col,
      sums, [&](const Spot& s) { return a.x.load(corner.row + s.row, corner.col + s.col); },
      [&](const Spot& s, const Pair<A>& y) {
        a.stream.store(corner.row + s.row, corner.col + s.col, y);
        a.y.store(corner.row + s.row, corner.col + s.col, y);
        a.also.store(corner.row + s.row, corner.col + s.col, y);
      });
  if (!a.sums) return;
  sums.leave(shared_sums);
  __syncthreads();
  for (int i = threadIdx.x; i < 3 * Tile::kM; i += Tile::kThreads) {
    const int64_t row = corner.row + i % Tile::kM;
    if (row < batch)
      a.sums[(i / Tile::kM * batch + row) * corner.count + corner.number] =
          RowSums<Tile, 3>::total(shared_sums, i / Tile::kM, i % Tile::kM);
  }
}

// h = act(z), dz = gate * (g W2) * act'(z), z = x W1^T + b1, and per row <g W2, h> + <g, b2>
template <class Tile> struct DeltaArgs {
  using T = typename Tile::T;
  using A = typename Tile::A;
  Matrix<T> x, w1, g, w2;  // [B, D], [H, D], [B, D], [D, H]
  const T *b1, *b2;        // [H], [D]
  Weights weights;         // for the gate
  int64_t block;           // of the gate
  const A* stream_g;       // g before it was rounded, [B, D]
  Rows<T> h, dz;           // [B, H]; h may be null
  A* dots;                 // [B, tiles of a row]; null: not wanted
  Activation activation;
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerSm) delta_kernel(DeltaArgs<Tile> a) {
  using A = typename Tile::A;
  SHARED_ARRAY(A, shared_dots, [Tile::kWarpsN * Tile::kM]);
  const int64_t batch = a.x.rows;
  const Corner<Tile> corner(a.dz.cols);
  Products<Tile> z, q;
  gpu::add_product<true, true>(z, gpu::dynamic_shared(), a.x, corner.row, a.w1, corner.col,
                               NoVisit());
  gpu::add_product<true, false>(q, gpu::dynamic_shared(), a.g, corner.row, a.w2, corner.col,
                                NoVisit());
  const Gates<Tile> gate(a.weights, a.block, corner.row, batch);
  RowSums<Tile, 1> dots;
  derive(z, q, Columns<Tile>(a.b1, corner.col, a.dz.cols), a.activation, a.dz.cols - corner.col,
         dots);
  for_spots<Tile>([&](const Spot& s) {
    a.h.store(corner.row + s.row, corner.col + s.col, z.pair(s));
    a.dz.store(corner.row + s.row, corner.col + s.col, scaled(gate.v[s.of_row()], q.pair(s)));
  });
  if (!a.dots) return;
  dots.leave(shared_dots);
  __syncthreads();
  // <g, b2>: a warp for each row, by the first of the tiles alone.
  for (int row = threadIdx.x / 32; row < Tile::kM; row += Tile::kThreads / 32) {
    const int lane = threadIdx.x % 32;
    A dot[1] = {};
    if (corner.row + row >= batch) continue;
    const A* g = a.stream_g + (corner.row + row) * a.g.cols;
    for (int64_t i = lane; corner.number == 0 && i < a.g.cols; i += 32)
      dot[0] += g[i] * widen(a.b2[i]);
    gpu::sum_warp_lanes(dot, 32);
    if (lane == 0)
      a.dots[(corner.row + row) * corner.count + corner.number] =
          RowSums<Tile, 1>::total(shared_dots, 0, row) + dot[0];
  }
}

// g <- g + dz W1 + gstates; then what the block below needs of it
template <class Tile> struct CotangentArgs {
  using T = typename Tile::T;
  using A = typename Tile::A;
  Matrix<T> dz, w1;        // [B, H], [H, D]
  Rows<A> g;               // [B, D]
  Rows<const T> gstate;    // [B, D]; or null
  Rows<T> rounded, gated;  // [B, D], g and gate * g; or null
  Weights weights;         // for that gate
  int64_t block;           // of that gate
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerSm)
    cotangent_kernel(CotangentArgs<Tile> a) {
  using A = typename Tile::A;
  const Corner<Tile> corner(a.g.cols);
  Products<Tile> sum;
  gpu::add_product<true, false>(sum, gpu::dynamic_shared(), a.dz, corner.row, a.w1, corner.col,
                                NoVisit());
  const Gates<Tile> gate(a.weights, a.block, corner.row, a.gated.data ? a.g.rows : 0);
  for_spots<Tile>([&](const Spot& s) {
    const int64_t row = corner.row + s.row;
    const int col = corner.col + s.col;
    Pair<A> g = a.g.load(row, col), gated;
    const Pair<A> given = a.gstate.load(row, col);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      g.v[e] += sum.at(s, e) + given.v[e];
      gated.v[e] = gpu::product(gate.v[s.of_row()], g.v[e]);
    }
    a.g.store(row, col, g);
    a.rounded.store(row, col, g);
    a.gated.store(row, col, gated);
  });
}

// Copies with conversions, where no product comes first: x to the stream and to states, g to its
// rounded and gated forms. 256 threads, as many as an SM deals out well.
constexpr int kCopyThreads = 256;
template <class T> struct CopyArgs {
  using A = gpu::accumulate_t<T>;
  const void* from;      // [rows, cols], of T or of A
  bool wide;             // of A
  A* stream;             // [rows, cols]; or null
  T *to, *also, *gated;  // [rows, cols]; or null
  Weights weights;       // for the gate of `gated`
  int64_t block, rows, cols;
};
template <class T>
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(CopyArgs<T> a) {
  using A = gpu::accumulate_t<T>;
  const int64_t step = int64_t(gridDim.x) * kCopyThreads;
  for (int64_t i = int64_t(blockIdx.x) * kCopyThreads + threadIdx.x; i < a.rows * a.cols;
       i += step) {
    const A v = a.wide ? *at<A>(a.from, i) : widen(*at<T>(a.from, i));
    if (a.stream) a.stream[i] = v;
    if (a.to) a.to[i] = narrow<T>(v);
    if (a.also) a.also[i] = narrow<T>(v);
    if (!a.gated) continue;
    const Weights& w = a.weights;
    const A gate =
        w.gate ? *at<A>(w.gate, a.block * w.gate_block_stride + i / a.cols * w.gate_row_stride)
               : A(1);
    a.gated[i] = narrow<T>(gpu::product(gate, v));
  }
}

}  // namespace fastres::mlp_stack
