// faults: kernels with one fault each, by which the fibers show that they find it.
#include "../../csrc/common/gpu_async.h"
#include "../../csrc/common/gpu_mma.h"

namespace {

using fastres::gpu::launch;

__global__ void misaligned_kernel(const float* in) { fastres::gpu::load16(in + 1); }

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x % 2) __syncthreads();
  else __syncthreads();
}

__global__ void barrier_left_out_kernel() {
  if (threadIdx.x >= 32) __syncthreads();
}

__global__ void absent_lane_kernel() {
  if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void foreign_mask_kernel() { __shfl_xor_sync(0xffffu, 1.0f, 1); }

// Sums what each thread reads of its neighbour: 2016 if none reads too early.
__global__ void missing_barrier_kernel(float* sum) {
  SHARED_ARRAY(float, all, [64]);
  all[threadIdx.x] = threadIdx.x;
  *sum += all[threadIdx.x ^ 32];
}

// Sums the first of the 16 bytes that each thread copies, before they have landed.
__global__ void early_read_kernel(const float* in, float* sum) {
  SHARED_ARRAY(float, all, [32 * 4]);
  fastres::gpu::start_copy16(all + 4 * threadIdx.x, in, true);
  fastres::gpu::end_copy_group();
  fastres::gpu::wait_for_copies<1>();
  *sum += all[4 * threadIdx.x];
}

__global__ void part_of_a_warp_kernel() {
  float d[4] = {};
  const uint32_t a[4] = {};
  fastres::gpu::multiply_add<float>(d, a, 0, 0);
}

__global__ void not_shared_kernel(const float* in) {
  uint32_t r[4];
  fastres::gpu::load_matrices<false>(r, in);
}

}  // namespace

// Runs fault number `which`; returns what was found, or null.
extern "C" const char* fault(int which, uint64_t seed) {
  static std::string error;
  alignas(16) float data[8] = {};
  cuda_on_cpu::options.seed = seed;
  try {
    if (which == 0) launch("misaligned", misaligned_kernel, dim3(1), 64, nullptr, data);
    if (which == 1) launch("divergent_barrier", divergent_barrier_kernel, dim3(1), 64, nullptr);
    if (which == 2) launch("barrier_left_out", barrier_left_out_kernel, dim3(1), 64, nullptr);
    if (which == 3) launch("absent_lane", absent_lane_kernel, dim3(1), 64, nullptr);
    if (which == 4) launch("foreign_mask", foreign_mask_kernel, dim3(1), 64, nullptr);
    if (which == 5) {
      launch("missing_barrier", missing_barrier_kernel, dim3(1), 64, nullptr, data);
      if (data[0] != 2016) throw std::runtime_error("missing_barrier: wrong sum");
    }
    if (which == 6) launch("too_large", foreign_mask_kernel, dim3(1), 2048, nullptr);
    if (which == 7) {
      launch("early_read", early_read_kernel, dim3(1), 32, nullptr, data, data + 4);
      if (data[4] != 0) throw std::runtime_error("early_read: wrong sum");
    }
    if (which == 8) launch("part_of_a_warp", part_of_a_warp_kernel, dim3(1), 24, nullptr);
    if (which == 9) launch("not_shared", not_shared_kernel, dim3(1), 32, nullptr, data);
    std::atomic<uint64_t> allowed{0};
    if (which == 10)
      fastres::gpu::launch_with_shared("too_much_shared", part_of_a_warp_kernel, allowed, dim3(1),
                                       32, cuda_on_cpu::options.shared_bytes + 1, nullptr);
#if defined(FLOAT_ATOMIC)
    atomicAdd(data, 1.0f);
#endif
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
  return nullptr;
}
