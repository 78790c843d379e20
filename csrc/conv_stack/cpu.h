// conv_stack on the CPU: how the work is cut up, and the kernel that does a piece of it.
//
// Channels stand in the lanes of vectors: an image is kept as planes of 16 channels, pixel by
// pixel, with a border of zeros, so that no tap of a convolution is a special case. Images go
// through all blocks on one thread, as many as its second cache holds; where there are too few for
// that, and it pays, all threads take the same images and share out the rows of every convolution.
#pragma once
#include "../common/isa.h"
#include "../common/team.h"
#include "kernel.h"

namespace fastres::conv_stack {

constexpr int64_t kPlaneChannels = 16;

inline int64_t planes_of(const Shape& s) { return ceil_div(s.channels, kPlaneChannels); }

// Elements of an image with its border, in whole planes.
inline int64_t image_size(const Shape& s) {
  return planes_of(s) * (s.height + 2) * (s.width + 2) * kPlaneChannels;
}

// Whether tile registers take the products (cpu_pairs.h).
inline bool in_pairs(const Shape& s) {
  return isa() == Isa::kAmx && s.dtype == Dtype::kBFloat16 && s.channels % kPlaneChannels == 0;
}

// Planes that are written at a time: two share what is read for them. Tile registers take one, for
// which two times 16 pixels share the weights.
inline int64_t planes_of_task(const Shape& s) { return in_pairs(s) ? 1 : 2; }

// Whether threads had better take all images together than wait for those that have some of their
// own (measured with two). A convolution must be large enough for them to meet: 64 Ki products of
// each tap, or 8 Mi in tile registers, of which three images go faster alone. But to bring the
// weights of 128 channels into pairs takes long whatever the image.
inline bool pays_to_share(const Shape& s, int64_t threads) {
  const int64_t products = s.batch * s.channels * s.channels * s.height * s.width;
  if (in_pairs(s)) return s.channels >= 128 || (s.batch < threads && products >= 8 << 20);
  return products >= 64 << 10;
}

// Rows of pixels of `images`, of the planes of a task each. Each row has its three partial sums,
// whoever does it, and so the same bits.
inline int64_t rows_of(const Shape& s, int64_t images) {
  return ceil_div(planes_of(s), planes_of_task(s)) * images * s.height;
}

// Rows of an image that are one task where `members` share `images`: 64 pixels, for which the
// weights of 16 channels stay in the first cache, but fewer where not all would find a task.
inline int64_t rows_of_task(const Shape& s, int64_t images, int64_t members) {
  const int64_t most = 64 / s.width < s.height ? 64 / s.width : s.height;
  const int64_t share = rows_of(s, images) / members;
  const int64_t rows = members > 1 && share < most ? share : most;
  return rows < 1 ? 1 : rows;
}

// Bytes that `images` need at a time: stream, inner activations, partial sums; in pairs the stream,
// and rounded copies of it and of the inner activations, as many bytes in all.
inline int64_t buffer_bytes(const Shape& s, int64_t images) {
  return images * 2 * image_size(s) * accumulate_size_of(s.dtype) + rows_of(s, images) * 3 * 8;
}

// Images [first, first + images) through all blocks; or all of them, by a team of which `wanted`
// members are expected. buffer: buffer_bytes, on a boundary of 64 bytes.
FASTRES_CPU_KERNEL(forward, const Args&, int64_t first, int64_t images, void* buffer)
FASTRES_CPU_KERNEL(forward_together, const Args&, void* buffer, Team& team, int wanted)

}  // namespace fastres::conv_stack
