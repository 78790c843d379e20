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
  fastres::gpu::start_copy<16>(all + 4 * threadIdx.x, in, true);
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

// Sums 64 ones, of which the last was not written: it is poison, and not what was there before.
__global__ void unwritten_kernel(float* sum) {
  SHARED_ARRAY(float, all, [64]);
  if (threadIdx.x != 63) all[threadIdx.x] = 1;
  __syncthreads();
  *sum += all[threadIdx.x];
}

// D = A B of A[i, k] = i and B[k, j] = j where k is 0, else 0, so D[i, j] = i j. With the fault each
// lane brings the element of B that another lane should.
template <bool kWrong> __global__ void fragment_kernel(float* error) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  const uint32_t low = cuda_on_cpu::bits_of(row), high = cuda_on_cpu::bits_of(row + 8);
  const uint32_t a[4] = {low, high, low, high};
  const int k = kWrong ? row : column, j = kWrong ? column : row;
  float d[4] = {};
  fastres::gpu::multiply_add<float>(d, a, cuda_on_cpu::bits_of(k == 0 ? j : 0), 0);
  for (int i = 0; i < 4; ++i) *error += std::abs(d[i] - (row + 8 * (i / 2)) * (2 * column + i % 2));
}

// Writes one element more than there are.
__global__ void tail_kernel(float* out, unsigned count) {
  if (threadIdx.x <= count) out[threadIdx.x] = 1;
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
    if (which == 11) {
      launch("unwritten", unwritten_kernel, dim3(1), 64, nullptr, data);
      if (!(data[0] == 64)) throw std::runtime_error("unwritten: wrong sum");
    }
    if (which == 12) {
      launch("fragment", fragment_kernel<false>, dim3(1), 32, nullptr, data);
      if (data[0] != 0) throw std::runtime_error("fragment: wrong without the fault");
      launch("fragment", fragment_kernel<true>, dim3(1), 32, nullptr, data);
      if (data[0] != 0) throw std::runtime_error("wrong_lane: wrong product");
    }
    if (which == 13) {
      std::vector<float> out(17);
      launch("tail", tail_kernel, dim3(1), 32, nullptr, out.data(), unsigned(out.size()));
    }
#if defined(FLOAT_ATOMIC)
    atomicAdd(data, 1.0f);
#endif
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
  return nullptr;
}
