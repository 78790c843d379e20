// cuda_persistent: the stack on CUDA in one launch, for features that fit into shared memory. A
// tile of samples stays on one multiprocessor through all blocks, its stream in shared memory; the
// weights pass by in a ring, fetched ahead over the borders of products and blocks. Tiles never
// wait for one another.
#pragma once
#include "cuda_tile.h"

namespace fastres::mlp_stack {

// Slots of the ring: with 4 a panel has the time of 3 to arrive, more than the 600 to 800 cycles of
// the second cache where a panel's products take 300; few samples are through sooner, and where
// there are many columns 4 slots do not fit.
template <class Tile> constexpr int kSlots = Tile::kM == 16 ? 6 : Tile::kN == 64 ? 4 : 3;

// Where things are in shared memory.
template <class Tile> struct Layout {
  using T = typename Tile::T;
  using A = typename Tile::A;
  static constexpr bool kWide = sizeof(T) < sizeof(A);
  int width_stride, hidden_stride;              // elements from row to row of the two factors
  int slot_bytes, width, hidden, stream, sums;  // `width` and below: bytes before each
  int bytes;
  // chain: the ring holds panels of x as well.
  FASTRES_HD Layout(const Shape& s, bool chain) {
    width_stride = stride_of(int(s.width)), hidden_stride = stride_of(int(s.hidden));
    slot_bytes = gpu::panel_bytes(Tile::kN) + (chain ? gpu::panel_bytes(Tile::kM) : 0);
    width = kSlots<Tile> * slot_bytes;
    hidden = width + Tile::kM * width_stride * int(sizeof(T));
    stream = hidden + Tile::kM * hidden_stride * int(sizeof(T));
    sums = stream +
           (kWide ? Tile::kM * int(ceil_div(s.width, Tile::kN)) * Tile::kN * int(sizeof(A)) : 0);
    bytes = sums + 3 * Tile::kWarpsN * Tile::kM * int(sizeof(A));
  }
  // Whole panels, and 16 bytes so that rows begin in different banks.
  FASTRES_HD static int stride_of(int cols) {
    return int(ceil_div(cols, gpu::kDepth<T>)) * gpu::kDepth<T> + 16 / int(sizeof(T));
  }
};

// What a tile of samples has in shared memory of one matrix, as factor of products: zeros beyond.
template <class Tile> struct Resident {
  using T = typename Tile::T;
  using A = typename Tile::A;
  T* data;  // [kM, stride]
  int stride, cols;
  __device__ __forceinline__ Resident(char* at, int cols_, int stride_)
      : data(reinterpret_cast<T*>(at)), stride(stride_), cols(cols_) {
    for (int i = threadIdx.x; i < Tile::kM * stride; i += Tile::kThreads) data[i] = narrow<T>(A(0));
  }
  __device__ __forceinline__ Pair<T>& at(int row, int col) const {
    return *reinterpret_cast<Pair<T>*>(data + row * stride + col);
  }
  __device__ __forceinline__ Pair<A> load(int row, int col) const {
    if (col >= cols) return {};
    const Pair<T> v = at(row, col);
    return {{widen(v.v[0]), widen(v.v[1])}};
  }
  __device__ __forceinline__ void store(int row, int col, const Pair<A>& v) const {
    if (col >= cols) return;
    at(row, col) = {{narrow<T>(v.v[0]), narrow<T>(col + 1 < cols ? v.v[1] : A(0))}};
  }
  __device__ __forceinline__ gpu::Panel<T, true> from(int k) const { return {data + k, stride}; }
};

// The stream of a tile in the accumulate type, and rounded as factor of products. Each thread has
// its own elements, side by side with those of its neighbours.
template <class Tile> struct Stream {
  using A = typename Tile::A;
  static constexpr bool kWide = Layout<Tile>::kWide;
  Pair<A>* own;            // [tiles, spots, kThreads], if kWide
  Resident<Tile> rounded;  // [kM, D]
  __device__ __forceinline__ Pair<A>& at(int left, const Spot& s) const {
    constexpr int kSpots = Tile::kRows * Tile::kJ;
    const int spot = left / Tile::kN * kSpots + s.j * Tile::kRows + s.of_row();
    return own[spot * Tile::kThreads + threadIdx.x];
  }
  __device__ __forceinline__ Pair<A> load(int left, const Spot& s) const {
    if constexpr (kWide) return at(left, s);
    else return rounded.load(s.row, left + s.col);
  }
  __device__ __forceinline__ void store(int left, const Spot& s, const Pair<A>& v) const {
    if constexpr (kWide) at(left, s) = v;
    rounded.store(s.row, left + s.col, v);
  }
};

// Which panel of weights comes next: of each block those of W1, then those of W2.
template <class Tile> struct Panels {
  const Args& a;
  int64_t block;
  bool second = false;
  int left = 0, k = 0;
  __device__ __forceinline__ void operator()(char* slot) {
    using T = typename Tile::T;
    const Shape& s = a.shape;
    const int width = int(s.width), hidden = int(s.hidden);
    const int rows = second ? width : hidden, depth = second ? hidden : width;
    const T* data =
        at<T>(second ? a.weights.w2 : a.weights.w1, s.shared ? 0 : block * s.width * s.hidden);
    gpu::fetch_panel<Tile::kN>(slot, Matrix<T>{data, rows, depth}, true, left, k, Tile::kThreads);
    if ((k += gpu::kDepth<T>) < depth) return;
    k = 0;
    if ((left += Tile::kN) < rows) return;
    left = 0;
    if (second) ++block;
    second = !second;
  }
};

// Panels of a product of `cols` columns and `depth` k's.
template <class Tile> FASTRES_HD int panels_of(int64_t cols, int64_t depth) {
  return int(ceil_div(cols, Tile::kN) * ceil_div(depth, gpu::kDepth<typename Tile::T>));
}

// sums += a b^T with a in shared memory and b's panels from the ring.
template <bool kAlong, class Tile, class Ring>
__device__ __forceinline__ void add_product(Products<Tile>& sums, const Resident<Tile>& a,
                                            Ring& ring, int skip = 0) {
  using T = typename Tile::T;
  for (int k = 0; k < a.cols; k += gpu::kDepth<T>)
    gpu::multiply(sums, a.from(k), gpu::panel_at<kAlong, Tile::kN, T>(ring.next() + skip));
}

template <class Tile> struct PersistentArgs {
  Args a;
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) persistent_kernel(PersistentArgs<Tile> given) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const Args& a = given.a;
  const Shape& s = a.shape;
  const Layout<Tile> layout(s, false);
  char* const shared = gpu::dynamic_shared();
  A* const shared_sums = reinterpret_cast<A*>(shared + layout.sums);
  const int width = int(s.width), hidden = int(s.hidden);
  const int64_t top = int64_t(blockIdx.x) * Tile::kM, rows = s.batch - top,
                size = s.batch * s.width;
  const Stream<Tile> stream{reinterpret_cast<Pair<A>*>(shared + layout.stream),
                            Resident<Tile>(shared + layout.width, width, layout.width_stride)};
  const Resident<Tile> h(shared + layout.hidden, hidden, layout.hidden_stride);
  const auto keep = [&](int64_t block) {  // the stream before it
    const bool wanted = a.states && block < a.last && (block - a.first) % a.every == 0;
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      T* const data = which == 0
                          ? wanted ? at<T>(a.states, (block - a.first) / a.every * size) : nullptr
                      : block == a.last ? at<T>(a.y, 0)
                                        : nullptr;
      if (!data) continue;
      const Rows<T> to = rows_of(data + top * s.width, rows, width);
      for (int left = 0; left < width; left += Tile::kN)
        for_spots<Tile, true>([&](const Spot& spot) {
          to.store(spot.row, left + spot.col, stream.load(left, spot));
        });
    }
  };
  const auto write_sums = [&](int64_t block) {
    for (int i = threadIdx.x; i < 3 * Tile::kM; i += Tile::kThreads)
      if (i % Tile::kM < rows)
        *at<A>(a.sums, (block * 3 + i / Tile::kM) * s.batch + top + i % Tile::kM) =
            RowSums<Tile, 3>::total(shared_sums, i / Tile::kM, i % Tile::kM);
  };

  Panels<Tile> panels{a, a.first};
  gpu::Ring<kSlots<Tile>, Panels<Tile>> ring(
      shared, layout.slot_bytes,
      int(a.last - a.first) * (panels_of<Tile>(hidden, width) + panels_of<Tile>(width, hidden)),
      panels);
  __syncthreads();  // the zeros are there
  const Rows<const T> x = rows_of(at<T>(a.x, top * s.width), rows, width);
  for (int left = 0; left < width; left += Tile::kN)
    for_spots<Tile, true>(
        [&](const Spot& spot) { stream.store(left, spot, x.load(spot.row, left + spot.col)); });

  for (int64_t block = a.first;; ++block) {
    keep(block);
    if (block == a.last) break;
    const int64_t set = s.shared ? 0 : block;
    for (int left = 0; left < hidden; left += Tile::kN) {
      const Columns<Tile> bias(at<T>(a.weights.b1, set * s.hidden), left, hidden);
      Products<Tile> z;
      add_product<true>(z, stream.rounded, ring);
      if (a.sums && left == 0 && block > a.first) write_sums(block - 1);
      activate(z, bias, s.activation);
      for_spots<Tile>([&](const Spot& spot) { h.store(spot.row, left + spot.col, z.pair(spot)); });
    }
    const Gates<Tile> gate(a.weights, block, top, s.batch);
    RowSums<Tile, 3> sums;
    for (int left = 0; left < width; left += Tile::kN) {
      const Columns<Tile> bias(at<T>(a.weights.b2, set * s.width), left, width);
      Products<Tile> f;
      add_product<true>(f, h, ring);
      add_branch(
          f, bias, gate, rows, width - left, sums,
          [&](const Spot& spot) { return stream.load(left, spot); },
          [&](const Spot& spot, const Pair<A>& v) { stream.store(left, spot, v); });
    }
    if (a.sums) sums.leave(shared_sums);
  }
  __syncthreads();
  if (a.sums) write_sums(a.last - 1);
}

}  // namespace fastres::mlp_stack
