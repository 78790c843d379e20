// gpu_reduce: sums over the threads that share a row, in a fixed order.
#pragma once
#include "gpu.h"

namespace fastres::gpu {

// Replaces each v[i] by its sum over an aligned group of `lanes` threads, a power of two up to 1024
// and the same for the whole block, all of whose threads must call it.
template <int kCount, class A>
__device__ __forceinline__ void sum_warp_lanes(A (&v)[kCount], int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(~0u, v[i], distance);
}
template <int kCount, class A>
__device__ __forceinline__ void sum_lanes(A (&v)[kCount], int lanes) {
  sum_warp_lanes(v, lanes < 32 ? lanes : 32);
  if (lanes <= 32) return;
  SHARED_ARRAY(A, of_warp, [32][kCount]);
  const int warp = threadIdx.x / 32, warps = lanes / 32;
  __syncthreads();  // the sums of the call before this one have been read
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < kCount; ++i) of_warp[warp][i] = v[i];
  __syncthreads();
  const int first = warp & -warps;
  for (int i = 0; i < kCount; ++i) v[i] = of_warp[first][i];
#pragma unroll 1  // at most 31 steps, once per row: unrolled it is half of a kernel's code
  for (int w = 1; w < warps; ++w)
    for (int i = 0; i < kCount; ++i) v[i] += of_warp[first + w][i];
}

// The second stage of sums split over blocks: out[i] = sum of parts[i, :]. One warp per sum.
template <class A>
__global__ void sum_parts_kernel(const A* parts,  // [count, size]
                                 A* out,          // [count]
                                 int64_t count, int size) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t step = int64_t(gridDim.x) * warps;
  for (int64_t i = int64_t(blockIdx.x) * warps + threadIdx.x / 32; i < count; i += step) {
    A v[1] = {};
#pragma unroll 8  // independent loads: 8 * 32 parts take one latency
    for (int part = lane; part < size; part += 32) v[0] += parts[i * size + part];
    sum_warp_lanes(v, 32);
    if (lane == 0) out[i] = v[0];
  }
}

}  // namespace fastres::gpu
