// mlp_stack_paths on the CPU: how the work is cut up, and the kernels that do a piece of it.
//
// Each sample goes its own way, as its derivatives choose the weights that its paths go through.
// Its lengths are the rows of a product with those weights alone, which stand in vectors. A tile of
// samples goes through all blocks on one thread, with all lengths in the second cache: one sample
// after the other through a block, whose weights are near then.
#pragma once
#include "../common/isa.h"
#include "kernel.h"

namespace fastres::mlp_stack_paths {

FASTRES_HD int64_t element_size(const Shape& s) { return size_of(s.dtype); }

// Derivatives, of each block and 16 samples: where act' is 0 or 1 a bit of each, else values.
FASTRES_HD bool are_bits(const Shape& s) {
  return s.activation == Activation::kRelu || s.activation == Activation::kIdentity;
}
FASTRES_HD int64_t derivative_bytes(const Shape& s) {  // of 16 samples and one hidden feature
  return are_bits(s) ? 2 : 16 * element_size(s);
}
FASTRES_HD int64_t scratch_bytes(const Args& a) {
  const Shape& s = a.shape;
  return s.blocks * ceil_div(s.batch, 16) * s.hidden * derivative_bytes(s);
}

// How far rows of D and of H numbers stand apart: whole tiles, and in the second case one more, as
// vectors are moved to where no vector begins.
FASTRES_HD int64_t width_stride(const Shape& s) { return round_up(s.width, 16); }
FASTRES_HD int64_t hidden_stride(const Shape& s) { return round_up(s.hidden, 16) + 16; }

// Samples of a tile: as many for each thread, and few enough that all lengths stay in the second
// cache. 768 KiB: three quarters of a Xeon's.
constexpr int64_t kMostSamples = 16;
FASTRES_HD int64_t tile_samples(const Shape& s, int64_t threads) {
  const int64_t fit = (768 << 10) / ((s.rows() + 1) * width_stride(s) * element_size(s));
  const int64_t most = fit < 1 ? 1 : fit < kMostSamples ? fit : kMostSamples;
  return ceil_div(s.batch, threads * ceil_div(s.batch, threads * most));
}

// Derivatives of samples [16 first, 16 last), from the forward pass.
// buffer: forward_bytes, on a boundary of 64 bytes: 32 samples in float32, or 16 in float64.
FASTRES_HD int64_t forward_bytes(const Shape& s) { return 16 * (2 * s.width + s.hidden) * 8; }
FASTRES_CPU_KERNEL(derivatives, const Args&, int64_t first, int64_t last, void* buffer)

// A thread's memory, piece by piece, each on a boundary of 64 bytes.
class Memory {
 public:
  FASTRES_HD explicit Memory(void* buffer) : at_(static_cast<char*>(buffer)) {}
  FASTRES_HD static int64_t bytes(int64_t count, int64_t size) {
    return round_up(count * size, 64);
  }
  template <class T> FASTRES_HD T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(at_);
    at_ += bytes(count, sizeof(T));
    return piece;
  }

 private:
  char* at_;
};

// Rows that go through a block together.
constexpr int64_t kChunk = 36;

// The lengths of samples [sample, sample + samples).
// buffer: lengths_bytes, on a boundary of 64 bytes.
FASTRES_HD int64_t lengths_bytes(const Shape& s, int64_t samples) {
  const int64_t rows = s.rows() + 1, width = width_stride(s), hidden = hidden_stride(s);
  const int64_t size = element_size(s);
  const auto bytes = Memory::bytes;
  const int64_t of_chunk = bytes(kChunk * hidden, size) + bytes(kChunk * width, size) +
                           bytes(width, size) + bytes(s.width, sizeof(double));
  const int64_t of_weights = bytes(s.width * hidden, size) + bytes(s.hidden * width, size) +
                             bytes(hidden, size) + bytes(s.hidden, 8) + 2 * bytes(hidden, 4);
  const int64_t of_sample = 64 + bytes(rows * width, size) + bytes(rows, 8);
  return of_chunk + of_weights + samples * of_sample + 64;
}
FASTRES_CPU_KERNEL(lengths, const Args&, int64_t sample, int64_t samples, void* buffer)

}  // namespace fastres::mlp_stack_paths
