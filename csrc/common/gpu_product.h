// gpu_product: products of tiles of matrices, sum over k of a[m, k] * b[n, k], by the tensor cores
// or by multiply-adds.
//
// The factors reach shared memory panel by panel: a panel holds 128 bytes of k, for all rows m or n
// of the tile. In global memory a matrix has k along its rows (as weights in a forward pass) or
// across them (as these weights in a backward pass); so has its panel. Rows of panels are skewed,
// so that no two threads that read at a time meet in a bank.
#pragma once
#include "gpu_async.h"
#include "gpu_mma.h"

namespace fastres::gpu {

// Elements T, sums in A; by the tensor cores or not. float on tensor cores is rounded to tf32.
template <class T_, bool kTensor_> struct Arithmetic {
  using T = T_;
  using A = accumulate_t<T>;
  static constexpr bool kTensor = kTensor_;
};

// Calls body with the arithmetic for the element type.
template <class Body> void with_arithmetic(Dtype dtype, bool tf32, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat64: return body(Arithmetic<double, false>());
    case Dtype::kFloat32:
      return tf32 ? body(Arithmetic<float, true>()) : body(Arithmetic<float, false>());
    case Dtype::kBFloat16: return body(Arithmetic<__nv_bfloat16, true>());
    case Dtype::kFloat16: return body(Arithmetic<__half, true>());
  }
}

// The tile kM x kN of a block of threads, of which each warp has kWarpM x kWarpN.
template <class Arithmetic_, int kM_, int kN_, int kWarpM_, int kWarpN_> struct ProductTile {
  using Arithmetic = Arithmetic_;
  using T = typename Arithmetic::T;
  using A = typename Arithmetic::A;
  static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kWarpsN = kN / kWarpN, kThreads = kM / kWarpM * kWarpsN * 32;
  static constexpr int kI = kWarpM / 16, kJ = kWarpN / 8;  // 16 x 8 results at a time
  static constexpr int kRows = 2 * kI;                     // rows of a thread
};

// The first row and column of a thread's results in the tile: further ones are 8 and more apart.
template <class Tile> __device__ __forceinline__ int first_row() {
  return threadIdx.x / 32 / Tile::kWarpsN * Tile::kWarpM + threadIdx.x % 32 / 4;
}
template <class Tile> __device__ __forceinline__ int first_col() {
  return threadIdx.x / 32 % Tile::kWarpsN * Tile::kWarpN + threadIdx.x % 4 * 2;
}

// Two results of a thread, side by side in a row: where they stand in its registers and the tile.
struct Spot {
  int i, j, half;  // half: 0 or 1, the upper or lower 8 rows of 16
  int row, col;
  __device__ __forceinline__ int of_row() const { return 2 * i + half; }  // below kRows
};
// Columns one after the other with kRolled: less code, where `body` takes nothing from registers by
// column.
template <class Tile, bool kRolled = false, class Body>
__device__ __forceinline__ void for_spots(const Body& body) {
  [[maybe_unused]] constexpr int kTimes = kRolled ? 1 : Tile::kJ;
  const int row = first_row<Tile>(), col = first_col<Tile>();
#pragma unroll kTimes
  for (int j = 0; j < Tile::kJ; ++j)
#pragma unroll
    for (int i = 0; i < Tile::kI; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        body(Spot{i, j, half, row + 16 * i + 8 * half, col + 8 * j});
}

// Two elements side by side.
template <class T> struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};

// The results of a thread.
template <class Tile> struct Products {
  using A = typename Tile::A;
  A v[Tile::kI][Tile::kJ][4] = {};
  __device__ __forceinline__ A& at(const Spot& s, int which) {
    return v[s.i][s.j][2 * s.half + which];
  }
  __device__ __forceinline__ Pair<A> pair(const Spot& s) { return {{at(s, 0), at(s, 1)}}; }
};

template <class T> constexpr int kDepth = 128 / sizeof(T);  // k's of a panel

// A panel, or all of a factor that stays in shared memory.
template <class T, bool kAlong> struct Panel {
  const T* data;
  int stride;  // elements from row to row
  __device__ __forceinline__ const T* at(int mn, int k) const {
    return data + (kAlong ? mn * stride + k : k * stride + mn);
  }
};

// Elements from row to row, on boundaries of 16 bytes: rows along k are 16 bytes more than what
// makes up all banks; rows across k are 8 elements more.
template <class T> constexpr int kAlongStride = kDepth<T> + 16 / int(sizeof(T));
FASTRES_HD constexpr int across_stride(int extent) { return extent + 8; }
FASTRES_HD constexpr int panel_bytes(int extent) {  // of either kind
  return 144 * extent > 128 * across_stride(extent) ? 144 * extent : 128 * across_stride(extent);
}
template <bool kAlong, int kExtent, class T>
__device__ __forceinline__ Panel<T, kAlong> panel_at(const char* p) {
  return {reinterpret_cast<const T*>(p), kAlong ? kAlongStride<T> : across_stride(kExtent)};
}

// A matrix in global memory.
template <class T> struct Matrix {
  const T* data;  // [rows, cols]
  int64_t rows;
  int cols;
  // Whether all rows begin on boundaries of so many bytes.
  __device__ __forceinline__ bool aligned(int bytes) const {
    return (reinterpret_cast<uintptr_t>(data) | (cols * sizeof(T))) % bytes == 0;
  }
};

// Starts to copy the panel of rows m or n from mn on and of k from k on; zeros beyond the matrix.
// A row of a panel has 16 bytes for each of a number of threads that divides `threads`.
template <int kExtent, class T>
__device__ __forceinline__ void fetch_panel(char* at, const Matrix<T>& from, bool along, int64_t mn,
                                            int64_t k, int threads) {
  static_assert(kExtent / kPackSize<T> <= 32, "a row is for whole threads of a warp");
  const int rows = along ? kExtent : kDepth<T>, cols = along ? kDepth<T> : kExtent,
            stride = along ? kAlongStride<T> : across_stride(kExtent);
  const int64_t row = along ? mn : k;
  const int col = int(along ? k : mn);
  T* const to = reinterpret_cast<T*>(at);
  if (from.aligned(16)) {  // one column of packs for a thread: little to compute
    const int of_row = cols / kPackSize<T>, step = threads / of_row;
    const int first = threadIdx.x / of_row, c = threadIdx.x % of_row * kPackSize<T>;
    const int64_t below = from.rows - row;
    int left = col + c < from.cols ? int(below < rows ? below : rows) - first : 0;
    const T* source = from.data + (row + first) * from.cols + (col + c);
    T* target = to + first * stride + c;
#pragma unroll
    for (int r = 0; r < rows; r += step) {
      if (rows % step != 0 && first + r >= rows) break;
      start_copy<16>(target, left > 0 ? source : from.data, left > 0);
      source += int64_t(step) * from.cols, target += step * stride, left -= step;
    }
    return;
  }
  // An element at a time, two of 2 bytes where they are aligned; one of them cannot be copied so.
  constexpr int kBytes = sizeof(T) > 4 ? sizeof(T) : 4;
  const bool copies = sizeof(T) >= 4 || from.aligned(kBytes);
  const int together = copies ? kBytes / int(sizeof(T)) : 1;
#pragma unroll 2
  for (int i = threadIdx.x * together; i < rows * cols; i += threads * together) {
    const int r = i / cols, c = i % cols;
    const bool inside = row + r < from.rows && col + c < from.cols;
    const T* const source = inside ? from.data + (row + r) * from.cols + (col + c) : from.data;
    T* const target = to + r * stride + c;
    if (copies) start_copy<kBytes>(target, source, inside);
    else *target = inside ? *source : narrow<T>(accumulate_t<T>(0));
  }
}

// Slots of shared memory, filled in order while earlier ones are used: kSlots - 1 ahead.
template <int kSlots, class Fetch> class Ring {
 public:
  // fetch(slot) starts to fill a slot with what comes next; `steps` times.
  __device__ __forceinline__ Ring(char* memory, int slot_bytes, int steps, Fetch& fetch)
      : memory_(memory), bytes_(slot_bytes), left_(steps), fetch_(fetch) {
#pragma unroll 1
    for (int i = 0; i < kSlots - 1; ++i) fill();
  }
  // The next slot, filled. A barrier: what all threads did before their call is done.
  __device__ __forceinline__ const char* next() {
    wait_for_copies<kSlots - 2>();
    __syncthreads();
    fill();  // the slot that was used last
    const char* slot = memory_ + used_ * bytes_;
    used_ = used_ + 1 == kSlots ? 0 : used_ + 1;
    return slot;
  }

 private:
  __device__ __forceinline__ void fill() {
    if (left_ > 0) fetch_(memory_ + filled_ * bytes_);
    --left_;
    filled_ = filled_ + 1 == kSlots ? 0 : filled_ + 1;
    end_copy_group();  // empty at the end, so that the count of groups stays that of steps
  }
  char* const memory_;
  const int bytes_;
  int left_;
  Fetch& fetch_;
  int filled_ = 0, used_ = 0;
};

// 16 rows m or n and 32 bytes of k, as registers of mma.sync: as factor a, r[0..3]; as factor b,
// its left 8 columns r[0], r[2], its right ones r[1], r[3].
template <class T, bool kAlong>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], const Panel<T, kAlong>& panel,
                                              int mn, int k) {
  const int lane = threadIdx.x % 32, row = lane % 8;
  const int mn_half = mn + lane / 8 % 2 * 8, k_half = k + lane / 16 * (16 / int(sizeof(T)));
  if constexpr (kAlong) load_matrices<false>(r, panel.at(mn_half + row, k_half));
  else if constexpr (sizeof(T) == 2) load_matrices<true>(r, panel.at(mn_half, k_half + row));
  else
#pragma unroll
    for (int i = 0; i < 4; ++i)  // ldmatrix does not turn 4-byte elements
      memcpy(&r[i], panel.at(mn + i % 2 * 8 + lane / 4, k + i / 2 * 4 + lane % 4), 4);
  if constexpr (sizeof(T) == 4)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v;
      memcpy(&v, &r[i], 4);
      r[i] = to_tf32(v);
    }
}

// sums += a * b, over the k of a panel.
template <class Tile, bool kAlongA, bool kAlongB>
__device__ __forceinline__ void multiply(Products<Tile>& sums,
                                         const Panel<typename Tile::T, kAlongA>& a,
                                         const Panel<typename Tile::T, kAlongB>& b) {
  using T = typename Tile::T;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / Tile::kWarpsN * Tile::kWarpM, col = warp % Tile::kWarpsN * Tile::kWarpN;
  if constexpr (Tile::Arithmetic::kTensor) {
    constexpr int kStep = 32 / sizeof(T);
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += kStep) {
      uint32_t of_a[Tile::kI][4], of_b[Tile::kJ / 2][4];
#pragma unroll
      for (int i = 0; i < Tile::kI; ++i) load_fragment(of_a[i], a, row + 16 * i, k);
#pragma unroll
      for (int j = 0; j < Tile::kJ / 2; ++j) load_fragment(of_b[j], b, col + 16 * j, k);
#pragma unroll
      for (int i = 0; i < Tile::kI; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kJ; ++j)
          multiply_add<T>(sums.v[i][j], of_a[i], of_b[j / 2][j % 2], of_b[j / 2][j % 2 + 2]);
    }
  } else {
#pragma unroll 2  // 16-byte loads of several k's take as many turns of shared memory
    for (int k = 0; k < kDepth<T>; ++k) {
      T of_a[Tile::kRows], of_b[2 * Tile::kJ];
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) of_a[i] = *a.at(row + lane / 4 + 8 * i, k);
#pragma unroll
      for (int j = 0; j < 2 * Tile::kJ; ++j)
        of_b[j] = *b.at(col + lane % 4 * 2 + j / 2 * 8 + j % 2, k);
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
        for (int j = 0; j < 2 * Tile::kJ; ++j)
          sums.v[i / 2][j / 2][i % 2 * 2 + j % 2] += of_a[i] * of_b[j];
    }
  }
}

// 3: of tiles of 64 x 64 55 KiB, so that 4 blocks fit on an SM of an H200.
constexpr int kStages = 3;
template <class Tile> constexpr int kSlotBytes = panel_bytes(Tile::kM) + panel_bytes(Tile::kN);
template <class Tile> constexpr int kRingBytes = kStages * kSlotBytes<Tile>;

// sums += the tile of a * b from row m and column n on, over all of k, with panels of both factors
// in `memory`, kRingBytes. visit(panel of a) sees each of these panels once.
template <bool kAlongA, bool kAlongB, class Tile, class Visit>
__device__ __forceinline__ void add_product(Products<Tile>& sums, char* memory,
                                            const Matrix<typename Tile::T>& a, int64_t m,
                                            const Matrix<typename Tile::T>& b, int64_t n,
                                            const Visit& visit) {
  using T = typename Tile::T;
  const int steps = int(ceil_div(kAlongA ? a.cols : a.rows, kDepth<T>));
  int64_t k = 0;
  auto fetch = [&](char* slot) {
    fetch_panel<Tile::kM>(slot, a, kAlongA, m, k, Tile::kThreads);
    fetch_panel<Tile::kN>(slot + panel_bytes(Tile::kM), b, kAlongB, n, k, Tile::kThreads);
    k += kDepth<T>;
  };
  __syncthreads();  // the panels of a product before this one have been used
  Ring<kStages, decltype(fetch)> ring(memory, kSlotBytes<Tile>, steps, fetch);
  for (int step = 0; step < steps; ++step) {
    const char* slot = ring.next();
    const auto of_a = panel_at<kAlongA, Tile::kM, T>(slot);
    multiply(sums, of_a, panel_at<kAlongB, Tile::kN, T>(slot + panel_bytes(Tile::kM)));
    visit(of_a);
  }
}

}  // namespace fastres::gpu
