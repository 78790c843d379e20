// cuda_slopes: the derivatives act'(z) of all blocks, by a forward pass. A tile of samples stays on
// one multiprocessor; its 4 warps share out the k's of each product, so that few samples are
// through a block soon.
#pragma once
#include "../common/activation.h"
#include "cuda_product.h"

namespace fastres::mlp_stack_paths {

constexpr int kSlopeWarps = 4, kSlopeThreads = kSlopeWarps * 32;
constexpr int kPartStride = kColumns + 8;  // so that the 4 rows of a warp meet in no bank

// How the derivatives of one block and sample are kept: a bit where they are 0 or 1, else elements.
struct SlopeRow {
  bool bits;
  int64_t bytes;  // on boundaries of 16
  template <class T> FASTRES_HD static SlopeRow of(const Shape& s) {
    const bool bits = s.activation == Activation::kRelu || s.activation == Activation::kIdentity;
    const int64_t cols = padded<T>(s.hidden);
    return {bits, ceil_div(bits ? ceil_div(cols, 32) * 4 : cols * int64_t(sizeof(T)), 16) * 16};
  }
  // Of the columns of a pack, from `col` on.
  template <class Columns> __device__ __forceinline__ void load(Columns& to, const char* row,
                                                                int64_t col) const {
    using T = std::remove_reference_t<decltype(to.v[0])>;
    if (!bits) return mlp_stack_paths::load(to, reinterpret_cast<const T*>(row) + col);
    const uint32_t word = reinterpret_cast<const uint32_t*>(row)[col / 32] >> col % 32;
#pragma unroll
    for (int e = 0; e < int(sizeof to / sizeof(T)); ++e) to.v[e] = T(word >> e & 1);
  }
  // Of one column.
  template <class T> __device__ __forceinline__ T value(const char* row, int64_t col) const {
    return bits ? T(reinterpret_cast<const uint32_t*>(row)[col / 32] >> col % 32 & 1)
                : reinterpret_cast<const T*>(row)[col];
  }
};

template <class T> struct SlopesArgs {
  Args a;
  char* slopes;  // [L, B, SlopeRow::bytes]
  char* memory;  // for each block of threads SlopesLayout::rows_bytes, where not in shared memory
};

// Where things are in the memory of a tile of samples.
template <class T, int kRows> struct SlopesLayout {
  static constexpr int kM = 4 * kRows;  // samples
  static constexpr int kPartsBytes = kSlopeWarps * kM * kPartStride * int(sizeof(T));
  int64_t width_stride, hidden_stride;
  int64_t rows_bytes, shared_bytes;  // of x and h; of shared memory without these
  FASTRES_HD explicit SlopesLayout(const Shape& s) {
    width_stride = stride_of<T>(s.width), hidden_stride = stride_of<T>(s.hidden);
    rows_bytes = kM * (width_stride + hidden_stride) * int64_t(sizeof(T));
    shared_bytes = kRingBytes + kPartsBytes;
  }
};

// Which panel comes next: of each block those of W1, then those of W2, which the last has no use
// for.
template <class T> struct SlopePanels {
  const Args& a;
  int64_t block = 0;
  bool second = false;
  int64_t left = 0, k = 0;
  __device__ __forceinline__ void operator()(char* slot) {
    const Shape& s = a.shape;
    if (block + second >= s.blocks) return;
    const int64_t rows = second ? s.width : s.hidden, cols = second ? s.hidden : s.width;
    const T* data =
        at<T>(second ? a.weights.w2 : a.weights.w1, s.shared ? 0 : block * s.width * s.hidden);
    gpu::fetch_panel<kColumns>(slot, gpu::Matrix<T>{data, rows, int(cols)}, true, left, k,
                               kSlopeThreads);
    if ((k += kDepth<T>) < cols) return;
    k = 0;
    if ((left += kColumns) < rows) return;
    left = 0;
    block += second;
    second = !second;
  }
};

// What a tile of samples goes through a block with.
template <class T, int kRows> struct SlopesTile {
  using Layout = SlopesLayout<T, kRows>;
  static constexpr int kM = Layout::kM, kTurns = kM * kColumns / kSlopeThreads;
  const Args& a;
  const Layout& layout;
  T *x, *h, *parts;  // [kM, width_stride], [kM, hidden_stride], [kSlopeWarps, kM, kPartStride]
  int64_t top;       // the first sample

  // The result number `turn` of this thread, of kM x kColumns.
  __device__ __forceinline__ static int row(int turn) {
    return int(threadIdx.x) / kColumns + turn * (kSlopeThreads / kColumns);
  }
  __device__ __forceinline__ static int col() { return threadIdx.x % kColumns; }

  // Leaves the sums of the warps in `parts`: products of `rows` with the panels that come next.
  template <class Ring>
  __device__ __forceinline__ void multiply_rows(const T* rows, int64_t stride, int64_t depth,
                                                Ring& ring) const {
    constexpr int kPacks = kDepth<T> / kPackSize<T> / kSlopeWarps;
    const T* own[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) own[r] = rows + (lane_row() + 4 * r) * stride;
    const int warp = threadIdx.x / 32;
    Sums<T, kRows> sums;
    for (int64_t k = 0; k < depth; k += kDepth<T>)
      multiply<true, kPacks>(sums, own, k, ring.next(), warp * kPacks);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        parts[(warp * kM + lane_row() + 4 * r) * kPartStride + col_of<T, true>(j)] = sums.v[r][j];
    __syncthreads();
  }
  __device__ __forceinline__ T total(int turn) const {
    const T* part = parts + row(turn) * kPartStride + col();
    T sum = part[0];
#pragma unroll
    for (int w = 1; w < kSlopeWarps; ++w) sum += part[w * kM * kPartStride];
    return sum;
  }

  // h = act(z), and act'(z) to `slopes`, of the columns from `left` on; zeros beyond those of h.
  __device__ __forceinline__ void activate(int64_t left, T bias, const SlopeRow& kind,
                                           char* slopes) const {
    const int64_t column = left + col(), cols = padded<T>(a.shape.hidden);
    pick_activation(a.shape.activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant)::value;
#pragma unroll 1
      for (int turn = 0; turn < kTurns; ++turn) {
        const int64_t sample = top + row(turn);
        const bool inside = column < a.shape.hidden;
        const T z = total(turn) + bias, slope = inside ? derivative<kActivation>(z) : T(0);
        char* const to = slopes + sample * kind.bytes;
        if (column < cols)
          h[row(turn) * layout.hidden_stride + column] = inside ? value<kActivation>(z) : T(0);
        if (kind.bits) {
          const unsigned word = __ballot_sync(~0u, slope != 0);
          if (sample < a.shape.batch && column < cols && column % 32 == 0)
            reinterpret_cast<uint32_t*>(to)[column / 32] = word;
        } else if (sample < a.shape.batch && column < cols) {
          reinterpret_cast<T*>(to)[column] = slope;
        }
      }
    });
  }
};

template <class T, int kRows, bool kShared>
__global__ void __launch_bounds__(kSlopeThreads, 1) slopes_kernel(SlopesArgs<T> given) {
  using Tile = SlopesTile<T, kRows>;
  const Args& a = given.a;
  const Shape& s = a.shape;
  const SlopesLayout<T, kRows> layout(s);
  const SlopeRow kind = SlopeRow::of<T>(s);
  char* const shared = gpu::dynamic_shared();
  T* const parts = reinterpret_cast<T*>(shared + kRingBytes);
  T* const x = reinterpret_cast<T*>(kShared ? shared + layout.shared_bytes
                                            : given.memory + blockIdx.x * layout.rows_bytes);
  T* const h = x + Tile::kM * layout.width_stride;
  const int64_t hidden = s.hidden, width = s.width;

  for (int64_t top = int64_t(blockIdx.x) * Tile::kM; top < s.batch;
       top += int64_t(gridDim.x) * Tile::kM) {
    const Tile tile{a, layout, x, h, parts, top};
    for (int64_t i = threadIdx.x; i < Tile::kM * layout.width_stride; i += kSlopeThreads) {
      const int64_t sample = top + i / layout.width_stride, col = i % layout.width_stride;
      x[i] = sample < s.batch && col < width ? *at<T>(a.x, sample * width + col) : T(0);
    }
    SlopePanels<T> panels{a};
    gpu::Ring<kSlots, SlopePanels<T>> ring(shared, kSlotBytes, 0x7fffffff, panels);
    for (int64_t block = 0; block < s.blocks; ++block) {
      const int64_t set = s.shared ? 0 : block;
      const T *b1 = at<T>(a.weights.b1, set * hidden), *b2 = at<T>(a.weights.b2, set * width);
      for (int64_t left = 0; left < hidden; left += kColumns) {
        const int64_t col = left + Tile::col();
        const T bias = col < hidden ? b1[col] : T(0);
        tile.multiply_rows(x, layout.width_stride, width, ring);
        tile.activate(left, bias, kind, given.slopes + block * s.batch * kind.bytes);
      }
      if (block + 1 == s.blocks) break;
      T gates[Tile::kTurns];
#pragma unroll
      for (int turn = 0; turn < Tile::kTurns; ++turn) {
        const int64_t sample = top + Tile::row(turn);
        gates[turn] = a.weights.gate && sample < s.batch
                          ? *at<T>(a.weights.gate, block * a.weights.gate_block_stride +
                                                       sample * a.weights.gate_row_stride)
                          : T(1);
      }
      for (int64_t left = 0; left < width; left += kColumns) {
        const int64_t col = left + Tile::col();
        const T bias = col < width ? b2[col] : T(0);
        tile.multiply_rows(h, layout.hidden_stride, hidden, ring);
#pragma unroll
        for (int turn = 0; turn < Tile::kTurns; ++turn)
          if (col < width)
            x[Tile::row(turn) * layout.width_stride + col] +=
                gpu::product(gates[turn], tile.total(turn) + bias);
      }
    }
  }
}

}  // namespace fastres::mlp_stack_paths
