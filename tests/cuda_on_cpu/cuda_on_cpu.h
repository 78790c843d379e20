// cuda_on_cpu: what CUDA C++ adds to C++, so that a .cu file compiles for the CPU and its kernels
// are tested without a GPU. csrc/common/gpu.h includes it wherever the compiler is not nvcc.
#pragma once
#include <cmath>

#include "fibers.h"
#if !defined(CUDA_ON_CPU_OWN_TYPES) && __has_include(<cuda_bf16.h>)
#include <cuda_bf16.h>  // the toolkit's types and conversions are plain C++
#include <cuda_fp16.h>
#else
#include "cuda_types.h"
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ use_SHARED_ARRAY  // does not compile: it would not be poisoned
#define __forceinline__ inline
#define __launch_bounds__(...)

inline const cuda_on_cpu::Index &threadIdx = cuda_on_cpu::thread_index,
                                &blockIdx = cuda_on_cpu::block_index,
                                &blockDim = cuda_on_cpu::block_size,
                                &gridDim = cuda_on_cpu::grid_size;

namespace cuda_on_cpu {

inline bool is_shared(const void* p) {
  const char* c = static_cast<const char*>(p);
  return std::any_of(block.shared.begin(), block.shared.end(),
                     [c](const Region& r) { return c >= r.data && c < r.data + r.bytes; });
}

inline void check_aligned(const char* what, const void* p, unsigned bytes, Site at) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail(what, (": address not a multiple of " + std::to_string(bytes)).c_str(), at);
}

// A static shared array: the first thread of each block that gets there poisons it.
struct StaticShared {
  uint64_t count = 0;
  void enter(void* data, size_t bytes) {
    if (count == block.count) return;
    count = block.count;
    block.shared.push_back({static_cast<char*>(data), bytes});
    poison(data, bytes);
  }
};

template <class T>
T shuffle(const char* what, unsigned mask, T value, unsigned source, Site at) {
  struct Argument {
    T in, out;
    unsigned source;
    bool found;
  } argument{value, value, source, false};
  const auto exchange = [](Lanes lanes) {
    for (unsigned l = 0; l < kWarp; ++l) {
      if (!lanes[l]) continue;
      Argument& to = *static_cast<Argument*>(lanes[l]);
      const auto* from = static_cast<const Argument*>(lanes[to.source % kWarp]);
      to.found = from != nullptr;
      if (from) to.out = from->in;
    }
  };
  meet(what, mask, &argument, exchange, at);
  if (!argument.found) fail(what, ": reads a lane that takes no part", at);
  return argument.out;
}

inline unsigned ballot(const char* what, unsigned mask, bool value, Site at) {
  unsigned argument = value;
  const auto collect = [](Lanes lanes) {
    unsigned bits = 0;
    for (unsigned l = 0; l < kWarp; ++l)
      if (lanes[l]) bits |= *static_cast<unsigned*>(lanes[l]) << l;
    for (unsigned l = 0; l < kWarp; ++l)
      if (lanes[l]) *static_cast<unsigned*>(lanes[l]) = bits;
  };
  meet(what, mask, &argument, collect, at);
  return argument;
}

// The first meeting brings the values, the second keeps them until all have been read.
inline int any_of_block(const char* what, int value, Site at) {
  meet(what, 0, &value, nullptr, at);
  bool any = false;
  for (unsigned t = 0; t < block.threads; ++t)
    any |= *static_cast<const int*>(block.fibers[t]->argument) != 0;
  meet(what, 0, &value, nullptr, at);
  return any;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_SITE cuda_on_cpu::Site at = cuda_on_cpu::Site::here()

inline void __syncthreads(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::meet("__syncthreads", 0, nullptr, nullptr, at);
}
inline int __syncthreads_or(int value, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::any_of_block("__syncthreads_or", value, at);
}
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::meet("__syncwarp", mask, nullptr, nullptr, at);
}
inline unsigned __ballot_sync(unsigned mask, bool value, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot("__ballot_sync", mask, value, at);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = (cuda_on_cpu::lane() & -unsigned(width)) + unsigned(source & (width - 1));
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, lane, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane(), source = lane ^ unsigned(bits);
  const unsigned last = lane | unsigned(width - 1);  // of the group; beyond it a lane reads itself
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, source <= last ? source : lane, at);
}

inline unsigned atomicAdd(unsigned* p, unsigned v) { return std::exchange(*p, *p + v); }
// Not for floats: a sum in no fixed order cannot be repeated bit for bit.
template <class T>
T atomicAdd(T*, T) = delete;
