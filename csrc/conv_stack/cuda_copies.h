// cuda_copies: tensors as the kernels of the layers want them on CUDA, and back: channels filled up
// with zeros to whole packs.
#pragma once
#include "cuda_layers.h"

namespace fastres::conv_stack {

constexpr int kCopyThreads = 256;  // as many as an SM deals out well
inline dim3 copy_grid(int64_t size) {
  const int64_t blocks = ceil_div(size, kCopyThreads), most = gpu::kMultiprocessors * 8;
  return dim3(unsigned(blocks < most ? blocks : most));
}

// C': the channels filled up to whole packs of 16 bytes.
template <class T> int64_t filled(int64_t channels) {
  return ceil_div(channels, gpu::kPackSize<T>) * gpu::kPackSize<T>;
}

// Rows of C', of x or to y: neighbouring threads have neighbouring pixels, and a pack of each.
template <class T> struct CopyArgs {
  using A = gpu::accumulate_t<T>;
  Image image;
  int64_t pixels, channels;  // N H W, C'
  const T* x;                // as `image` says; or null: to y
  A* stream;                 // [N H W, C']; or null
  T* rows;                   // [N H W, C']; or null
  T* y;                      // as `image` says; or null
};
template <class T> __global__ void __launch_bounds__(kCopyThreads) copy_kernel(CopyArgs<T> a) {
  using A = gpu::accumulate_t<T>;
  constexpr int kPack = gpu::kPackSize<T>;
  const int64_t step = int64_t(gridDim.x) * kCopyThreads, size = a.pixels * (a.channels / kPack);
  for (int64_t i = int64_t(blockIdx.x) * kCopyThreads + threadIdx.x; i < size; i += step) {
    const int64_t row = i % a.pixels, first = i / a.pixels * kPack;
    const int64_t image = row / a.image.pixels, pixel = row % a.image.pixels;
    gpu::Pack<T, kPack> pack;
    if (!a.x) gpu::load(pack, a.rows + row * a.channels + first);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const bool inside = first + e < a.image.channels;
      const int64_t at = a.image.at(image, pixel, first + e);
      if (a.x) pack.v[e] = inside ? a.x[at] : narrow<T>(A(0));
      else if (inside) a.y[at] = pack.v[e];
      if (a.stream) a.stream[row * a.channels + first + e] = widen(pack.v[e]);
    }
    if (a.x && a.rows) gpu::store(a.rows + row * a.channels + first, pack);
  }
}

// Weights with C and C' filled up: a row [C'] for each tap and channel that is read.
template <class T> struct WeightArgs {
  const T *w1, *w2;   // [L, 9, C, C]
  T* to;              // [L, 2, 9, C', C']
  int64_t taps;       // L 2 9
  int channels, all;  // C, C'
};
template <class T>
__global__ void __launch_bounds__(kCopyThreads) weight_kernel(WeightArgs<T> a) {
  const int size = a.all * a.all;
  for (int64_t tap = blockIdx.x; tap < a.taps; tap += gridDim.x) {
    const T* const from =
        (tap / 9 % 2 ? a.w2 : a.w1) + (tap / 18 * 9 + tap % 9) * a.channels * a.channels;
    for (int i = threadIdx.x; i < size; i += kCopyThreads) {
      const int in = i / a.all, out = i % a.all;
      a.to[tap * size + i] = in < a.channels && out < a.channels
                                 ? from[in * a.channels + out]
                                 : narrow<T>(gpu::accumulate_t<T>(0));
    }
  }
}

}  // namespace fastres::conv_stack
