// gpu_async: copies from global to shared memory that go on while a thread computes (cp.async), and
// shared memory whose size is known at the launch.
#pragma once
#include <atomic>

#include "gpu.h"
#if !defined(__CUDACC__)
#include "cuda_copies.h"
#endif

namespace fastres::gpu {

#if defined(__CUDACC__)

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// The block's dynamic shared memory.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char fastres_dynamic_shared[];
  return fastres_dynamic_shared;
}

// Starts a copy of kBytes, 4, 8 or 16, to shared memory, or of as many zeros where not `inside`:
// then `from` is any valid address. Both on boundaries of kBytes.
template <int kBytes>
__device__ __forceinline__ void start_copy(void* to, const void* from, bool inside) {
  if constexpr (kBytes == 16)  // past L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "n"(kBytes), "r"(inside ? kBytes : 0)
                 : "memory");
}
// The copies that the thread has started since the last call are a group.
__device__ __forceinline__ void end_copy_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kLeft groups of this thread are under way. Other threads see what has landed
// after a barrier.
template <int kLeft> __device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Bytes of shared memory that a block may have on the current device; 0 without one.
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    cudaGetLastError();  // not an error of the next launch
    return 0;
  }
  return bytes;
}

// As many as every device has from compute capability 8.0 on (8.6, 8.9 and 12.0 no more).
constexpr int64_t kLeastSharedBytes = 99 << 10;

// Lets a kernel have all the shared memory of the current device, beyond the 48 KiB that need no
// leave. `allowed` belongs to the kernel: of each device, a bit once that is done.
template <class Kernel> cudaError_t allow_shared(Kernel* kernel, std::atomic<uint64_t>& allowed) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t(1) << (device % 64);
  if (error != cudaSuccess || (device < 64 && (allowed.load() & bit))) return error;
  cudaFuncAttributes its_own;
  error = cudaFuncGetAttributes(&its_own, kernel);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(most_shared_bytes() - int64_t(its_own.sharedSizeBytes)));
  if (error == cudaSuccess) allowed.fetch_or(bit);
  return error;
}

// launch() with so many bytes of dynamic shared memory.
template <class... P, class... A>
void launch_with_shared(const char* name, void (*kernel)(P...), std::atomic<uint64_t>& allowed,
                        dim3 grid, int threads, int64_t bytes, void* stream, A... args) {
  cudaError_t error = allow_shared(kernel, allowed);
  if (error == cudaSuccess) {
    kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(args...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

#else

inline char* dynamic_shared() { return cuda_on_cpu::block.dynamic.get(); }
template <int kBytes> void start_copy(void* to, const void* from, bool inside,
                                      cuda_on_cpu::Site at = cuda_on_cpu::Site::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "those of cp.async");
  cuda_on_cpu::start_copy("start_copy", to, from, kBytes, inside, at);
}
inline void end_copy_group() { ++cuda_on_cpu::self().groups; }
template <int kLeft> void wait_for_copies() { cuda_on_cpu::wait_for_copies(kLeft); }

inline int64_t most_shared_bytes() { return cuda_on_cpu::options.shared_bytes; }
constexpr int64_t kLeastSharedBytes = 0;  // so that kernels are tried with as little as is wanted

template <class... P, class... A>
void launch_with_shared(const char* name, void (*kernel)(P...), std::atomic<uint64_t>&, dim3 grid,
                        int threads, int64_t bytes, void*, A... args) {
  cuda_on_cpu::run_grid(
      name, {grid.x, grid.y, grid.z}, {unsigned(threads), 1, 1}, [&] { kernel(args...); },
      size_t(bytes));
}

#endif

}  // namespace fastres::gpu
