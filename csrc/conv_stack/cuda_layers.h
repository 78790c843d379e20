// cuda_layers: the stack on CUDA convolution by convolution, for every shape: each a product of two
// matrices, with all that follows it done in registers.
//
// In scratch a pixel is a row, [N H W, C'], with C' the channels filled up with zeros to whole
// packs of 16 bytes. The left factor has the 9 C' numbers around each pixel, zeros beyond its
// image; they are fetched from where they lie. The right one, [9 C', C'], has the weights.
#pragma once
#include "../common/gpu_math.h"
#include "../common/gpu_memory.h"
#include "../common/gpu_tile.h"
#include "kernel.h"

namespace fastres::conv_stack {

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
using gpu::RowSums;
using gpu::Spot;
using gpu::widen;

// 4 warps, for up to 32 channels and for more; of float64 fewer results for each thread.
template <class Arithmetic, bool kFew>
using LayerTile =
    std::conditional_t<sizeof(typename Arithmetic::T) == 8,
                       gpu::ProductTile<Arithmetic, 32, 32, 16, 16>,
                       std::conditional_t<kFew, gpu::ProductTile<Arithmetic, 64, 32, 16, 32>,
                                          gpu::ProductTile<Arithmetic, 64, 64, 32, 32>>>;
// 3 blocks of threads to an SM: 168 registers each.
constexpr int kBlocksPerSm = 3;

// Pixels in scratch.
struct Pixels {
  int64_t count;      // N H W
  int height, width;  // of an image
  int channels;       // C'
};

// Where an element of x or y is.
struct Image {
  int64_t channels, pixels;  // C, H W
  bool channels_last;
  __device__ __forceinline__ int64_t at(int64_t image, int64_t pixel, int64_t channel) const {
    return channels_last ? (image * pixels + pixel) * channels + channel
                         : (image * channels + channel) * pixels + pixel;
  }
};
inline Image image_of(const Shape& s) { return {s.channels, s.height * s.width, s.channels_last}; }

// Fetches the panels of the left factor, of the pixels from `top` on, in the order of k.
template <class Tile> class Windows {
  using T = typename Tile::T;

 public:
  __device__ __forceinline__ Windows(const T* x, const Pixels& pixels, int64_t top)
      : x_(x), p_(pixels), tap_(0), channel_(int(threadIdx.x % 8) * gpu::kPackSize<T>) {
    first_ = top + threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t pixel = first_ + i * kStep, row = pixel / p_.width;
      column_[i] = int(pixel - row * p_.width);
      row_[i] = pixel < p_.count ? int(row % p_.height) : -2;  // -2: and so not inside
    }
    normalize();
  }
  __device__ __forceinline__ void operator()(char* panel) {
    const int dy = tap_ / 3 - 1, dx = tap_ % 3 - 1;
    T* const to = reinterpret_cast<T*>(panel) + threadIdx.x / 8 * gpu::kAlongStride<T> +
                  threadIdx.x % 8 * gpu::kPackSize<T>;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const bool inside = tap_ < 9 && unsigned(row_[i] + dy) < unsigned(p_.height) &&
                          unsigned(column_[i] + dx) < unsigned(p_.width);
      const int64_t pixel = first_ + i * kStep + int64_t(dy) * p_.width + dx;
      gpu::start_copy<16>(to + i * kStep * gpu::kAlongStride<T>,
                          inside ? x_ + pixel * p_.channels + channel_ : x_, inside);
    }
    channel_ += gpu::kDepth<T>;
    normalize();
  }

 private:
  static constexpr int kStep = Tile::kThreads / 8, kPacks = Tile::kM / kStep;
  static_assert(Tile::kM % kStep == 0, "as many packs for each thread");
  __device__ __forceinline__ void normalize() {
    for (; channel_ >= p_.channels; ++tap_) channel_ -= p_.channels;
  }
  const T* const x_;
  const Pixels& p_;
  int tap_, channel_;  // of the thread's packs
  int64_t first_;      // its first pixel
  int row_[kPacks], column_[kPacks];
};

// sums += the tile of the convolution at the corner.
template <class Tile>
__device__ __forceinline__ void convolve(Products<Tile>& sums, const Corner<Tile>& corner,
                                         const Pixels& pixels, const typename Tile::T* x,
                                         const Matrix<typename Tile::T>& weights) {
  using T = typename Tile::T;
  Windows<Tile> windows(x, pixels, corner.row);
  int k = 0;
  auto fetch = [&](char* slot) {
    windows(slot);
    gpu::fetch_panel<Tile::kN>(slot + gpu::panel_bytes(Tile::kM), weights, false, corner.col, k,
                               Tile::kThreads);
    k += gpu::kDepth<T>;
  };
  const int steps = int(ceil_div(weights.rows, gpu::kDepth<T>));
  gpu::Ring<gpu::kStages, decltype(fetch)> ring(gpu::dynamic_shared(), gpu::kSlotBytes<Tile>, steps,
                                                fetch);
  for (int step = 0; step < steps; ++step) {
    const char* slot = ring.next();
    gpu::multiply(sums, gpu::panel_at<true, Tile::kM, T>(slot),
                  gpu::panel_at<false, Tile::kN, T>(slot + gpu::panel_bytes(Tile::kM)));
  }
}

// a = relu(conv(x, w1) + b1)
template <class Tile> struct HiddenArgs {
  using T = typename Tile::T;
  Pixels pixels;
  const T* x;   // [N H W, C']
  Matrix<T> w;  // [9 C', C']
  const T* b;   // [C]
  int bias;     // C
  Rows<T> a;    // [N H W, C']
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerSm)
    hidden_kernel(HiddenArgs<Tile> given) {
  using A = typename Tile::A;
  const Corner<Tile> corner(given.pixels.channels);
  Products<Tile> z;
  convolve(z, corner, given.pixels, given.x, given.w);
  const Columns<Tile> bias(given.b, corner.col, given.bias);
  for_spots<Tile>([&](const Spot& s) {
    Pair<A> a;
#pragma unroll
    for (int e = 0; e < 2; ++e)  // 0 beyond C even where x is infinite
      a.v[e] = corner.col + s.col + e < given.bias
                   ? Math<A>::positive_part(z.at(s, e) + bias.v[s.j][e])
                   : A(0);
    given.a.store(corner.row + s.row, corner.col + s.col, a);
  });
}

// x <- relu(x + p), p = gate * (conv(a, w2) + b2), with its sums.
template <class Tile> struct StreamArgs {
  using T = typename Tile::T;
  using A = typename Tile::A;
  Pixels pixels;
  const T* a;             // [N H W, C']
  Matrix<T> w;            // [9 C', C']
  const T* b;             // [C]
  int bias;               // C
  StackWeights weights;   // for the gate
  int64_t block;          // of the gate
  Rows<A> x;              // [N H W, C'], before and after
  Rows<T> rounded, also;  // x after, [N H W, C']; or null
  int piece;              // pixels of an image that are summed up together, a power of two up to 32
  A* sums;                // [3, N H W / piece, tiles of a row]; null: not wanted
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerSm)
    stream_kernel(StreamArgs<Tile> given) {
  using A = typename Tile::A;
  SHARED_ARRAY(A, shared_sums, [3 * Tile::kWarpsN * Tile::kM]);
  const Pixels& pixels = given.pixels;
  const Corner<Tile> corner(pixels.channels);
  Products<Tile> f;
  convolve(f, corner, pixels, given.a, given.w);
  const Columns<Tile> bias(given.b, corner.col, given.bias);
  const StackWeights& w = given.weights;
  A gate[Tile::kRows];
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int64_t row = corner.row + gpu::first_row<Tile>() + 8 * r;
    const int64_t image = row / (int64_t(pixels.height) * pixels.width);
    gate[r] = w.gate && row < pixels.count
                  ? *at<A>(w.gate, given.block * w.gate_block_stride + image * w.gate_row_stride)
                  : A(1);
  }
  RowSums<Tile, 3> sums;
  for_spots<Tile>([&](const Spot& s) {
    const int64_t row = corner.row + s.row;
    const int col = corner.col + s.col;
    Pair<A> x = given.x.load(row, col);
    if (!given.x.count(row, col)) return;
    A(&sum)[3] = sums.v[s.of_row()];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (col + e >= given.bias) continue;
      const A p = gpu::product(gate[s.of_row()], f.at(s, e) + bias.v[s.j][e]);
      sum[0] += x.v[e] * x.v[e], sum[1] += p * p, sum[2] += x.v[e] * p;
      x.v[e] = Math<A>::positive_part(x.v[e] + p);
    }
    given.x.store(row, col, x);
    given.rounded.store(row, col, x);
    given.also.store(row, col, x);
  });
  if (!given.sums) return;
  sums.leave(shared_sums);
  __syncthreads();
  static_assert(Tile::kM % 32 == 0 && Tile::kThreads >= Tile::kM, "whole warps have rows");
  if (threadIdx.x >= Tile::kM) return;
  const int64_t row = corner.row + threadIdx.x, pieces = pixels.count / given.piece;
  A total[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) total[i] = RowSums<Tile, 3>::total(shared_sums, i, threadIdx.x);
  gpu::sum_warp_lanes(total, given.piece);
  if (row % given.piece != 0 || row >= pixels.count) return;
#pragma unroll
  for (int i = 0; i < 3; ++i)
    given.sums[(i * pieces + row / given.piece) * corner.count + corner.number] = total[i];
}

}  // namespace fastres::conv_stack
