// mlp_stack_paths on the CPU: how the work is cut up, and the kernels that do a piece of it.
//
// Rows of several lengths and samples stand side by side in the lanes of vectors, length by length:
// lane i of a group holds sample i % b of length i / b, and so the product of a few weights with a
// group is that of mlp_stack. To add length k - 1 to length k is to add a group to itself shifted
// by b lanes. A tile of b samples, 1 to 16, goes through all blocks on one thread, with all its
// lengths in the second cache.
#pragma once
#include "../common/isa.h"
#include "kernel.h"

namespace fastres::mlp_stack_paths {

constexpr int kMostSamples = 16;  // of a tile

inline int64_t element_size(const Shape& s) { return size_of(s.dtype); }

// Derivatives, of each block and 16 samples: where act' is 0 or 1 a bit of each, else values.
inline bool are_bits(const Shape& s) {
  return s.activation == Activation::kRelu || s.activation == Activation::kIdentity;
}
inline int64_t derivative_bytes(const Shape& s) {  // of 16 samples and one hidden feature
  return are_bits(s) ? 2 : 16 * element_size(s);
}
inline int64_t scratch_bytes(const Args& a) {
  const Shape& s = a.shape;
  return s.blocks * ceil_div(s.batch, 16) * s.hidden * derivative_bytes(s);
}

// Samples of a tile: as many as fill vectors, but few enough that all threads have work, and that
// all lengths stay in the second cache. 768 KiB: three quarters of a Xeon's.
inline int64_t tile_samples(const Shape& s, int64_t threads) {
  const auto busiest = [&](int64_t b) { return ceil_div(ceil_div(s.batch, b), threads) * b; };
  const auto bytes = [&](int64_t b) { return (s.rows() + 1) * b * s.width * element_size(s); };
  int64_t b = kMostSamples;
  while (b > 1 && (bytes(b) > (768 << 10) || busiest(b / 2) < busiest(b))) b /= 2;
  return b;
}

// Derivatives of samples [16 first, 16 last), from the forward pass.
// buffer: forward_bytes, on a boundary of 64 bytes.
inline int64_t forward_bytes(const Shape& s) { return 32 * (2 * s.width + s.hidden) * 8; }
FASTRES_CPU_KERNEL(derivatives, const Args&, int64_t first, int64_t last, void* buffer)

// The lengths of samples [row, row + samples), samples a power of 2 of which some may be beyond the
// batch. buffer: lengths_bytes, on a boundary of 64 bytes.
inline int64_t lengths_bytes(const Shape& s, int64_t samples) {
  const int64_t lanes = round_up((s.rows() + 1) * samples, 32);
  const int64_t width = round_up(s.width, 8), hidden = round_up(s.hidden, 8);
  return (lanes * s.width + 32 * (width + 2 * hidden) + 2 * width * hidden) * element_size(s) +
         lanes * 8 + kMostSamples * s.width * 8;
}
FASTRES_CPU_KERNEL(lengths, const Args&, int64_t row, int64_t samples, void* buffer)

}  // namespace fastres::mlp_stack_paths
