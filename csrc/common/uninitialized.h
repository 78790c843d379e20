// uninitialized: new tensors, of which nothing is written yet, and what fills them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <vector>

// Torch has it from 2.13 on: what its last call threw.
extern "C" __attribute__((weak, visibility("default"))) const char*
torch_exception_get_what_without_backtrace();

namespace fastres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides,
                            int64_t dims, ScalarType type) {
  int32_t device = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const auto failed = aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(type),
                                               device, like.get_device_index(), &handle);
  // In torch's words: programs look for "out of memory" in them, and try again with less.
  if (failed)
    throw std::runtime_error(torch_exception_get_what_without_backtrace
                                 ? torch_exception_get_what_without_backtrace()
                                 : "torch allocated no tensor; most likely it is out of memory");
  return Tensor(handle);
}

#if defined(__linux__)
// glibc gives memory back to the system when more than twice the largest block that was ever freed
// lies unused at the end of its heap. So a process whose first large blocks are those of a training
// step gets all their pages anew at every step, 2 ms for 10 MB. Once a block of nearly 32 MiB has
// been freed, the largest that counts, it keeps 64 MiB; nothing need be written to the block, and
// where MALLOC_TRIM_THRESHOLD_ or the like is set, that holds.
inline void keep_freed_memory() {
  [[maybe_unused]] static const bool done = [] {
    void* volatile block = std::malloc((32 << 20) - (64 << 10));  // volatile: not to be left out
    std::free(block);
    return true;
  }();
}

// Asks for large pages for a large tensor on the CPU, as NumPy does for its arrays: where 80 MB are
// new to the process, the 20,000 small ones cost more time than what is written to them.
inline Tensor on_large_pages(Tensor t) {
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr()),
                  size = t.numel() * t.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  last = (begin + size) / kPage * kPage;
  if (t.is_cpu() && size >= 2 * kPage) {
    keep_freed_memory();
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
  return t;
}
#else
inline Tensor on_large_pages(Tensor t) { return t; }
#endif

// An uninitialised tensor on the device of `like`. Straight through the C shim: the stable ABI's
// own empty_like and new_empty look the operator up by name, 5 us a call.
inline Tensor uninitialized(const Tensor& like, std::initializer_list<int64_t> sizes,
                            ScalarType type) {
  int64_t stride[4] = {1, 1, 1, 1};
  for (size_t d = sizes.size(); d-- > 1;)
    stride[d - 1] = stride[d] * std::max<int64_t>(sizes.begin()[d], 1);
  return empty_strided(like, sizes.begin(), stride, sizes.size(), type);
}
inline Tensor uninitialized_like(const Tensor& like) {
  return empty_strided(like, like.sizes().data(), like.strides().data(), like.dim(),
                       like.scalar_type());
}

inline Tensor uninitialized_contiguous(const Tensor& like) {
  std::vector<int64_t> stride(like.dim(), 1);
  for (int64_t d = like.dim(); d-- > 1;) stride[d - 1] = stride[d] * like.size(d);
  return empty_strided(like, like.sizes().data(), stride.data(), like.dim(), like.scalar_type());
}

// `to` with the elements of another tensor.
inline Tensor filled(Tensor to, const Tensor& from) { return torch::stable::copy_(to, from); }

}  // namespace fastres
