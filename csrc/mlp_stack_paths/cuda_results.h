// cuda_results: what is told of the rows of a sample when it is through all blocks.
#pragma once
#include "../common/gpu_reduce.h"
#include "cuda_rows.h"

namespace fastres::mlp_stack_paths {

// The true values of a row, to `to`, [D], if that is wanted.
template <class T>
__device__ __forceinline__ void write_row(T* to, const T* row, int power, int64_t width) {
  for (int64_t col = threadIdx.x % 32; to && col < width; col += 32)
    to[col] = T(scaled(double(row[col]), -power));
}

// ||sum of all rows - g|| and ||g||; `of_warp`: shared, of each warp.
template <class T>
__device__ __forceinline__ void write_norms(const Args& a, const Rows<T>& rows, const int* powers,
                                            int64_t sample, double (*of_warp)[2]) {
  const int count = int(a.shape.rows());
  int common = 0x7fffffff;  // the exponent by which the largest row is below 1
  for (int row = -1; row < count; ++row) {
    const int place = row < 0 ? 0 : rows.places.given(row), size = order(rows.sizes[place]);
    if (size != kNothing && powers[place] - size < common) common = powers[place] - size;
  }
  if (common == 0x7fffffff) common = 0;
  double squares[2] = {};  // held by `common`, and as g is: true ones may be beyond the range
  for (int64_t col = threadIdx.x; col < a.shape.width; col += blockDim.x) {
    const double g = rows.at(0)[col];
    double sum = 0;
    for (int row = 0; row < count; ++row) {
      const int place = rows.places.given(row);
      sum += scaled(double(rows.at(place)[col]), common - powers[place]);
    }
    const double miss = sum - scaled(g, common - powers[0]);
    squares[0] += miss * miss, squares[1] += g * g;
  }
  gpu::sum_warp_lanes(squares, 32);
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < 2; ++i) of_warp[threadIdx.x / 32][i] = squares[i];
  __syncthreads();
  if (threadIdx.x >= 2) return;
  double sum = 0;
  for (int warp = 0; warp < int(blockDim.x / 32); ++warp) sum += of_warp[warp][threadIdx.x];
  a.norms[threadIdx.x * a.shape.batch + sample] =
      scaled(::sqrt(sum), threadIdx.x ? -powers[0] : -common);
}

// All results; a warp of each row. `shared`: of 16 bytes for each warp.
template <class T>
__device__ __forceinline__ void write_results(const Args& a, const Rows<T>& rows, int64_t sample,
                                              char* shared) {
  const Shape& s = a.shape;
  const int* powers = rows.powers_of(s.blocks);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t size = s.batch * s.width, offset = sample * s.width;
  const T* g = rows.at(0);
  if (warp == 0) write_row(at<T>(a.gradient, offset), g, powers[0], s.width);
  for (int row = warp; row < s.rows(); row += warps) {
    const int place = rows.places.given(row), power = powers[place];
    const T* held = rows.at(place);
    double sums[2] = {};  // its square, its product with g, as held
    for (int64_t col = lane; col < s.width; col += 32) {
      const double v = held[col];
      sums[0] += v * v, sums[1] += v * double(g[col]);
    }
    gpu::sum_warp_lanes(sums, 32);
    if (lane == 0) {
      a.log2_norms[row * s.batch + sample] = 0.5 * ::log2(sums[0]) - power;
      a.dots[row * s.batch + sample] = scaled(sums[1], -power - powers[0]);
    }
    write_row(at<T>(a.kept, row * size + offset), held, power, s.width);
    if (row > s.longest) write_row(at<T>(a.tail, offset), held, power, s.width);
  }
  write_norms(a, rows, powers, sample, reinterpret_cast<double (*)[2]>(shared));
}

}  // namespace fastres::mlp_stack_paths
