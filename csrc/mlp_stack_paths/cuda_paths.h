// cuda_paths: all rows of a sample down all blocks, by one block of threads. The rows stay where
// they are, in shared memory if they fit; the weights pass by in a ring. Rows are taken in tiles
// from the last on: what is added to a row comes of the one before it, which is still the old one.
#pragma once
#include "cuda_arithmetic.h"
#include "cuda_branch.h"
#include "cuda_results.h"

namespace fastres::mlp_stack_paths {

// A tile of rows that are added to, of which a warp has kRowsOfWarp.
template <class Arithmetic> struct PathTile {
  using T = typename Arithmetic::T;
  using Columns = typename Arithmetic::Columns;
  static constexpr int kRows = Arithmetic::kRows, kSide = sizeof(Columns) / sizeof(T);
  const Rows<T>& rows;
  const Shape& s;
  T* hidden;  // [kRowsOfWarp, stride], which no other warp reads
  int64_t hidden_stride;
  int first, count;  // numbers of this warp from `first` on; there are those below `count`
  bool idle;         // none of this warp's

  __device__ __forceinline__ PathTile(const Rows<T>& rows_, const Shape& s_, T* hidden_,
                                      int64_t hidden_stride_, int top, int count_)
      : rows(rows_), s(s_), hidden_stride(hidden_stride_), count(count_) {
    const int of_warp = int(threadIdx.x) / 32 * kRowsOfWarp;
    hidden = hidden_ + of_warp * hidden_stride;
    first = top + of_warp;
    idle = first >= count;
  }
  __device__ __forceinline__ T* hidden_row(int r) const {
    return hidden + Arithmetic::row(r) * hidden_stride;
  }
  __device__ __forceinline__ int number(int r) const { return first + Arithmetic::row(r); }

  // hidden = gate act' * (sources W2)
  template <class Ring>
  __device__ __forceinline__ void send_back(T gate, const SlopeRow& kind, const char* slope_row,
                                            Ring& ring) const {
    const T* sources[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)  // within those there are
      sources[r] = rows.at(rows.places.source(number(r) < count ? number(r) : count - 1));
    for (int64_t left = 0; left < s.hidden; left += kColumns) {
      Arithmetic products;
      for (int64_t k = 0; k < s.width; k += kDepth<T>) {
        const char* panel = ring.next();
        if (!idle) products.add(sources, k, panel);
      }
      if (idle) continue;
#pragma unroll
      for (int pack = 0; pack < Arithmetic::kPacks; ++pack) {
        const int64_t col = left + Arithmetic::col(pack);
        if (col >= padded<T>(s.hidden)) continue;
        Columns slopes;
        kind.load(slopes, slope_row, col);
#pragma unroll
        for (int e = 0; e < kSide; ++e) slopes.v[e] *= gate;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          Columns v = products.columns(r, pack);
#pragma unroll
          for (int e = 0; e < kSide; ++e) v.v[e] *= slopes.v[e];
          store(hidden_row(r) + col, v);
        }
      }
    }
  }

  // sums = 2^(powers - those by which they were held) sums + 2^(... their sources were) hidden W1
  template <class Ring> __device__ __forceinline__ void add(const int* powers, Ring& ring) const {
    const T* of_hidden[kRows];
    T sizes[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) of_hidden[r] = hidden_row(r);
    for (int64_t left = 0; left < s.width; left += kColumns) {
      Arithmetic products;
      for (int64_t k = 0; k < s.hidden; k += kDepth<T>) {
        const char* panel = ring.next();
        if (!idle) products.add(of_hidden, k, panel);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (number(r) >= count) continue;
        const int from = rows.places.source(number(r)), to = rows.places.target(number(r));
        const T own = power_of_two<T>(powers[to] - rows.held[to]);
        const T factor = power_of_two<T>(powers[to] - rows.held[from]);
        T* const row = rows.at(to) + left;
#pragma unroll
        for (int pack = 0; pack < Arithmetic::kPacks; ++pack) {
          const int col = Arithmetic::col(pack);
          if (left + col >= padded<T>(s.width)) continue;
          const Columns product = products.columns(r, pack);
          Columns v;
          load(v, row + col);
#pragma unroll
          for (int e = 0; e < kSide; ++e) {
            v.v[e] = own * v.v[e] + factor * product.v[e];
            sizes[r] = ::fmax(sizes[r], ::fabs(v.v[e]));
          }
          store(row + col, v);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int lane = 1; lane <= Arithmetic::kColumnLanes; lane *= 2)  // the lanes of a row
        if (lane & Arithmetic::kColumnLanes)
          sizes[r] = ::fmax(sizes[r], __shfl_xor_sync(~0u, sizes[r], lane));
      if (!(threadIdx.x & Arithmetic::kColumnLanes) && number(r) < count)
        rows.sizes[rows.places.target(number(r))] = sizes[r];
    }
  }
};

template <class Arithmetic, Memory kMemory>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    paths_kernel(PathsArgs<typename Arithmetic::T> given) {
  using T = typename Arithmetic::T;
  const Args& a = given.a;
  const Shape& s = a.shape;
  const PathsLayout<T> layout(s, int(blockDim.x / 32), kMemory);
  const SlopeRow kind = SlopeRow::of<T>(s);
  char* const shared = gpu::dynamic_shared();
  const Rows<T> rows(s, kMemory == Memory::kShared ? shared + layout.rows
                                                   : given.rows + blockIdx.x * layout.rows_bytes);
  T* const hidden =
      reinterpret_cast<T*>(kMemory == Memory::kGlobal ? given.tile + blockIdx.x * layout.tile_bytes
                                                      : shared + layout.tile);
  char* const slopes = kMemory == Memory::kGlobal ? nullptr : shared + layout.slopes;
  const int tile_rows = int(blockDim.x) / 32 * kRowsOfWarp;

  for (int64_t sample = blockIdx.x; sample < s.batch; sample += gridDim.x) {
    const auto gate_of = [&](int64_t block) {
      const Weights& w = a.weights;
      return w.gate ? *at<T>(w.gate, block * w.gate_block_stride + sample * w.gate_row_stride)
                    : T(1);
    };
    __syncthreads();  // the sample before this one is done
    rows.begin(at<T>(a.cotangent, sample * s.width), s.width);
    PathPanels<T> panels{given, sample, layout.slope_bytes, slopes, tile_rows, s.blocks - 1};
    gpu::Ring<kSlots, PathPanels<T>> ring(shared, kSlotBytes, 0x7fffffff, panels);
    for (int64_t done = 0; done < s.blocks; ++done) {
      const int64_t block = s.blocks - 1 - done;
      const T gate = gate_of(block);
      const char* const slope_row = kMemory == Memory::kGlobal
                                        ? given.slopes_of(block, sample, layout.slope_bytes)
                                        : slopes + done % 2 * layout.slope_bytes;
      const int count = rows.places.added_to(done);
      __syncthreads();
      if (__syncthreads_or(rows.choose_powers(done))) {
        T* const of_warp = hidden + threadIdx.x / 32 * kRowsOfWarp * layout.hidden_stride;
        const Branch<T> branch{a,     kind, given.slopes_of(block, sample, layout.slope_bytes),
                               block, gate, of_warp};
        rows.choose_powers_of_waiting(done, [&](const T* row) { return branch.largest_of(row); });
      }
      if (rows.places.tail && done >= s.longest) rows.join_tail();
      for (int top = (count - 1) / tile_rows * tile_rows; top >= 0; top -= tile_rows) {
        const PathTile<Arithmetic> tile(rows, s, hidden, layout.hidden_stride, top, count);
        tile.send_back(gate, kind, slope_row, ring);
        tile.add(rows.powers_of(done + 1), ring);
      }
    }
    __syncthreads();
    write_results(a, rows, sample, shared);
  }
}

}  // namespace fastres::mlp_stack_paths
