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

FASTRES_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastres
