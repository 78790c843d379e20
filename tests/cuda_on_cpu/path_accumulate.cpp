// path_accumulate on fibers: the launch of csrc/path_accumulate/cuda.cu for ctypes.
#include "../../csrc/path_accumulate/kernel.h"

#include "launches.h"

using namespace fastres::path_accumulate;

extern "C" const char* accumulate(const Args* args, uint64_t seed) {
  return cuda_on_cpu::with_scratch(*args, seed, [](const Args& a) { launch_cuda(a, nullptr); });
}
