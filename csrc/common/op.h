// op: what the host side of every operator needs from torch, through its stable ABI: dtypes,
// layouts, pointers, launch. An op.cpp is compiled twice: into _C (schema, CPU, NumPy) and, with
// FASTRES_CUDA defined, into _C_cuda (CUDA).
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dtype.h"

namespace fastres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " must be float64, float32, bfloat16 or float16");
  }
}

inline ScalarType accumulate_type(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// t must have these sizes, this dtype and the device of `like`.
inline void check_small(const char* op, const char* argument, const Tensor& t,
                        std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  bool same = t.scalar_type() == type && t.device() == like.device() &&
              t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == sizes.begin()[d];
  STD_TORCH_CHECK(same, op, ": ", argument, " must have the shape, dtype and device of its use");
}

inline void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
  bool same =
      t.scalar_type() == like.scalar_type() && t.device() == like.device() && t.dim() == like.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  STD_TORCH_CHECK(same, op, ": ", argument,
                  " must have the shape, dtype and device of the first tensor");
}

// Whether the samples (dimension 0) lie one after the other and each fills its own stretch of
// memory, in any order of the other dimensions: contiguous, channels_last, ... Each sample is then
// one row of elements.
inline bool has_dense_samples(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  const int64_t dims = t.dim();
  int64_t expected = 1;
  std::vector<bool> seen(dims, false);
  for (int64_t found = 1; found < dims; ++found) {  // they are few: pick the next stride each time
    int64_t next = -1;
    for (int64_t d = 1; d < dims; ++d)
      if (!seen[d] && (t.size(d) == 1 || t.stride(d) == expected)) next = d;
    if (next < 0) return false;
    seen[next] = true;
    expected *= t.size(next);
  }
  return t.size(0) == 1 || t.stride(0) == expected;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides,
                            int64_t dims, ScalarType type) {
  int32_t device = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(type),
                                                  device, like.get_device_index(), &handle));
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

// An uninitialised result of a and b: in the layout of the first that has dense samples, if any.
inline Tensor uninitialized_like(const Tensor& a, const Tensor& b) {
  if (has_dense_samples(a)) return uninitialized_like(a);
  if (has_dense_samples(b)) return uninitialized_like(b);
  return uninitialized_contiguous(a);
}

// t itself where it has the layout of `like`, else a copy that has it.
inline Tensor in_layout(const Tensor& t, const Tensor& like) {
  if (same_layout(t, like)) return t;
  Tensor copy = uninitialized_like(like);
  return torch::stable::copy_(copy, t);
}
inline OptionalTensor in_layout(const OptionalTensor& t, const Tensor& like) {
  return t ? OptionalTensor(in_layout(*t, like)) : t;
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

inline const void* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr() : nullptr;
}

#if defined(FASTRES_CUDA)
// Calls body(stream) with the tensor's device current and its current stream.
template <class Body> void on_stream_of(const Tensor& t, const Body& body) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  body(stream);
}
#endif

}  // namespace fastres
