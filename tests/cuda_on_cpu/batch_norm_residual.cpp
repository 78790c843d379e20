// batch_norm_residual on fibers: the launches of csrc/batch_norm_residual/cuda.cu for ctypes.
#include "../../csrc/batch_norm_residual/kernel.h"
#include "launches.h"

using namespace fastres::batch_norm_residual;

extern "C" const char* forward(const Args* args, uint64_t seed) {
  return cuda_on_cpu::with_scratch(*args, seed, [](const Args& a) { launch_cuda(a, nullptr); });
}
extern "C" const char* backward(const BackwardArgs* args, uint64_t seed) {
  return cuda_on_cpu::with_scratch(*args, seed,
                                   [](const BackwardArgs& a) { launch_cuda(a, nullptr); });
}
