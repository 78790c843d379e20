// residual_add on fibers: the launches of csrc/residual_add/cuda.cu for ctypes.
#include "../../csrc/residual_add/kernel.h"
#include "launches.h"

using namespace fastres::residual_add;

extern "C" const char* forward(const Args* args, uint64_t seed) {
  return cuda_on_cpu::with_scratch(*args, seed, [](const Args& a) { launch_cuda(a, nullptr); });
}
extern "C" const char* backward(const BackwardArgs* args, uint64_t seed) {
  return cuda_on_cpu::with_scratch(*args, seed,
                                   [](const BackwardArgs& a) { launch_cuda(a, nullptr); });
}
