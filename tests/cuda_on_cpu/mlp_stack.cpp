// mlp_stack on fibers: the launches of csrc/mlp_stack/cuda.cu for ctypes.
#include "../../csrc/mlp_stack/kernel.h"
#include "launches.h"

using namespace fastres::mlp_stack;

extern "C" const char* forward(const Args* args, uint64_t seed) {
  return cuda_on_cpu::with_scratch(*args, seed, [](const Args& a) { launch_cuda(a, nullptr); });
}
extern "C" const char* backward(const BackwardArgs* args, uint64_t seed) {
  return cuda_on_cpu::with_scratch(*args, seed, [](const BackwardArgs& a) {
    launch_cuda_chain(a, nullptr);
    if (a.gw1) launch_cuda_weights(a, nullptr);
  });
}
extern "C" int64_t backward_scratch_bytes(const Shape* shape, int64_t blocks) {
  return scratch_bytes(BackwardArgs{*shape, {}, 0, blocks});
}
extern "C" const char* route(const Shape* shape) { return route_cuda(*shape); }
// Bytes of shared memory that the device has from now on.
extern "C" void set_shared_bytes(int64_t bytes) { cuda_on_cpu::options.shared_bytes = bytes; }
