// gpu_tile: what kernels do with the products of a tile beside computing them: rows of matrices in
// global memory two columns at a time, a bias by columns, sums along rows, and their launch.
#pragma once
#include "gpu_product.h"
#include "gpu_reduce.h"

namespace fastres::gpu {

// Where the tile of this block of threads begins: tiles of the same rows follow one another.
template <class Tile> struct Corner {
  int64_t row;
  int col, number, count;  // of the tile among those of its rows
  __device__ __forceinline__ explicit Corner(int64_t cols) {
    count = int(ceil_div(cols, Tile::kN));
    number = int(blockIdx.x % unsigned(count));
    row = int64_t(blockIdx.x / unsigned(count)) * Tile::kM;
    col = number * Tile::kN;
  }
};
template <class Tile> dim3 tiles_of(int64_t rows, int64_t cols) {
  return dim3(unsigned(ceil_div(rows, Tile::kM) * ceil_div(cols, Tile::kN)));
}

// Rows of a matrix in global memory, read and written two columns at a time.
template <class T> struct Rows {
  T* data;  // [rows, cols], `stride` elements from row to row; null: no such matrix
  int64_t stride, rows;
  int cols;
  bool even;  // rows and pairs begin on boundaries of pairs

  using Value = std::remove_const_t<T>;
  using A = accumulate_t<Value>;
  __device__ __forceinline__ int count(int64_t row, int col) const {  // columns of the pair, 0..2
    return !data || row >= rows || col >= cols ? 0 : col + 1 < cols ? 2 : 1;
  }
  __device__ __forceinline__ Pair<A> load(int64_t row, int col) const {
    const int n = count(row, col);
    if (n == 0) return {};
    const T* p = data + row * stride + col;
    if (even) {
      const Pair<Value> both = *reinterpret_cast<const Pair<Value>*>(p);
      return {{widen(both.v[0]), widen(both.v[1])}};
    }
    return {{widen(p[0]), n == 2 ? widen(p[1]) : A(0)}};
  }
  __device__ __forceinline__ void store(int64_t row, int col, const Pair<A>& v) const {
    const int n = count(row, col);
    if (n == 0) return;
    T* p = data + row * stride + col;
    if (even) {
      *reinterpret_cast<Pair<T>*>(p) = {{narrow<T>(v.v[0]), narrow<T>(v.v[1])}};
      return;
    }
    p[0] = narrow<T>(v.v[0]);
    if (n == 2) p[1] = narrow<T>(v.v[1]);
  }
};
// A contiguous matrix of samples.
template <class T> FASTRES_HD Rows<T> rows_of(T* data, int64_t rows, int64_t cols) {
  return {data, cols, rows, static_cast<int>(cols),
          (reinterpret_cast<uintptr_t>(data) | (cols * sizeof(T))) % (2 * sizeof(T)) == 0};
}

// Numbers of the columns of a thread: a bias from column `left` on, zeros beyond its end.
template <class Tile> struct Columns {
  typename Tile::A v[Tile::kJ][2];
  __device__ __forceinline__ Columns(const typename Tile::T* from, int left, int cols) {
    const int first = left + first_col<Tile>();
#pragma unroll
    for (int j = 0; j < Tile::kJ; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = first + 8 * j + e;
        v[j][e] = col < cols ? widen(from[col]) : typename Tile::A(0);
      }
  }
};

// Sums along the rows of a tile, kCount of each row.
template <class Tile, int kCount> struct RowSums {
  using A = typename Tile::A;
  static constexpr int kBytes = kCount * Tile::kWarpsN * Tile::kM * int(sizeof(A));
  A v[Tile::kRows][kCount] = {};
  // Adds up those of the threads of each warp, and leaves them for `total`, after a barrier.
  __device__ __forceinline__ void leave(A* shared) {  // [kCount, kWarpsN, kM]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = first_row<Tile>();
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      sum_warp_lanes(v[r], 4);
      if (lane % 4 == 0)
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          shared[(i * Tile::kWarpsN + warp % Tile::kWarpsN) * Tile::kM + row + 8 * r] = v[r][i];
    }
  }
  __device__ __forceinline__ static A total(const A* shared, int i, int row) {
    const A* of_warp = shared + i * Tile::kWarpsN * Tile::kM + row;
    A sum = of_warp[0];
    for (int w = 1; w < Tile::kWarpsN; ++w) sum += of_warp[w * Tile::kM];
    return sum;
  }
};

// Launches a kernel that no other shares its type of arguments with.
template <class Tile, template <class> class KernelArgs>
void launch_tiles(const char* name, void (*kernel)(KernelArgs<Tile>), dim3 grid, void* stream,
                  const KernelArgs<Tile>& args, int64_t shared_bytes = kRingBytes<Tile>) {
  static std::atomic<uint64_t> allowed{0};
  launch_with_shared(name, kernel, allowed, grid, Tile::kThreads, shared_bytes, stream, args);
}

}  // namespace fastres::gpu
