// cuda_arithmetic: by what 16 rows of a warp are multiplied with the 64 columns of a panel, and
// which results a thread has: those of kRows rows, of each kPacks packs of columns side by side.
#pragma once
#include "cuda_product.h"

namespace fastres::mlp_stack_paths {

// Multiply-adds of the numbers as they are.
template <class T_> struct MultiplyAdds {
  using T = T_;
  using Columns = Pack<T>;
  static constexpr const char* kName = "";
  static constexpr int kRows = 4, kPacks = kOwn / kPackSize<T>;
  Sums<T, kRows> sums;

  __device__ __forceinline__ static int row(int r) { return lane_row() + 4 * r; }
  __device__ __forceinline__ static int col(int pack) {
    return col_of<T, false>(pack * kPackSize<T>);
  }
  __device__ __forceinline__ Columns columns(int r, int pack) const {
    Columns of_pack;
#pragma unroll
    for (int e = 0; e < kPackSize<T>; ++e) of_pack.v[e] = sums.v[r][pack * kPackSize<T> + e];
    return of_pack;
  }
  __device__ __forceinline__ void add(const T* const (&rows)[kRows], int64_t k, const char* panel) {
    multiply<false, kDepth<T> / kPackSize<T>>(sums, rows, k, panel);
  }
  // Lanes that have results of the same rows differ in these bits.
  static constexpr int kColumnLanes = 2 | 4 | 8;
};

// Tensor cores, whose factors are float32 rounded to tf32, 11 bits. kTerms 3: each factor is the
// sum of two of them, 22 bits, and three of the four products are taken; the last is below 2^-22 of
// the first. 1: each is one of them, which is not exact.
//
// Tensor cores cut sums off instead of rounding them (Fasi et al. 2021, Numerical behavior of
// NVIDIA tensor cores), towards 0, so that the errors of many steps do not cancel. Where it is to
// be exact, no more than 8 products of a sum are therefore added up there.
template <int kTerms> struct TensorCores {
  using T = float;
  using Columns = gpu::Pair<T>;
  static constexpr const char* kName = kTerms == 3 ? ", tf32x3" : ", tf32";
  static constexpr int kRows = 2, kPacks = kColumns / 8;
  float sums[kPacks][4] = {};

  __device__ __forceinline__ static int row(int r) { return threadIdx.x % 32 / 4 + 8 * r; }
  __device__ __forceinline__ static int col(int pack) { return 8 * pack + threadIdx.x % 4 * 2; }
  __device__ __forceinline__ Columns columns(int r, int pack) const {
    return {{sums[pack][2 * r], sums[pack][2 * r + 1]}};
  }
  __device__ __forceinline__ void add(const T* const (&rows)[kRows], int64_t k, const char* panel) {
    const auto of = gpu::panel_at<false, kColumns, T>(panel);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 2  // more would not leave enough registers
    for (int i = 0; i < kDepth<T>; i += 8) {
      Factor<4> a;
#pragma unroll
      for (int j = 0; j < 4; ++j) a.set(j, rows[j % 2][k + i + t + j / 2 * 4]);
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        Factor<2> b;
#pragma unroll
        for (int j = 0; j < 2; ++j) b.set(j, *of.at(8 * pack + g, i + t + 4 * j));
        if constexpr (kTerms == 1) {
          gpu::multiply_add<T>(sums[pack], a.v, b.v[0], b.v[1]);
        } else {
          float part[4] = {};  // the small ones first
          gpu::multiply_add<T>(part, a.rest, b.v[0], b.v[1]);
          gpu::multiply_add<T>(part, a.v, b.rest[0], b.rest[1]);
          gpu::multiply_add<T>(part, a.v, b.v[0], b.v[1]);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[pack][e] += part[e];
        }
      }
    }
  }
  static constexpr int kColumnLanes = 1 | 2;

 private:
  // Registers of a factor, and what rounding took of them: 12 bits, of which 11 are read.
  template <int kCount> struct Factor {
    uint32_t v[kCount], rest[kTerms == 3 ? kCount : 1];
    __device__ __forceinline__ void set(int i, float number) {
      v[i] = gpu::to_tf32(number);
      if constexpr (kTerms == 3) {
        float rounded;
        memcpy(&rounded, &v[i], 4);
        number -= rounded;
        memcpy(&rest[i], &number, 4);
      }
    }
  };
};

}  // namespace fastres::mlp_stack_paths
