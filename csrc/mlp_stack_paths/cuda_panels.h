// cuda_panels: where things are while all rows of a sample go down the blocks, and what passes by
// them: panels of weights and the derivatives of each block.
#pragma once
#include "cuda_rows.h"
#include "cuda_slopes.h"

namespace fastres::mlp_stack_paths {

constexpr int kRowsOfWarp = 16;
constexpr int kMostWarps = 8;  // a tile of 128 rows: each panel of weights is read half as often

// Where things are. Rows in global memory where they do not fit, and there the tile as well where
// it does not.
enum class Memory { kShared, kRowsGlobal, kGlobal };

template <class T> struct PathsLayout {
  int64_t hidden_stride, slope_bytes, rows_bytes, tile_bytes;
  int64_t tile, slopes, rows, shared_bytes;  // in shared memory: bytes before, and in all
  FASTRES_HD PathsLayout(const Shape& s, int warps, Memory memory) {
    hidden_stride = stride_of<T>(s.hidden);
    slope_bytes = SlopeRow::of<T>(s).bytes;
    rows_bytes = Rows<T>::bytes(s);
    tile_bytes = warps * kRowsOfWarp * hidden_stride * int64_t(sizeof(T));
    tile = kRingBytes;
    slopes = tile + (memory == Memory::kGlobal ? 0 : tile_bytes);
    rows = slopes + (memory == Memory::kGlobal ? 0 : 2 * slope_bytes);
    shared_bytes = rows + (memory == Memory::kShared ? rows_bytes : 0);
  }
};

template <class T> struct PathsArgs {
  Args a;
  const char* slopes;  // [L, B, slope_bytes]
  char *rows, *tile;   // for each block of threads, where not in shared memory
  __device__ __forceinline__ const char* slopes_of(int64_t block, int64_t sample,
                                                   int64_t bytes) const {
    return slopes + (block * a.shape.batch + sample) * bytes;
  }
};

// Which panel comes next: of each block, from the last on, for each tile of rows those of W2, then
// those of W1. With the first of a block its derivatives, where they go to shared memory.
template <class T> struct PathPanels {
  const PathsArgs<T>& given;
  int64_t sample, slope_bytes;
  char* slopes;  // [2, slope_bytes]; or null
  int tile_rows;
  int64_t block;  // -1: no more
  int tile = -1;  // -1: the first of a block
  bool second = false;
  int64_t left = 0, k = 0;
  __device__ __forceinline__ void operator()(char* slot) {
    const Shape& s = given.a.shape;
    const Weights& w = given.a.weights;
    if (block < 0) return;
    if (tile < 0) begin_block();
    const int64_t rows = second ? s.hidden : s.width, cols = second ? s.width : s.hidden;
    const T* data = at<T>(second ? w.w1 : w.w2, s.shared ? 0 : block * s.width * s.hidden);
    gpu::fetch_panel<kColumns>(slot, gpu::Matrix<T>{data, rows, int(cols)}, false, left, k,
                               int(blockDim.x));
    if ((k += kDepth<T>) < rows) return;
    k = 0;
    if ((left += kColumns) < cols) return;
    left = 0;
    second = !second;
    if (second || --tile >= 0) return;
    --block;
  }
  __device__ __forceinline__ void begin_block() {
    const int64_t done = given.a.shape.blocks - 1 - block;
    tile = (Places(given.a.shape).added_to(done) - 1) / tile_rows;
    if (!slopes) return;
    const char* from = given.slopes_of(block, sample, slope_bytes);
    char* const to = slopes + done % 2 * slope_bytes;
    for (int64_t i = 16 * threadIdx.x; i < slope_bytes; i += 16 * blockDim.x)
      gpu::start_copy<16>(to + i, from + i, true);
  }
};

}  // namespace fastres::mlp_stack_paths
