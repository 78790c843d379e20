// dtype: the element types of tensors, without a torch header, for the kernels of both devices.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTRES_HD __host__ __device__ __forceinline__
#else
#define FASTRES_HD inline __attribute__((always_inline))
#endif

namespace fastres {

enum class Dtype : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Of the type in which sums of it are accumulated.
constexpr int64_t accumulate_size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

FASTRES_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

}  // namespace fastres
