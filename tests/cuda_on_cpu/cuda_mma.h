// cuda_mma: ldmatrix and mma.sync on fibers, by the fragment layouts that the PTX manual documents
// (and csrc/common/gpu_mma.h sums up). It does not say how sums are rounded: GPUs were found to cut
// them off (Fasi et al. 2021, Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science
// 7:e330), and so it is done here.
#pragma once
#include <type_traits>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

inline void need_whole_warp(const char* what, Site at) {
  if ((block.current | (kWarp - 1)) >= block.threads) fail(what, ": needs a whole warp", at);
}

template <bool kTurned>
void load_matrices(const char* what, uint32_t (&r)[4], const void* row, Site at) {
  need_whole_warp(what, at);
  check_aligned(what, row, 16, at);
  if (!is_shared(row)) fail(what, ": address not in shared memory", at);
  struct Argument {
    uint16_t row[8];
    uint32_t r[4];
  } argument;
  std::memcpy(argument.row, row, 16);
  const auto exchange = [](Lanes lanes) {
    const auto element = [lanes](unsigned matrix, unsigned i, unsigned j) {
      return uint32_t(static_cast<Argument*>(lanes[matrix * 8 + i])->row[j]);
    };
    for (unsigned l = 0; l < kWarp; ++l)
      for (unsigned m = 0, g = l / 4, t = l % 4 * 2; m < 4; ++m)
        static_cast<Argument*>(lanes[l])->r[m] =
            kTurned ? element(m, t, g) | element(m, t + 1, g) << 16
                    : element(m, g, t) | element(m, g, t + 1) << 16;
  };
  meet(what, ~0u, &argument, exchange, at);
  std::memcpy(r, argument.r, sizeof r);
}

inline uint32_t bits_of(float v) {
  uint32_t bits;
  return std::memcpy(&bits, &v, 4), bits;
}

constexpr uint32_t kTf32Bits = 0xffffe000;  // sign, exponent and ten bits behind the point

inline uint32_t to_tf32(float v) {  // to the nearest, ties away from 0
  return std::isnan(v) ? 0x7fffffff : (bits_of(v) + 0x1000) & kTf32Bits;
}

// Element i of the 4 bytes of a register.
template <class T> float element_of(uint32_t bits, int i) {
  if constexpr (sizeof(T) == 4) {
    float v;
    bits &= kTf32Bits;
    return std::memcpy(&v, &bits, 4), v;
  } else {
    const uint16_t half = uint16_t(bits >> 16 * i);
    T v;
    std::memcpy(static_cast<void*>(&v), &half, 2);
    if constexpr (std::is_same_v<T, __half>) return __half2float(v);
    else return __bfloat162float(v);
  }
}

template <class T> struct MmaArgument {
  static constexpr int kEach = 4 / sizeof(T), kDepth = 8 * kEach;  // elements per register, k's
  float d[4];
  uint32_t a[4], b[2];
};

// The sum of kCount numbers: each cut off a bit below the last of the largest one, then the sum cut
// off at 24 bits.
template <int kCount> float cut_sum(const double (&terms)[kCount]) {
  double largest = 0, sum = 0;
  for (double term : terms) largest = std::max(largest, std::abs(term)), sum += term;
  if (largest == 0 || !std::isfinite(sum)) return float(sum);
  const int last = std::ilogb(largest) - 24;
  const double scale = std::ldexp(1.0, -last);
  int64_t units = 0;
  for (double term : terms) units += int64_t(term * scale);
  for (int64_t unit = 2; std::abs(units) >= unit << 23; unit *= 2) units -= units % unit;
  return float(std::ldexp(double(units), last));
}

template <class T> void multiply_warp(Lanes lanes) {
  using Argument = MmaArgument<T>;
  constexpr int kEach = Argument::kEach, kDepth = Argument::kDepth;
  float a[16][kDepth], b[8][kDepth];  // by row of a, by column of b
  for (int l = 0; l < int(kWarp); ++l) {
    const Argument& given = *static_cast<Argument*>(lanes[l]);
    for (int i = 0, g = l / 4, t = l % 4; i < kEach; ++i) {
      for (int r = 0; r < 4; ++r)
        a[g + r % 2 * 8][t * kEach + i + r / 2 * kDepth / 2] = element_of<T>(given.a[r], i);
      for (int r = 0; r < 2; ++r)
        b[g][t * kEach + i + r * kDepth / 2] = element_of<T>(given.b[r], i);
    }
  }
  for (int l = 0; l < int(kWarp); ++l)
    for (int i = 0; i < 4; ++i) {
      float& sum = static_cast<Argument*>(lanes[l])->d[i];
      for (int k = 0; k < kDepth; k += kDepth / 2) {
        double terms[kDepth / 2 + 1] = {sum};
        for (int j = 0; j < kDepth / 2; ++j)
          terms[j + 1] = double(a[l / 4 + i / 2 * 8][k + j]) * b[l % 4 * 2 + i % 2][k + j];
        sum = cut_sum(terms);
      }
    }
}

template <class T>
void multiply_add(const char* what, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Site at) {
  need_whole_warp(what, at);
  MmaArgument<T> argument{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  meet(what, ~0u, &argument, multiply_warp<T>, at);
  std::memcpy(d, argument.d, sizeof d);
}

}  // namespace cuda_on_cpu
