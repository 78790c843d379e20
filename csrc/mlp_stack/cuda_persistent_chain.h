// cuda_persistent_chain: the cotangents of a tile of samples through all blocks, downwards, in one
// launch: cuda_persistent backwards. What the weight gradients need is left in global memory.
#pragma once
#include "cuda_persistent.h"

namespace fastres::mlp_stack {

template <class Tile> struct PersistentChainArgs {
  using T = typename Tile::T;
  BackwardArgs a;
  T *gated, *delta, *hidden;  // [blocks, B, D], [blocks, B, H] twice; or null: not wanted
};

// Which panels come next: of each block, for each tile of hidden features those of x and W1 for z
// and of W2 for q; then those of W1 for g. A slot has the panel of x behind that of the weights.
template <class Tile> struct ChainPanels {
  const BackwardArgs& a;
  int64_t top, block;
  enum { kZ, kQ, kG } product = kZ;
  int left = 0, k = 0;
  __device__ __forceinline__ void operator()(char* slot) {
    using T = typename Tile::T;
    const Shape& s = a.shape;
    const int width = int(s.width), hidden = int(s.hidden);
    const int64_t set = s.shared ? 0 : block * s.width * s.hidden;
    const T* data = at<T>(product == kQ ? a.weights.w2 : a.weights.w1, set);
    const int rows = product == kQ ? width : hidden, cols = product == kQ ? hidden : width;
    gpu::fetch_panel<Tile::kN>(slot, Matrix<T>{data, rows, cols}, product == kZ, left, k,
                               Tile::kThreads);
    if (product == kZ) {
      const T* x = at<T>(a.states, (block - a.first) * s.batch * s.width);
      gpu::fetch_panel<Tile::kM>(slot + gpu::panel_bytes(Tile::kN), Matrix<T>{x, s.batch, width},
                                 true, top, k, Tile::kThreads);
    }
    next(width, hidden);
  }
  __device__ __forceinline__ void next(int width, int hidden) {
    if ((k += gpu::kDepth<typename Tile::T>) < (product == kG ? hidden : width)) return;
    k = 0;
    if (product == kZ) {
      product = kQ;
      return;
    }
    const bool more = (left += Tile::kN) < (product == kG ? width : hidden);
    if (!more) left = 0;
    if (product == kQ) product = more ? kZ : kG;
    else if (!more) product = kZ, --block;
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    persistent_chain_kernel(PersistentChainArgs<Tile> given) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const BackwardArgs& a = given.a;
  const Shape& s = a.shape;
  const Layout<Tile> layout(s, true);
  char* const shared = gpu::dynamic_shared();
  A* const shared_dots = reinterpret_cast<A*>(shared + layout.sums);
  const int width = int(s.width), hidden = int(s.hidden);
  const int64_t top = int64_t(blockIdx.x) * Tile::kM, rows = s.batch - top;
  const Stream<Tile> g{reinterpret_cast<Pair<A>*>(shared + layout.stream),
                       Resident<Tile>(shared + layout.width, width, layout.width_stride)};
  const Resident<Tile> dz(shared + layout.hidden, hidden, layout.hidden_stride);
  const auto tile_of = [&](auto* data, int64_t block, int cols) {  // of [blocks, B, cols]
    return rows_of(data ? data + ((block - a.first) * s.batch + top) * cols : nullptr, rows, cols);
  };

  ChainPanels<Tile> panels{a, top, a.last - 1};
  gpu::Ring<kSlots<Tile>, ChainPanels<Tile>> ring(
      shared, layout.slot_bytes,
      int(a.last - a.first) * (2 * panels_of<Tile>(hidden, width) + panels_of<Tile>(width, hidden)),
      panels);
  __syncthreads();  // the zeros are there
  const auto given_g = [&] { return rows_of(at<A>(a.g, top * s.width), rows, width); };
  for (int left = 0; left < width; left += Tile::kN)
    for_spots<Tile, true>(
        [&](const Spot& spot) { g.store(left, spot, given_g().load(spot.row, left + spot.col)); });

  for (int64_t block = a.last - 1; block >= a.first; --block) {
    const int64_t set = s.shared ? 0 : block;
    const Gates<Tile> gate(a.weights, block, top, s.batch);
    RowSums<Tile, 1> dots;
    for (int left = 0; (a.ggate || given.gated) && left < width; left += Tile::kN) {
      const Rows<const T> b2 = rows_of(at<T>(a.weights.b2, set * s.width), 1, width);
      const Rows<T> gated = tile_of(given.gated, block, width);
      for_spots<Tile, true>([&](const Spot& spot) {
        const Pair<A> v = g.load(left, spot), bias = b2.load(0, left + spot.col);
        dots.v[spot.of_row()][0] += v.v[0] * bias.v[0] + v.v[1] * bias.v[1];  // <g, b2>
        gated.store(spot.row, left + spot.col, scaled(gate.v[spot.of_row()], v));
      });
    }
    for (int left = 0; left < hidden; left += Tile::kN) {
      const Columns<Tile> bias(at<T>(a.weights.b1, set * s.hidden), left, hidden);
      Products<Tile> z, q;
      for (int k = 0; k < width; k += gpu::kDepth<T>) {
        const char* slot = ring.next();
        gpu::multiply(z, gpu::panel_at<true, Tile::kM, T>(slot + gpu::panel_bytes(Tile::kN)),
                      gpu::panel_at<true, Tile::kN, T>(slot));
      }
      add_product<false>(q, g.rounded, ring);
      derive(z, q, bias, s.activation, hidden - left, dots);
      const Rows<T> to_h = tile_of(given.hidden, block, hidden);
      for_spots<Tile>([&](const Spot& spot) {
        to_h.store(spot.row, left + spot.col, z.pair(spot));
        dz.store(spot.row, left + spot.col, scaled(gate.v[spot.of_row()], q.pair(spot)));
      });
      const Rows<T> to_dz = tile_of(given.delta, block, hidden);
      for_spots<Tile, true>([&](const Spot& spot) {
        to_dz.store(spot.row, left + spot.col, dz.load(spot.row, left + spot.col));
      });
    }
    if (a.ggate) dots.leave(shared_dots);
    for (int left = 0; left < width; left += Tile::kN) {
      Products<Tile> sum;
      add_product<false>(sum, dz, ring);
      if (a.ggate && left == 0)
        for (int row = threadIdx.x; row < Tile::kM && row < rows; row += Tile::kThreads)
          *at<A>(a.ggate, block * s.batch + top + row) =
              RowSums<Tile, 1>::total(shared_dots, 0, row);
      for_spots<Tile>(
          [&](const Spot& spot) { g.store(left, spot, plus(g.load(left, spot), sum.pair(spot))); });
      if (!a.gstates) continue;
      const Rows<const T> gstate = tile_of(static_cast<const T*>(a.gstates), block, width);
      for_spots<Tile, true>([&](const Spot& spot) {
        g.store(left, spot, plus(g.load(left, spot), gstate.load(spot.row, left + spot.col)));
      });
    }
  }
  for (int left = 0; left < width; left += Tile::kN)
    for_spots<Tile, true>(
        [&](const Spot& spot) { given_g().store(spot.row, left + spot.col, g.load(left, spot)); });
}

}  // namespace fastres::mlp_stack
