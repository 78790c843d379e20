// gpu_pack: the elements that a thread loads and stores at once, and their conversions.
#pragma once
#include <cstring>

#include "dtype.h"
#include "gpu.h"

namespace fastres::gpu {

// Accumulate type of an element type: float64 for float64, else float32.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

FASTRES_HD double widen(double v) { return v; }
FASTRES_HD float widen(float v) { return v; }
FASTRES_HD float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
FASTRES_HD float widen(__half v) { return __half2float(v); }

// To the nearest, ties to even.
template <class T>
FASTRES_HD T narrow(accumulate_t<T> v) {
  return v;
}
template <>
FASTRES_HD __nv_bfloat16 narrow(float v) {
  return __float2bfloat16_rn(v);
}
template <>
FASTRES_HD __half narrow(float v) {
  return __float2half_rn(v);
}

// kSize consecutive elements: 16 bytes on a 16-byte boundary, or one element anywhere.
template <class T, int kSize_>
struct alignas(kSize_ * sizeof(T)) Pack {
  static constexpr int kSize = kSize_;
  T v[kSize];
};
template <class T>
constexpr int kPackSize = 16 / sizeof(T);

template <class T, int kSize>
__device__ __forceinline__ void load(Pack<T, kSize>& to, const void* from) {
  if constexpr (kSize == 1) {
    to.v[0] = *static_cast<const T*>(from);
  } else {
    const uint4 bits = load16(from);
    memcpy(static_cast<void*>(&to), &bits, 16);
  }
}
template <class T, int kSize>
__device__ __forceinline__ void store(void* to, const Pack<T, kSize>& from) {
  if constexpr (kSize == 1) {
    *static_cast<T*>(to) = from.v[0];
  } else {
    uint4 bits;
    memcpy(&bits, static_cast<const void*>(&from), 16);
    store16(to, bits);
  }
}

// Calls body with an element of the type that dtype names.
template <class Body>
void with_element(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat64: return body(double());
    case Dtype::kFloat32: return body(float());
    case Dtype::kBFloat16: return body(__nv_bfloat16());
    case Dtype::kFloat16: return body(__half());
  }
}

}  // namespace fastres::gpu
