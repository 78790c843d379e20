// launches: the launches of a cuda.cu for ctypes, with scratch that tells how it is used.
#pragma once
#include <memory>
#include <string>

#include "fibers.h"

namespace cuda_on_cpu {

// Runs launch(args with scratch); returns what went wrong, or null. Scratch is as large as was
// asked for and full of NaN, each time anew: a byte too many is the address sanitizer's, one never
// written shows. It begins where torch's would.
template <class Args, class Launch>
const char* with_scratch(Args args, uint64_t seed, const Launch& launch) {
  static std::string error;
  options.seed = seed;
  const size_t bytes = size_t(scratch_bytes(args));
  const std::unique_ptr<char[], AlignedDelete> scratch(
      new (std::align_val_t(128)) char[bytes + !bytes]);
  std::memset(scratch.get(), 0xff, bytes);
  args.scratch = bytes ? scratch.get() : nullptr;
  try {
    launch(args);
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
  return nullptr;
}

}  // namespace cuda_on_cpu
