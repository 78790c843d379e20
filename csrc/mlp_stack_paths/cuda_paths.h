// cuda_paths: all rows of a sample down all blocks, by one block of threads. The rows stay where
// they are, in shared memory if they fit; the weights pass by in a ring. Rows are taken in tiles
// from the last on: what is added to a row comes of the one before it, which is still the old one.
#pragma once
#include "cuda_panels.h"
#include "cuda_results.h"

namespace fastres::mlp_stack_paths {

// A tile of rows that are added to, of which a warp has kRowsOfWarp.
template <class T> struct PathTile {
  const Rows<T>& rows;
  const Shape& s;
  T* hidden;  // [rows of the tile, stride], of this warp's rows no other thread reads
  int64_t hidden_stride;
  int first, count;  // numbers from `first` on are this thread's, every 4th; those below count are
  bool idle;         // none of this warp's

  __device__ __forceinline__ PathTile(const Rows<T>& rows_, const Shape& s_, T* hidden_,
                                      int64_t hidden_stride_, int top, int count_)
      : rows(rows_), s(s_), hidden_stride(hidden_stride_), count(count_) {
    const int of_warp = int(threadIdx.x) / 32 * kRowsOfWarp;
    hidden = hidden_ + (of_warp + lane_row()) * hidden_stride;
    first = top + of_warp + lane_row();
    idle = top + of_warp >= count;
  }
  __device__ __forceinline__ int number(int r) const {  // within those there are
    const int given = first + 4 * r;
    return given < count ? given : count - 1;
  }

  // hidden = 2^(exponents of the sums - those of their sources) gate act' * (sources W2)
  template <class Ring>
  __device__ __forceinline__ void send_back(const int* powers, T gate, const SlopeRow& kind,
                                            const char* slope_row, Ring& ring) const {
    const T* sources[kRowsOfThread];
    T factors[kRowsOfThread];
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      const int from = rows.places.source(number(r)), to = rows.places.target(number(r));
      sources[r] = rows.at(from);
      factors[r] = power_of_two<T>(powers[to] - powers[from]);
    }
    for (int64_t left = 0; left < s.hidden; left += kColumns) {
      Sums<T, kRowsOfThread> q;
      for (int64_t k = 0; k < s.width; k += kDepth<T>) {
        const char* panel = ring.next();
        if (!idle) multiply<false, kDepth<T> / kPackSize<T>>(q, sources, k, panel);
      }
      if (idle) continue;
#pragma unroll
      for (int j = 0; j < kOwn; j += kPackSize<T>) {
        const int64_t col = left + col_of<T, false>(j);
        if (col >= padded<T>(s.hidden)) continue;
        Pack<T> slopes, v;
        kind.load(slopes, slope_row, col);
#pragma unroll
        for (int e = 0; e < kPackSize<T>; ++e) slopes.v[e] *= gate;
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r) {
#pragma unroll
          for (int e = 0; e < kPackSize<T>; ++e) v.v[e] = q.v[r][j + e] * factors[r] * slopes.v[e];
          gpu::store(hidden + 4 * r * hidden_stride + col, v);
        }
      }
    }
  }

  // sums += hidden W1
  template <class Ring> __device__ __forceinline__ void add(Ring& ring) const {
    const T* of_hidden[kRowsOfThread];
    T sizes[kRowsOfThread] = {};
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) of_hidden[r] = hidden + 4 * r * hidden_stride;
    for (int64_t left = 0; left < s.width; left += kColumns) {
      Sums<T, kRowsOfThread> sums;
      for (int64_t k = 0; k < s.hidden; k += kDepth<T>) {
        const char* panel = ring.next();
        if (!idle) multiply<false, kDepth<T> / kPackSize<T>>(sums, of_hidden, k, panel);
      }
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        if (first + 4 * r >= count) continue;
        T* const row = rows.at(rows.places.target(first + 4 * r)) + left;
#pragma unroll
        for (int j = 0; j < kOwn; j += kPackSize<T>) {
          const int col = col_of<T, false>(j);
          if (left + col >= padded<T>(s.width)) continue;
          Pack<T> v;
          gpu::load(v, row + col);
#pragma unroll
          for (int e = 0; e < kPackSize<T>; ++e) {
            v.v[e] += sums.v[r][j + e];
            sizes[r] = ::fmax(sizes[r], ::fabs(v.v[e]));
          }
          gpu::store(row + col, v);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
#pragma unroll
      for (int distance = 2; distance <= 8; distance *= 2)  // the lanes of a row
        sizes[r] = ::fmax(sizes[r], __shfl_xor_sync(~0u, sizes[r], distance));
      if (lane_col() == 0 && first + 4 * r < count)
        rows.sizes[rows.places.target(first + 4 * r)] = sizes[r];
    }
  }
};

template <class T, Memory kMemory>
__global__ void __launch_bounds__(32 * kMostWarps, 1) paths_kernel(PathsArgs<T> given) {
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
    T next_gate = s.blocks ? gate_of(s.blocks - 1) : T(1);
    for (int64_t done = 0; done < s.blocks; ++done) {
      const int64_t block = s.blocks - 1 - done;
      const T gate = next_gate;
      if (block > 0) next_gate = gate_of(block - 1);
      const char* const slope_row = kMemory == Memory::kGlobal
                                        ? given.slopes_of(block, sample, layout.slope_bytes)
                                        : slopes + done % 2 * layout.slope_bytes;
      const int count = rows.places.added_to(done);
      __syncthreads();
      rows.choose_powers(done);
      __syncthreads();
      if (rows.places.tail && done >= s.longest) rows.join_tail(done);
      for (int top = (count - 1) / tile_rows * tile_rows; top >= 0; top -= tile_rows) {
        const PathTile<T> tile(rows, s, hidden, layout.hidden_stride, top, count);
        tile.send_back(rows.powers_of(done + 1), gate, kind, slope_row, ring);
        tile.add(ring);
      }
    }
    __syncthreads();
    write_results(a, rows, sample, shared);
  }
}

}  // namespace fastres::mlp_stack_paths
