// cuda_branch: how large the product of a row is, measured before it is added.
#pragma once
#include "cuda_panels.h"

namespace fastres::mlp_stack_paths {

template <class T> struct Branch {
  const Args& a;
  const SlopeRow& kind;
  const char* slopes;  // of the block and sample
  int64_t block;
  T gate;
  T* hidden;  // [H], this warp's

  // The largest element of J^T times a row, [D]; by a warp.
  __device__ __forceinline__ T largest_of(const T* row) const {
    const Shape& s = a.shape;
    const int64_t lane = threadIdx.x % 32, matrix = s.shared ? 0 : block * s.width * s.hidden;
    const T *w2 = at<T>(a.weights.w2, matrix), *w1 = at<T>(a.weights.w1, matrix);
    __syncwarp();  // the row before this one is done with
    for (int64_t h = lane; h < s.hidden; h += 32) {
      T sum = 0;
      for (int64_t d = 0; d < s.width; ++d) sum += w2[d * s.hidden + h] * row[d];
      hidden[h] = gate * kind.value<T>(slopes, h) * sum;
    }
    __syncwarp();
    T size = 0;
    for (int64_t d = lane; d < s.width; d += 32) {
      T sum = 0;
      for (int64_t h = 0; h < s.hidden; ++h) sum += w1[h * s.width + d] * hidden[h];
      size = ::fmax(size, ::fabs(sum));
    }
    for (int distance = 16; distance > 0; distance /= 2)
      size = ::fmax(size, __shfl_xor_sync(~0u, size, distance));
    return size;
  }
};

}  // namespace fastres::mlp_stack_paths
