// gpu: what kernels use beyond CUDA C++, by one name for nvcc and for a compiler that runs them on
// the CPU. Only this file, gpu_async.h and gpu_mma.h know both; the CPU's half stands on
// tests/cuda_on_cpu.
//   SHARED_ARRAY(float, tile, [16][17]);   stands for __shared__ float tile[16][17];
//   launch("op_kernel", op_kernel<T>, grid, threads, stream, args...);
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "cuda_on_cpu.h"
#endif

namespace fastres::gpu {

#if defined(__CUDACC__)

#define SHARED_ARRAY(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a grid in x, the hardware's limit
constexpr int64_t kMultiprocessors = 132;   // of an H100 or H200; constant, and so are results

// 16 bytes at p, a multiple of 16.
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// a * b, rounded: the compiler never joins it with an addition to one multiply-add.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, int threads, void* stream,
            A... args) {
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

#else

#define SHARED_ARRAY(type, name, ...)       \
  alignas(16) static type name __VA_ARGS__; \
  {                                         \
    static cuda_on_cpu::StaticShared state; \
    state.enter(&name, sizeof name);        \
  }                                         \
  static_assert(true)

constexpr int64_t kMaxBlocks = 5;  // so few that small tensors reach what loops over a full grid
constexpr int64_t kMultiprocessors =
    2;  // likewise, what is for more samples than they take at once

inline uint4 load16(const void* p, cuda_on_cpu::Site at = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::check_aligned("load16", p, 16, at);
  return *static_cast<const uint4*>(p);
}
inline void store16(void* p, uint4 v, cuda_on_cpu::Site at = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::check_aligned("store16", p, 16, at);
  *static_cast<uint4*>(p) = v;
}

inline float product(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline double product(double a, double b) { return a * b; }

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, int threads, void*, A... args) {
  cuda_on_cpu::run_grid(name, {grid.x, grid.y, grid.z}, {unsigned(threads), 1, 1},
                        [&] { kernel(args...); });
}

#endif

}  // namespace fastres::gpu
