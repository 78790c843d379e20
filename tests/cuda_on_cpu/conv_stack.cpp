// conv_stack on fibers: the launches of csrc/conv_stack/cuda.cu for ctypes.
#include "../../csrc/conv_stack/kernel.h"
#include "launches.h"

using namespace fastres::conv_stack;

extern "C" const char* forward(const Args* args, uint64_t seed) {
  return cuda_on_cpu::with_scratch(*args, seed, [](const Args& a) { launch_cuda(a, nullptr); });
}
extern "C" const char* route(const Shape* shape) { return route_cuda(*shape); }
