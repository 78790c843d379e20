// cuda_launches: the launches of the stack layer by layer, and where their scratch lies.
#pragma once
#include "../common/gpu_rows.h"
#include "cuda_weights.h"

namespace fastres::mlp_stack {

using gpu::Cutter;
using gpu::launch_tiles;

// 16 MiB: partial sums of so many blocks are left for one launch that adds them up.
constexpr int64_t kPartsBytes = 16 << 20;

template <class T> struct ForwardScratch {
  using A = gpu::accumulate_t<T>;
  static constexpr bool kWide = sizeof(T) < sizeof(A);  // the stream is wider than the elements
  int64_t parts, group;  // of a row's sums; blocks whose sums are added up together
  A* stream;             // [B, D]; of the elements' width it is `rounded`
  T *rounded, *hidden;   // [B, D], [B, H]
  A* sums;               // [group, 3, B, parts]
  int64_t bytes;
  ForwardScratch(const Shape& s, int64_t blocks, void* scratch) {
    Cutter cutter(scratch);
    parts = parts_of(s.dtype, s.width);
    const int64_t each = 3 * s.batch * parts * int64_t(sizeof(A)),
                  most = each ? kPartsBytes / each : 1;
    group = most < 1 ? 1 : most < blocks ? most : blocks;
    stream = cutter.take<A>(kWide ? s.batch * s.width : 0);
    rounded = cutter.take<T>(s.batch * s.width);
    hidden = cutter.take<T>(s.batch * s.hidden);
    sums = cutter.take<A>(parts > 1 ? group * 3 * s.batch * parts : 0);
    bytes = cutter.bytes();
  }
};

template <class T> struct BackwardScratch {
  using A = gpu::accumulate_t<T>;
  static constexpr bool kWide = sizeof(T) < sizeof(A);
  int64_t parts;              // of a row's gate gradient
  T *gated, *delta, *hidden;  // [blocks, B, D], [blocks, B, H] twice: gate * g, dz, h
  T* rounded;                 // g, [B, D]
  A* dots;                    // [blocks, B, parts]
  A* gradients;               // [groups, gradient_size]
  int64_t bytes;
  BackwardScratch(const Shape& s, int64_t blocks, void* scratch) {
    Cutter cutter(scratch);
    parts = parts_of(s.dtype, s.hidden);
    gated = cutter.take<T>(blocks * s.batch * s.width);
    delta = cutter.take<T>(blocks * s.batch * s.hidden);
    hidden = cutter.take<T>(blocks * s.batch * s.hidden);
    rounded = cutter.take<T>(kWide ? s.batch * s.width : 0);
    dots = cutter.take<A>(parts > 1 ? blocks * s.batch * parts : 0);
    gradients = cutter.take<A>(s.shared ? groups_of(s, blocks) * gradient_size(s) : 0);
    bytes = cutter.bytes();
  }
};

template <class T> Matrix<T> matrix_of(const void* data, int64_t rows, int64_t cols) {
  const T* p = static_cast<const T*>(data);
  return {p, rows, int(cols)};
}

// The weights of one block.
template <class T> struct BlockWeights {
  Matrix<T> w1, w2;  // [H, D], [D, H]
  const T *b1, *b2;  // [H], [D]
  BlockWeights(const Shape& s, const Weights& w, int64_t block) {
    const int64_t set = s.shared ? 0 : block, size = set * s.width * s.hidden;
    w1 = matrix_of<T>(static_cast<const T*>(w.w1) + size, s.hidden, s.width);
    w2 = matrix_of<T>(static_cast<const T*>(w.w2) + size, s.width, s.hidden);
    b1 = static_cast<const T*>(w.b1) + set * s.hidden;
    b2 = static_cast<const T*>(w.b2) + set * s.width;
  }
};

inline dim3 copy_grid(int64_t size) {
  const int64_t blocks = ceil_div(size, kCopyThreads), most = gpu::kMultiprocessors * 8;
  return dim3(unsigned(blocks < most ? blocks : most));
}

template <class Tile> void forward_layers(const Args& a, void* stream) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const Shape& s = a.shape;
  const int64_t size = s.batch * s.width;
  const ForwardScratch<T> scratch(s, a.last - a.first, a.scratch);
  constexpr bool kWide = ForwardScratch<T>::kWide;
  const auto state = [&](int64_t block) {  // where the stream before it is kept, or null
    return a.states && block < a.last && (block - a.first) % a.every == 0
               ? static_cast<T*>(a.states) + (block - a.first) / a.every * size
               : nullptr;
  };
  const bool none = a.first == a.last;
  if (kWide || a.states || none)
    gpu::launch("mlp_stack: copy_kernel", copy_kernel<T>, copy_grid(size), kCopyThreads, stream,
                CopyArgs<T>{a.x, false, kWide ? scratch.stream : nullptr, state(a.first),
                            none ? static_cast<T*>(a.y) : nullptr, nullptr, a.weights, 0, s.batch,
                            s.width});
  const T* x = static_cast<const T*>(a.x);
  int64_t left = 0;  // blocks whose sums are in parts
  for (int64_t block = a.first; block < a.last; ++block) {
    const BlockWeights<T> w(s, a.weights, block);
    const bool ends = block + 1 == a.last;
    launch_tiles("mlp_stack: hidden_kernel", hidden_kernel<Tile>, tiles_of<Tile>(s.batch, s.hidden),
                 stream,
                 HiddenArgs<Tile>{matrix_of<T>(x, s.batch, s.width), w.w1, w.b1,
                                  rows_of(scratch.hidden, s.batch, s.hidden), s.activation});
    T* const kept = state(block + 1);
    T* const last = ends ? static_cast<T*>(a.y) : nullptr;
    T* const y = kept ? kept : ends ? last : scratch.rounded;
    const A* skip;
    if constexpr (kWide) skip = scratch.stream;
    else skip = x;
    A* sums = a.sums ? static_cast<A*>(a.sums) + block * 3 * s.batch : nullptr;
    A* const total = sums;
    if (sums && scratch.parts > 1) sums = scratch.sums + left++ * 3 * s.batch * scratch.parts;
    launch_tiles("mlp_stack: stream_kernel", stream_kernel<Tile>, tiles_of<Tile>(s.batch, s.width),
                 stream,
                 StreamArgs<Tile>{matrix_of<T>(scratch.hidden, s.batch, s.hidden), w.w2, w.b2,
                                  a.weights, block, rows_of(skip, s.batch, s.width),
                                  rows_of(kWide ? scratch.stream : nullptr, s.batch, s.width),
                                  rows_of(y, s.batch, s.width),
                                  rows_of(kept ? last : nullptr, s.batch, s.width), sums});
    if (left == scratch.group || (ends && left)) {
      gpu::launch_sum_parts<A>(scratch.sums, total - (left - 1) * 3 * s.batch, left * 3 * s.batch,
                               int(scratch.parts), stream);
      left = 0;
    }
    x = y;
  }
}

template <class Tile> void chain_layers(const BackwardArgs& a, void* stream) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const Shape& s = a.shape;
  const int64_t wide = s.batch * s.width, high = s.batch * s.hidden;
  const BackwardScratch<T> scratch(s, a.last - a.first, a.scratch);
  constexpr bool kWide = BackwardScratch<T>::kWide;
  A* const g = static_cast<A*>(a.g);
  // Factors of products are T: g itself, or gate * g without a gate, or g rounded.
  T* const rounded = kWide && a.weights.gate ? scratch.rounded : nullptr;
  const bool wants_gated = a.gw1 || (kWide && !rounded);
  const auto gated = [&](int64_t block) {
    return wants_gated && block >= a.first ? scratch.gated + (block - a.first) * wide : nullptr;
  };
  if (rounded || wants_gated)
    gpu::launch("mlp_stack: copy_kernel", copy_kernel<T>, copy_grid(wide), kCopyThreads, stream,
                CopyArgs<T>{g, true, nullptr, rounded, nullptr, gated(a.last - 1), a.weights,
                            a.last - 1, s.batch, s.width});
  A* const dots = !a.ggate            ? nullptr
                  : scratch.parts > 1 ? scratch.dots
                                      : static_cast<A*>(a.ggate) + a.first * s.batch;
  for (int64_t block = a.last - 1; block >= a.first; --block) {
    const int64_t local = block - a.first;
    const BlockWeights<T> w(s, a.weights, block);
    const void* factor = !kWide ? a.g : rounded ? rounded : gated(block);
    T* const dz = scratch.delta + local * high;
    launch_tiles(
        "mlp_stack: delta_kernel", delta_kernel<Tile>, tiles_of<Tile>(s.batch, s.hidden), stream,
        DeltaArgs<Tile>{
            matrix_of<T>(static_cast<const T*>(a.states) + local * wide, s.batch, s.width), w.w1,
            matrix_of<T>(factor, s.batch, s.width), w.w2, w.b1, w.b2, a.weights, block, g,
            rows_of(a.gw1 ? scratch.hidden + local * high : nullptr, s.batch, s.hidden),
            rows_of(dz, s.batch, s.hidden), dots ? dots + local * s.batch * scratch.parts : nullptr,
            s.activation});
    const T* given = a.gstates ? static_cast<const T*>(a.gstates) + local * wide : nullptr;
    launch_tiles(
        "mlp_stack: cotangent_kernel", cotangent_kernel<Tile>, tiles_of<Tile>(s.batch, s.width),
        stream,
        CotangentArgs<Tile>{matrix_of<T>(dz, s.batch, s.hidden), w.w1, rows_of(g, s.batch, s.width),
                            rows_of(given, s.batch, s.width),
                            rows_of(block > a.first ? rounded : nullptr, s.batch, s.width),
                            rows_of(gated(block - 1), s.batch, s.width), a.weights, block - 1});
  }
  if (dots && scratch.parts > 1)
    gpu::launch_sum_parts<A>(dots, static_cast<A*>(a.ggate) + a.first * s.batch,
                             (a.last - a.first) * s.batch, int(scratch.parts), stream);
}

template <class Tile> void weight_gradients(const BackwardArgs& a, void* stream) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const Shape& s = a.shape;
  const int64_t blocks = a.last - a.first, groups = s.shared ? groups_of(s, blocks) : blocks;
  const int64_t size = gradient_size(s);
  const BackwardScratch<T> scratch(s, blocks, a.scratch);
  const T* const x = static_cast<const T*>(a.states);
  const auto own = [&](void* p, int64_t each) {
    return s.shared ? nullptr : static_cast<T*>(p) + a.first * each;
  };
  launch_tiles(
      "mlp_stack: gradient_kernel", gradient_kernel<Tile>,
      dim3(unsigned(groups * 2 * gradient_tiles<Tile>(s))), stream,
      GradientArgs<Tile>{x, scratch.gated, scratch.hidden, scratch.delta, s.batch, int(s.width),
                         int(s.hidden), blocks, groups, own(a.gw1, s.width * s.hidden),
                         own(a.gb1, s.hidden), own(a.gw2, s.width * s.hidden), own(a.gb2, s.width),
                         s.shared ? scratch.gradients : nullptr, size});
  if (s.shared)
    gpu::launch(
        "mlp_stack: join_kernel", join_kernel<A>, copy_grid(size), kCopyThreads, stream,
        JoinArgs<A>{scratch.gradients, groups, size, s.width, s.hidden, static_cast<A*>(a.gw1),
                    static_cast<A*>(a.gb1), static_cast<A*>(a.gw2), static_cast<A*>(a.gb2), a.add});
}

}  // namespace fastres::mlp_stack
