// cuda_resident: the stack on CUDA in one launch, for the stages of networks for CIFAR. An image
// stays on one multiprocessor through all blocks: its stream in registers, what is convolved in
// shared memory, with zeros around it, so that a convolution is 9 shifted products. The weights
// pass by in a ring, fetched ahead over the borders of convolutions and blocks.
#pragma once
#include "cuda_layers.h"

namespace fastres::conv_stack {

// A value as factor of a product by tensor cores: of float32 rounded to tf32.
template <class T, bool kTf32> __device__ __forceinline__ T factor(gpu::accumulate_t<T> v) {
  if constexpr (kTf32) {
    const uint32_t bits = gpu::to_tf32(v);
    memcpy(&v, &bits, 4);
  }
  return narrow<T>(v);
}

// Images of kSide x kSide x kChannels. A product has 16 pixels of a row, or, of images 8 wide, 8 of
// a row and 8 of the row 4 below. Each warp has 16 channels of kI products, one below the other: a
// row of pixels that it loads once is of use to three of them.
template <class Arithmetic, int kChannels_, int kSide_, int kI_> struct ResidentTile {
  using T = typename Arithmetic::T;
  using A = float;
  static constexpr bool kTf32 = sizeof(T) == 4;
  static constexpr int kChannels = kChannels_, kSide = kSide_, kI = kI_, kJ = 2;
  static constexpr int kWarpsN = kChannels / 16, kWarps = kSide * kSide / 16 / kI * kWarpsN;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPitch = kSide + 2;  // pixels from row to row, with zeros on both sides
  static constexpr int kPerRow = kSide < 16 ? 1 : kSide / 16;      // products
  static constexpr int kLower = kSide < 16 ? 4 * kPitch : 8;       // pixels to a product's lower
  static constexpr int kLowerInside = kSide < 16 ? 4 * kSide : 8;  // half, and without the zeros
  // Elements from pixel to pixel and from row to row of weights, [C in, C out]: none of 8 pixels or
  // rows that are read at a time share a bank.
  static constexpr int kStride = kChannels + 16 / int(sizeof(T));
  static constexpr int kWeightStride = gpu::across_stride(kChannels);
  static constexpr int kMap = kPitch * kPitch * kStride;  // elements of an image
  // A slot has the weights of three taps and, kBias elements on, the bias.
  static constexpr int kBias = 3 * kChannels * kWeightStride;
  static constexpr int kSlots = 3, kSlotBytes = (kBias + kChannels) * int(sizeof(T));
  static constexpr int kBytes =
      kSlots * kSlotBytes + 2 * kMap * int(sizeof(T)) + kWarps * 3 * int(sizeof(A));
};

// What of the image a thread has: its first pixel, row and column, and its first channel.
template <class Tile> struct Place {
  int row, column, channel;  // of the warp
  int lane = threadIdx.x % 32;
  __device__ __forceinline__ Place() {
    const int warp = threadIdx.x / 32, product = warp / Tile::kWarpsN;
    channel = warp % Tile::kWarpsN * 16;
    row = product / Tile::kPerRow * Tile::kI, column = product % Tile::kPerRow * 16;
  }
  // body(i, j, half, pixel with zeros around, pixel without, channel) for each two results of the
  // thread, side by side in their channels.
  template <class Body> __device__ __forceinline__ void for_pairs(const Body& body) const {
    const int own_column = column + lane / 4;
#pragma unroll
    for (int i = 0; i < Tile::kI; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < Tile::kJ; ++j)
          body(i, j, half, (row + i + 1) * Tile::kPitch + own_column + 1 + half * Tile::kLower,
               (row + i) * Tile::kSide + own_column + half * Tile::kLowerInside,
               channel + 8 * j + lane % 4 * 2);
  }
};

template <class Tile> struct Results {
  float v[Tile::kI][Tile::kJ][4] = {};
};

// Fetches the weights of the three taps of one column, [3, C in, C out], and the bias, [C].
template <class Tile> struct Taps {
  using T = typename Tile::T;
  const StackWeights& w;
  int step = 0;  // 6 of each block
  __device__ __forceinline__ void operator()(char* slot) {
    constexpr int kChannels = Tile::kChannels, kPack = gpu::kPackSize<T>,
                  kPacks = kChannels / kPack;
    const int column = step % 3;
    const int64_t block = step / 6;
    const bool second = step / 3 % 2;
    const T* const from = at<T>(second ? w.w2 : w.w1, (block * 9 + column) * kChannels * kChannels);
    const T* const bias = at<T>(second ? w.b2 : w.b1, block * kChannels);
    T* const to = reinterpret_cast<T*>(slot);
    for (int i = threadIdx.x; i < 3 * kChannels * kPacks; i += Tile::kThreads) {
      const int row = i / kPacks, tap = row / kChannels, col = i % kPacks * kPack;
      gpu::start_copy<16>(to + row * Tile::kWeightStride + col,
                          from + (row + 2 * tap * kChannels) * kChannels + col, true);
    }
    if (threadIdx.x < kPacks)
      gpu::start_copy<16>(to + Tile::kBias + threadIdx.x * kPack, bias + threadIdx.x * kPack, true);
    ++step;
  }
};

// sums += the convolution of the image in `map`. Returns the bias, which is there until the ring's
// next slot.
template <class Tile, class Ring>
__device__ __forceinline__ const typename Tile::T* convolve(Results<Tile>& sums,
                                                            const typename Tile::T* map,
                                                            const Place<Tile>& place, Ring& ring) {
  using T = typename Tile::T;
  constexpr int kStride = Tile::kStride, kHalf = 16 / int(sizeof(T));
  [[maybe_unused]] constexpr int kTimes = Tile::kTf32 ? 1 : 2;  // 2 makes tf32 spill
  const int lane = place.lane, lower = lane / 8 % 2;
  const T* from =
      map + lane / 16 * kHalf +  // from the pixel above and to the left
      (place.row * Tile::kPitch + place.column + lane % 8 + lower * Tile::kLower) * kStride;
  const T* slot = nullptr;
#pragma unroll 1
  for (int column = 0; column < 3; ++column, from += kStride) {
    slot = reinterpret_cast<const T*>(ring.next());
    const gpu::Panel<T, false> weights{slot, Tile::kWeightStride};
#pragma unroll kTimes
    for (int k = 0; k < Tile::kChannels; k += 2 * kHalf) {
      uint32_t b[3][4];
#pragma unroll
      for (int tap = 0; tap < 3; ++tap)
        gpu::load_fragment(b[tap], weights, place.channel, tap * Tile::kChannels + k);
#pragma unroll
      for (int row = 0; row < Tile::kI + 2; ++row) {
        uint32_t a[4];
        gpu::load_matrices<false>(a, from + row * Tile::kPitch * kStride + k);
#pragma unroll
        for (int tap = 0; tap < 3; ++tap) {
          const int i = row - tap;
          if (i < 0 || i >= Tile::kI) continue;
#pragma unroll
          for (int j = 0; j < Tile::kJ; ++j)
            gpu::multiply_add<T>(sums.v[i][j], a, b[tap][j], b[tap][j + 2]);
        }
      }
    }
  }
  return slot + Tile::kBias + place.channel + lane % 4 * 2;
}

template <class Tile> struct ResidentArgs {
  Args a;
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) resident_kernel(ResidentArgs<Tile> given) {
  using T = typename Tile::T;
  const Args& a = given.a;
  const Shape& s = a.shape;
  char* const shared = gpu::dynamic_shared();
  T* const map = reinterpret_cast<T*>(shared + Tile::kSlots * Tile::kSlotBytes);
  T* const hidden = map + Tile::kMap;
  float* const shared_sums = reinterpret_cast<float*>(hidden + Tile::kMap);  // [kWarps, 3]
  const int64_t image = blockIdx.x;
  const int blocks = int(s.blocks);
  const Image layout{Tile::kChannels, Tile::kSide * Tile::kSide, s.channels_last};
  const Place<Tile> place;
  const auto store = [](T* to, float first, float second) {
    *reinterpret_cast<Pair<T>*>(to) = {
        {factor<T, Tile::kTf32>(first), factor<T, Tile::kTf32>(second)}};
  };
  const auto write_sums = [&](int block) {
    if (threadIdx.x >= 3) return;
    float sum = 0;
    for (int warp = 0; warp < Tile::kWarps; ++warp) sum += shared_sums[warp * 3 + threadIdx.x];
    *at<float>(a.sums, (int64_t(block) * 3 + threadIdx.x) * s.batch + image) = sum;
  };

  Taps<Tile> taps{a.weights};
  gpu::Ring<Tile::kSlots, Taps<Tile>> ring(shared, Tile::kSlotBytes, blocks * 6, taps);
  for (int i = threadIdx.x; i < 2 * Tile::kMap / gpu::kPackSize<T>; i += Tile::kThreads)
    gpu::store16(map + i * gpu::kPackSize<T>, uint4{0, 0, 0, 0});
  __syncthreads();
  Results<Tile> x;  // the stream
  place.for_pairs([&](int i, int j, int half, int padded, int pixel, int channel) {
    float (&v)[4] = x.v[i][j];
    for (int e = 0; e < 2; ++e)
      v[2 * half + e] = widen(*at<T>(a.x, layout.at(image, pixel, channel + e)));
    store(map + padded * Tile::kStride + channel, v[2 * half], v[2 * half + 1]);
  });

#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    {
      Results<Tile> z;
      const T* const bias = convolve(z, map, place, ring);
      if (a.sums && block > 0) write_sums(block - 1);
      place.for_pairs([&](int i, int j, int half, int padded, int, int channel) {
        float v[2];
        for (int e = 0; e < 2; ++e)
          v[e] = Math<float>::positive_part(z.v[i][j][2 * half + e] + widen(bias[8 * j + e]));
        store(hidden + padded * Tile::kStride + channel, v[0], v[1]);
      });
    }
    const StackWeights& w = a.weights;
    const float gate =
        w.gate ? *at<float>(w.gate, block * w.gate_block_stride + image * w.gate_row_stride) : 1.0f;
    Results<Tile> f;
    const T* const bias = convolve(f, hidden, place, ring);
    float sum[3] = {};
    place.for_pairs([&](int i, int j, int half, int padded, int, int channel) {
      float* const v = x.v[i][j] + 2 * half;
      for (int e = 0; e < 2; ++e) {
        const float p = gpu::product(gate, f.v[i][j][2 * half + e] + widen(bias[8 * j + e]));
        sum[0] += v[e] * v[e], sum[1] += p * p, sum[2] += v[e] * p;
        v[e] = Math<float>::positive_part(v[e] + p);
      }
      store(map + padded * Tile::kStride + channel, v[0], v[1]);
    });
    if (!a.sums) continue;
    gpu::sum_warp_lanes(sum, 32);
    for (int i = 0; i < 3 && place.lane == 0; ++i) shared_sums[threadIdx.x / 32 * 3 + i] = sum[i];
  }
  if (a.sums && blocks > 0) {
    __syncthreads();
    write_sums(blocks - 1);
  }
  place.for_pairs([&](int i, int j, int half, int, int pixel, int channel) {
    for (int e = 0; e < 2; ++e)
      *at<T>(a.y, layout.at(image, pixel, channel + e)) = narrow<T>(x.v[i][j][2 * half + e]);
  });
}

}  // namespace fastres::conv_stack
