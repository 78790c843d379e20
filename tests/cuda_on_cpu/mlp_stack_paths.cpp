// mlp_stack_paths on fibers: the launch of csrc/mlp_stack_paths/cuda.cu for ctypes.
#include "../../csrc/mlp_stack_paths/kernel.h"
#include "launches.h"

using namespace fastres::mlp_stack_paths;

// With so many bytes of shared memory.
extern "C" const char* paths(const Args* args, uint64_t seed, int64_t shared_bytes) {
  cuda_on_cpu::options.shared_bytes = shared_bytes;
  return cuda_on_cpu::with_scratch(*args, seed, [](const Args& a) { launch_cuda(a, nullptr); });
}
// The name of the last kernel launched.
extern "C" const char* kernel() { return cuda_on_cpu::block.name.c_str(); }
