// cuda_product: rows times panels of weights by multiply-adds, for rows that stay where they are.
// 4 kRows rows of a warp times the 64 columns of a panel: of each, 32 results to a thread at 4
// rows. A load of 16 bytes then feeds 10 multiply-adds of each thread and shared memory keeps up.
#pragma once
#include "../common/gpu_math.h"
#include "../common/gpu_memory.h"
#include "../common/gpu_product.h"
#include "kernel.h"

namespace fastres::mlp_stack_paths {

using gpu::at;
using gpu::kDepth;
using gpu::kPackSize;
template <class T> using Pack = gpu::Pack<T, kPackSize<T>>;
using gpu::load;
using gpu::store;
// Two elements at once, of shared memory.
template <class T> __device__ __forceinline__ void load(gpu::Pair<T>& to, const T* from) {
  to = *reinterpret_cast<const gpu::Pair<T>*>(from);
}
template <class T> __device__ __forceinline__ void store(T* to, const gpu::Pair<T>& from) {
  *reinterpret_cast<gpu::Pair<T>*>(to) = from;
}

constexpr int kColumns = 64;                            // of a panel of weights
constexpr int kOwn = 8;                                 // columns of a thread among these
constexpr int kSlots = 3;                               // panels of the ring
constexpr int kSlotBytes = gpu::panel_bytes(kColumns);  // 9 KiB
constexpr int kRingBytes = kSlots * kSlotBytes;

// Where the lane stands among 4 rows and 8 columns. Lanes that differ in bit 0 read the same
// columns, in bit 1 the same rows: of either, a load of 16 bytes takes 2 turns of shared memory.
__device__ __forceinline__ int lane_row() {
  return int(threadIdx.x % 2 + threadIdx.x % 32 / 16 * 2);
}
__device__ __forceinline__ int lane_col() { return threadIdx.x / 2 % 8; }

// Elements from row to row: whole panels, and 16 bytes so that rows begin in different banks.
template <class T> FASTRES_HD int64_t padded(int64_t cols) {
  return ceil_div(cols, kDepth<T>) * kDepth<T>;
}
template <class T> FASTRES_HD int64_t stride_of(int64_t cols) {
  return padded<T>(cols) + kPackSize<T>;
}

// The results of a thread: rows lane_row() + 4 r, and columns by the kind of the panels.
template <class T, int kRows_> struct Sums {
  static constexpr int kRows = kRows_;
  T v[kRows][kOwn] = {};
};
// Of panels with k along rows every 8th column; of those across packs of 16 bytes, side by side
// with those of the other lanes.
template <class T, bool kAlong> __device__ __forceinline__ int col_of(int j) {
  constexpr int kPack = kPackSize<T>;
  return kAlong ? lane_col() + 8 * j : j / kPack * 8 * kPack + lane_col() * kPack + j % kPack;
}

// sums += rows * panel, over kPacks packs of k from pack `first` of the panel on; `k`: of the first
// of the panel.
template <bool kAlong, int kPacks, class T, int kRows>
__device__ __forceinline__ void multiply(Sums<T, kRows>& sums, const T* const (&rows)[kRows],
                                         int64_t k, const char* panel, int first = 0) {
  constexpr int kPack = kPackSize<T>;
  const auto of = gpu::panel_at<kAlong, kColumns, T>(panel);
#pragma unroll sizeof(T) == 4 ? 4 : 1  // float64 has no registers for more
  for (int pack = 0; pack < kPacks; ++pack) {
    const int i = (first + pack) * kPack;
    Pack<T> a[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) gpu::load(a[r], rows[r] + k + i);
    if constexpr (kAlong) {
      Pack<T> b[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) gpu::load(b[j], of.at(col_of<T, true>(j), i));
#pragma unroll
      for (int e = 0; e < kPack; ++e)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int j = 0; j < kOwn; ++j) sums.v[r][j] += a[r].v[e] * b[j].v[e];
    } else {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        Pack<T> b[kOwn / kPack];
#pragma unroll
        for (int j = 0; j < kOwn / kPack; ++j)
          gpu::load(b[j], of.at(col_of<T, false>(j * kPack), i + e));
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int j = 0; j < kOwn; ++j) sums.v[r][j] += a[r].v[e] * b[j / kPack].v[j % kPack];
      }
    }
  }
}

}  // namespace fastres::mlp_stack_paths
