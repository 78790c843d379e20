// cuda_launches: the launches of the stack convolution by convolution, and where its scratch lies.
#pragma once
#include "../common/gpu_rows.h"
#include "cuda_copies.h"

namespace fastres::conv_stack {

// 16 MiB: partial sums of so many blocks are left for one launch that adds them up.
constexpr int64_t kPartsBytes = 16 << 20;

template <class Tile> struct Scratch {
  using T = typename Tile::T;
  using A = typename Tile::A;
  static constexpr bool kWide = sizeof(T) < sizeof(A);  // the stream is wider than the elements
  int64_t channels;                                     // C'
  int piece;             // pixels whose sums are added up at once: of one image, and of one warp
  int64_t parts, group;  // of an image's sums; blocks whose sums are added up together
  T* weights;            // [L, 2, 9, C', C'], where C' is not C
  A* stream;             // [N H W, C']
  T *rounded, *hidden;   // [N H W, C']; of the elements' width `rounded` is the stream
  A* sums;               // [group, 3, N, parts]
  int64_t bytes;
  Scratch(const Shape& s, void* scratch) : channels(filled<T>(s.channels)) {
    gpu::Cutter cutter(scratch);
    const int64_t pixels = s.height * s.width, size = s.batch * pixels * channels;
    for (piece = 1; piece < 32 && pixels % (2 * piece) == 0;) piece *= 2;
    parts = pixels / piece * ceil_div(channels, Tile::kN);
    const int64_t each = 3 * s.batch * parts * int64_t(sizeof(A)),
                  most = each ? kPartsBytes / each : 1;
    group = most < 1 ? 1 : most < s.blocks ? most : s.blocks;
    weights = cutter.take<T>(channels == s.channels ? 0 : s.blocks * 18 * channels * channels);
    stream = cutter.take<A>(size);
    if constexpr (kWide) rounded = cutter.take<T>(size);
    else rounded = stream;
    hidden = cutter.take<T>(size);
    sums = cutter.take<A>(parts > 1 ? group * 3 * s.batch * parts : 0);
    bytes = cutter.bytes();
  }
};

// Where the weights of each convolution are, with C' channels.
template <class T> struct LayerWeights {
  const T *w1, *w2;  // of block 0
  int64_t step;      // elements from block to block
  int64_t channels;
  Matrix<T> of(int64_t block, int second) const {
    const T* const data = (second ? w2 : w1) + block * step;
    return {data, 9 * channels, int(channels)};
  }
};
template <class T>
LayerWeights<T> layer_weights(const Args& a, T* to, int64_t channels, void* stream) {
  const T *const w1 = static_cast<const T*>(a.weights.w1), *const w2 =
                                                               static_cast<const T*>(a.weights.w2);
  const int64_t size = 9 * channels * channels, taps = a.shape.blocks * 18;
  if (channels == a.shape.channels || taps == 0) return {w1, w2, size, channels};
  gpu::launch("conv_stack: weight_kernel", weight_kernel<T>,
              dim3(unsigned(taps < gpu::kMaxBlocks ? taps : gpu::kMaxBlocks)), kCopyThreads, stream,
              WeightArgs<T>{w1, w2, to, taps, int(a.shape.channels), int(channels)});
  return {to, to + size, 2 * size, channels};
}

template <class Tile> void forward_layers(const Args& a, void* stream) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const Shape& s = a.shape;
  const Scratch<Tile> scratch(s, a.scratch);
  constexpr bool kWide = Scratch<Tile>::kWide;
  const int64_t channels = scratch.channels, count = s.batch * s.height * s.width;
  const Pixels pixels{count, int(s.height), int(s.width), int(channels)};
  // The last rows are y itself where that is how it lies in memory.
  const bool same = s.channels_last && channels == s.channels && s.blocks > 0;
  const dim3 copies = copy_grid(count * (channels / gpu::kPackSize<T>)),
             tiles = gpu::tiles_of<Tile>(count, channels);
  const auto weights = layer_weights(a, scratch.weights, channels, stream);
  gpu::launch("conv_stack: copy_kernel", copy_kernel<T>, copies, kCopyThreads, stream,
              CopyArgs<T>{image_of(s), count, channels, static_cast<const T*>(a.x),
                          kWide ? scratch.stream : nullptr, scratch.rounded, nullptr});
  int64_t left = 0;  // blocks whose sums are in parts
  for (int64_t block = 0; block < s.blocks; ++block) {
    const auto rows = [&](auto* data) { return gpu::rows_of(data, count, channels); };
    const bool ends = block + 1 == s.blocks;
    gpu::launch_tiles("conv_stack: hidden_kernel", hidden_kernel<Tile>, tiles, stream,
                      HiddenArgs<Tile>{pixels, scratch.rounded, weights.of(block, 0),
                                       at<T>(a.weights.b1, block * s.channels), int(s.channels),
                                       rows(scratch.hidden)});
    A* sums = a.sums ? static_cast<A*>(a.sums) + block * 3 * s.batch : nullptr;
    A* const total = sums;
    if (sums && scratch.parts > 1) sums = scratch.sums + left++ * 3 * s.batch * scratch.parts;
    gpu::launch_tiles(
        "conv_stack: stream_kernel", stream_kernel<Tile>, tiles, stream,
        StreamArgs<Tile>{pixels, scratch.hidden, weights.of(block, 1),
                         at<T>(a.weights.b2, block * s.channels), int(s.channels), a.weights, block,
                         rows(scratch.stream), rows(kWide ? scratch.rounded : nullptr),
                         rows(ends && same ? static_cast<T*>(a.y) : nullptr), scratch.piece, sums});
    if (left == scratch.group || (ends && left)) {
      gpu::launch_sum_parts<A>(scratch.sums, total - (left - 1) * 3 * s.batch, left * 3 * s.batch,
                               int(scratch.parts), stream);
      left = 0;
    }
  }
  if (!same)
    gpu::launch("conv_stack: copy_kernel", copy_kernel<T>, copies, kCopyThreads, stream,
                CopyArgs<T>{image_of(s), count, channels, nullptr, nullptr, scratch.rounded,
                            static_cast<T*>(a.y)});
}

}  // namespace fastres::conv_stack
