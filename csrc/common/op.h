// op: what the host side of every operator needs from torch, through its stable ABI: dtypes,
// layouts, pointers, launch. An op.cpp is compiled twice: into _C (schema, CPU, NumPy) and, with
// FASTRES_CUDA defined, into _C_cuda (CUDA).
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dtype.h"
#include "uninitialized.h"

namespace fastres {

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

// An uninitialised result of a and b: in the layout of the first that has dense samples, if any.
inline Tensor uninitialized_like(const Tensor& a, const Tensor& b) {
  if (has_dense_samples(a)) return uninitialized_like(a);
  if (has_dense_samples(b)) return uninitialized_like(b);
  return uninitialized_contiguous(a);
}

// t itself where it has the layout of `like`, else a copy that has it.
inline Tensor in_layout(const Tensor& t, const Tensor& like) {
  return same_layout(t, like) ? t : filled(uninitialized_like(like), t);
}
inline OptionalTensor in_layout(const OptionalTensor& t, const Tensor& like) {
  return t ? OptionalTensor(in_layout(*t, like)) : t;
}

// t itself where it is contiguous, else a copy.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : filled(uninitialized_contiguous(t), t);
}
inline OptionalTensor as_contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(as_contiguous(*t)) : t;
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
