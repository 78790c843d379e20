// residual_add on fibers: the launches of csrc/residual_add/cuda.cu for ctypes.
#include <memory>
#include <string>

#include "../../csrc/residual_add/kernel.h"
#include "fibers.h"

namespace {

// Runs one launch; returns what went wrong, or null. Scratch is as large as was asked for and full
// of NaN, each time anew: a byte too many is the address sanitizer's, one never written shows.
template <class Args>
const char* run(const Args& args, uint64_t seed) {
  static std::string error;
  cuda_on_cpu::options.seed = seed;
  Args with_scratch = args;
  const size_t bytes = size_t(scratch_bytes(args));
  const std::unique_ptr<uint64_t[]> scratch(new uint64_t[bytes / 8 + (bytes % 8 != 0)]);
  std::memset(scratch.get(), 0xff, bytes);
  with_scratch.scratch = bytes ? scratch.get() : nullptr;
  try {
    launch_cuda(with_scratch, nullptr);
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" const char* forward(const fastres::residual_add::Args* args, uint64_t seed) {
  return run(*args, seed);
}
extern "C" const char* backward(const fastres::residual_add::BackwardArgs* args, uint64_t seed) {
  return run(*args, seed);
}
