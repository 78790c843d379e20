// gpu_rows: how the rows of [rows, cols] are dealt out to the threads of a GPU, for any kernel that
// passes over rows and sums along them.
//
// Some lanes (threads, a power of two of them) share a row. They take packs of 16 bytes, side by
// side, several each before the first is used. Rows too wide and too few to fill the GPU are split
// into pieces, a block each, whose sums a second kernel adds in order.
#pragma once
#include "gpu_pack.h"
#include "gpu_reduce.h"

namespace fastres::gpu {

// 256: a block holds 8 warps, so that it sums the widest rows in one step, and is small enough that
// the SM fills up again block by block.
constexpr int kThreads = 256;
// 132 SMs of an H100 or H200 times 8: two turns of the 4 blocks that fit on an SM at 64 registers
// per thread. With fewer blocks rows are split. A constant, so that no result depends on the GPU.
constexpr int64_t kFullGrid = 132 * 8;
// 4 packs of 16 bytes for each thread of a block: below it, a split costs more than it gives.
constexpr int64_t kLeastPieceBytes = kThreads * 4 * 16;
// 256 threads times the 8 columns of a byte of mask: no byte and no pack lies in two pieces.
constexpr int64_t kPieceStep = kThreads * 8;

// How the rows are dealt out.
struct Plan {
  int lane_bits;      // 1 << lane_bits threads per row: shifts, as a division costs 150 cycles
  int pieces;         // blocks per row
  int64_t piece;      // columns per block
  int64_t mask_cols;  // bytes per row of the mask
};

// What a thread has in flight of each tensor: kPacks packs of kWidth columns of one row.
template <class Element, int kWidth_, int kPacks_>
struct Tile {
  using T = Element;
  using A = accumulate_t<T>;
  static constexpr int kWidth = kWidth_, kPacks = kPacks_;
  using Pack = gpu::Pack<T, kWidth>;
};

// The walk of one thread over [rows, cols]. All threads of a block take the same steps, inside the
// tensor or not, so that whole warps meet in shuffles.
template <class Tile>
struct Walk {
  const int64_t rows, cols, begin, end;  // columns begin..end are the block's
  const int lanes, groups, lane, group;  // groups of lanes in the block, and where the thread is
  int64_t top, left;                     // of the tile of the block: groups rows, a tile's columns

  __device__ __forceinline__ Walk(int64_t rows_, int64_t cols_, const Plan& plan)
      : rows(rows_),
        cols(cols_),
        begin(blockIdx.y * plan.piece),
        end(begin + plan.piece < cols ? begin + plan.piece : cols),
        lanes(1 << plan.lane_bits),
        groups(kThreads >> plan.lane_bits),
        lane(threadIdx.x & (lanes - 1)),
        group(threadIdx.x >> plan.lane_bits) {}

  __device__ __forceinline__ void first_rows() { top = int64_t(blockIdx.x) * groups; }
  __device__ __forceinline__ void next_rows() { top += int64_t(gridDim.x) * groups; }
  __device__ __forceinline__ bool more_rows() const { return top < rows; }
  __device__ __forceinline__ void first_cols() { left = begin; }
  __device__ __forceinline__ void next_cols() { left += lanes * (Tile::kPacks * Tile::kWidth); }
  __device__ __forceinline__ bool more_cols() const { return left < end; }

  __device__ __forceinline__ int64_t row() const { return top + group; }
  __device__ __forceinline__ int64_t col(int pack) const {
    return left + (pack * lanes + lane) * Tile::kWidth;
  }
  __device__ __forceinline__ bool inside(int pack) const { return row() < rows && col(pack) < end; }
  __device__ __forceinline__ int64_t offset(int pack) const { return row() * cols + col(pack); }
};

// Sums v over the lanes of the row, to out[i, row, piece].
template <class Tile, int kCount>
__device__ __forceinline__ void store_sums(typename Tile::A (&v)[kCount],
                                           typename Tile::A* out,  // [kCount, rows, pieces]
                                           const Walk<Tile>& walk) {
  sum_lanes(v, walk.lanes);
  if (walk.lane != 0 || walk.row() >= walk.rows) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    out[(i * walk.rows + walk.row()) * gridDim.y + blockIdx.y] = v[i];
}

// Columns per block of a row in so many pieces.
inline int64_t piece_of(int64_t cols, int64_t pieces) {
  return ceil_div(ceil_div(cols, pieces), kPieceStep) * kPieceStep;
}

// Blocks per row: 1 where there are rows enough, or where the pieces would be too small.
inline int64_t pieces_of(int64_t rows, int64_t cols, Dtype dtype) {
  const int64_t most = cols * size_of(dtype) / kLeastPieceBytes;
  if (rows == 0 || most < 2) return 1;
  const int64_t wanted = ceil_div(kFullGrid, rows), pieces = wanted < most ? wanted : most;
  return ceil_div(cols, piece_of(cols, pieces));
}

template <class Tile>
Plan plan_for(int64_t rows, int64_t cols, Dtype dtype) {
  const int64_t pieces = pieces_of(rows, cols, dtype);
  const int least = Tile::kWidth < 8 ? 8 / Tile::kWidth : 1;  // lanes that share a byte of mask
  int bits = 0;
  while (1 << bits < least || (1 << bits < kThreads && Tile::kPacks * Tile::kWidth << bits < cols))
    ++bits;
  return {bits, int(pieces), piece_of(cols, pieces), ceil_div(cols, 8)};
}

// Calls body with the tile for the element type and the shape. 2 packs of 16 bytes: 4 blocks of an
// SM then wait for 64 KiB or more of x and f, twice what keeps the memory busy (4.3 TB/s, 132 SMs,
// a latency of 800 ns: 26 KiB), and the kernels keep within 64 registers. Rows that do not keep to
// 16-byte boundaries go by elements: 8 of them, for 32 KiB at 2 bytes each.
template <class Body>
void with_tile(int64_t cols, Dtype dtype, uintptr_t addresses, const Body& body) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const bool packed = (addresses | (cols * sizeof(T))) % 16 == 0;
    if (packed) body(Tile<T, kPackSize<T>, 2>());
    else body(Tile<T, 1, 8>());
  });
}

// What with_tile needs of the pointers of a launch: null counts as a boundary.
template <class... P>
uintptr_t join_addresses(const P*... p) {
  return (reinterpret_cast<uintptr_t>(p) | ...);
}

inline dim3 grid_of(int64_t rows, const Plan& plan) {
  const int64_t tiles = ceil_div(rows, kThreads >> plan.lane_bits);
  return dim3(unsigned(tiles < kMaxBlocks ? tiles : kMaxBlocks), unsigned(plan.pieces));
}

// Adds up scratch, [count, pieces], to out, [count].
template <class A>
void launch_sum_parts(const void* scratch, void* out, int64_t count, int pieces, void* stream) {
  const int64_t blocks = ceil_div(count, kThreads / 32);
  launch("sum_parts_kernel", sum_parts_kernel<A>,
         dim3(unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks)), kThreads, stream,
         static_cast<const A*>(scratch), static_cast<A*>(out), count, pieces);
}

// Bytes of scratch for so many sums of each row; 0 where rows are not split.
inline int64_t parts_bytes(int64_t sums, int64_t rows, int64_t cols, Dtype dtype) {
  const int64_t pieces = pieces_of(rows, cols, dtype);
  return pieces == 1 ? 0 : sums * rows * pieces * accumulate_size_of(dtype);
}

}  // namespace fastres::gpu
