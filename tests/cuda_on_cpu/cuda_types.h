// cuda_types: bfloat16, float16 and the vector types for hosts without a CUDA toolkit.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  _Float16 value;
};
inline float __half2float(__half v) { return v.value; }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
