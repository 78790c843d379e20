// gpu_memory: where things lie in global memory: elements of arrays without a type, and the parts
// of scratch.
#pragma once
#include "dtype.h"

namespace fastres::gpu {

// Element i, of type T; null where there is no array.
template <class T> FASTRES_HD const T* at(const void* p, int64_t i) {
  return p ? static_cast<const T*>(p) + i : nullptr;
}
template <class T> FASTRES_HD T* at(void* p, int64_t i) {
  return p ? static_cast<T*>(p) + i : nullptr;
}

// Cuts scratch up, or counts its bytes where there is none.
class Cutter {
 public:
  explicit Cutter(void* scratch) : scratch_(static_cast<char*>(scratch)) {}
  template <class T> T* take(int64_t count) {
    char* const p = scratch_ ? scratch_ + bytes_ : nullptr;
    bytes_ += ceil_div(count * int64_t(sizeof(T)), 256) * 256;  // as torch aligns its tensors
    return reinterpret_cast<T*>(p);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* scratch_;
  int64_t bytes_ = 0;
};

}  // namespace fastres::gpu
