// residual_add on CUDA: the add with its three sums, and its backward, each in one pass over
// memory.
//
// Some lanes (threads, a power of two of them) share a row. They take packs of 16 bytes, side by
// side, several each before the first is used. Rows too wide and too few to fill the GPU are split
// into pieces, a block each, whose sums a second kernel adds in order.
#include "../common/gpu_pack.h"
#include "../common/gpu_reduce.h"
#include "kernel.h"

namespace fastres::residual_add {
namespace {

using gpu::accumulate_t;

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

template <class T>
__device__ __forceinline__ const T* at(const void* p, int64_t i) {
  return static_cast<const T*>(p) + i;
}
template <class T>
__device__ __forceinline__ T* at(void* p, int64_t i) {
  return static_cast<T*>(p) + i;
}

template <class A, class Args>
__device__ __forceinline__ A gate_of(const Args& a, int64_t row) {
  return a.gate && row < a.rows ? *at<A>(a.gate, row * a.gate_stride) : A(1);
}

// Sums v over the lanes of the row, to out[i, row, piece].
template <class Tile, int kCount>
__device__ __forceinline__ void store_sums(typename Tile::A (&v)[kCount],
                                           typename Tile::A* out,  // [kCount, rows, pieces]
                                           const Walk<Tile>& walk) {
  gpu::sum_lanes(v, walk.lanes);
  if (walk.lane != 0 || walk.row() >= walk.rows) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    out[(i * walk.rows + walk.row()) * gridDim.y + blockIdx.y] = v[i];
}

// y of one pack, and its sums; returns a bit per column, set where the ReLU passes on its input.
template <class Tile, bool kRelu>
__device__ __forceinline__ unsigned add_pack(const typename Tile::Pack& x,
                                             const typename Tile::Pack& f, typename Tile::A gate,
                                             typename Tile::Pack& y, Sums<typename Tile::A>& sums) {
  using A = typename Tile::A;
  Sums<A> of_pack;  // added to the row's as one: errors grow with packs per thread, not columns
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < Tile::kWidth; ++j) {
    const A skip = gpu::widen(x.v[j]), p = gpu::product(gate, gpu::widen(f.v[j])), sum = skip + p;
    of_pack.add(skip, p);
    const bool pass = !(kRelu && sum <= 0);  // NaN passes
    bits |= unsigned(pass) << j;
    y.v[j] = gpu::narrow<typename Tile::T>(pass ? sum : A(0));
  }
  sums.skip_sq += of_pack.skip_sq;
  sums.branch_sq += of_pack.branch_sq;
  sums.dot += of_pack.dot;
  return bits;
}

// Joins the bits of the 8 / kWidth lanes that share a byte; the first of them stores it. All lanes
// of the warp must call it, with bits 0 outside of the tensor.
template <class Tile>
__device__ __forceinline__ void store_mask(unsigned bits, uint8_t* mask,  // [rows, mask_cols]
                                           int64_t mask_cols, const Walk<Tile>& walk, int pack) {
  const int bit = walk.lane * Tile::kWidth % 8;
  bits <<= bit;
#pragma unroll
  for (int d = 1; d < 8 / Tile::kWidth; d *= 2) bits |= __shfl_xor_sync(~0u, bits, d);
  if (bit == 0 && walk.inside(pack)) mask[walk.row() * mask_cols + walk.col(pack) / 8] = bits;
}

template <class Tile, bool kRelu>
__global__ void __launch_bounds__(kThreads)
    add_kernel(Args a, Plan plan, typename Tile::A* sums) {  // sums: [3, rows, pieces]
  using T = typename Tile::T;
  using A = typename Tile::A;
  Walk<Tile> walk(a.rows, a.cols, plan);
  for (walk.first_rows(); walk.more_rows(); walk.next_rows()) {
    Sums<A> total;
    const A gate = gate_of<A>(a, walk.row());
    for (walk.first_cols(); walk.more_cols(); walk.next_cols()) {
      typename Tile::Pack x[Tile::kPacks], f[Tile::kPacks];
#pragma unroll
      for (int k = 0; k < Tile::kPacks; ++k) {
        if (!walk.inside(k)) continue;
        gpu::load(x[k], at<T>(a.x, walk.offset(k)));
        gpu::load(f[k], at<T>(a.f, walk.offset(k)));
      }
#pragma unroll
      for (int k = 0; k < Tile::kPacks; ++k) {
        unsigned bits = 0;
        if (walk.inside(k)) {
          typename Tile::Pack y;
          bits = add_pack<Tile, kRelu>(x[k], f[k], gate, y, total);
          gpu::store(at<T>(a.y, walk.offset(k)), y);
        }
        if (kRelu && a.mask) store_mask(bits, a.mask, plan.mask_cols, walk, k);
      }
    }
    A v[3] = {total.skip_sq, total.branch_sq, total.dot};
    store_sums(v, sums, walk);
  }
}

// The cotangents of one row's sums, zero without any.
template <class A>
__device__ __forceinline__ SumGrads<A> sum_grads_of(const BackwardArgs& a, int64_t row) {
  if (row >= a.rows) return {};
  const A* gs = at<A>(a.gs, row);  // [3, rows] from this row on
  return {gs[0], gs[a.rows], gs[2 * a.rows]};
}

// gy becomes gf and x becomes gx; returns the pack's part of ggate.
template <class Tile, bool kSums>
__device__ __forceinline__ typename Tile::A backward_pack(typename Tile::Pack& gy,
                                                          typename Tile::Pack& x,
                                                          const typename Tile::Pack& f,
                                                          unsigned bits, typename Tile::A gate,
                                                          const SumGrads<typename Tile::A>& grads) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  A ggate = 0;
#pragma unroll
  for (int j = 0; j < Tile::kWidth; ++j) {
    const A g = bits >> j & 1 ? gpu::widen(gy.v[j]) : A(0), branch = gpu::widen(f.v[j]);
    A gx = g, gp = g;
    if constexpr (kSums) {
      const A skip = gpu::widen(x.v[j]), p = gpu::product(gate, branch);
      gx = grads.skip(g, skip, p);
      gp = grads.perturbation(g, skip, p);
    }
    ggate += gp * branch;
    x.v[j] = gpu::narrow<T>(gx);
    gy.v[j] = gpu::narrow<T>(gpu::product(gate, gp));
  }
  return ggate;
}

// What backward_kernel loads for one pack; zero where there is no such tensor.
template <class Tile>
struct Inputs {
  typename Tile::Pack gy{}, x{}, f{};
  unsigned bits = ~0u;
};
template <class Tile, bool kSums>
__device__ __forceinline__ void load_inputs(Inputs<Tile>& in, const BackwardArgs& a,
                                            int64_t mask_cols, const Walk<Tile>& walk, int pack) {
  using T = typename Tile::T;
  const int64_t i = walk.offset(pack), col = walk.col(pack);
  if (a.gy) gpu::load(in.gy, at<T>(a.gy, i));
  if (kSums) gpu::load(in.x, at<T>(a.x, i));
  if (kSums || a.ggate) gpu::load(in.f, at<T>(a.f, i));
  if (a.mask) in.bits = a.mask[walk.row() * mask_cols + col / 8] >> (col % 8);
}

// kSums: there are cotangents of the sums.
template <class Tile, bool kSums>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(BackwardArgs a, Plan plan, typename Tile::A* ggate) {  // ggate: [rows, pieces]
  using T = typename Tile::T;
  using A = typename Tile::A;
  Walk<Tile> walk(a.rows, a.cols, plan);
  for (walk.first_rows(); walk.more_rows(); walk.next_rows()) {
    A total[1] = {};
    const A gate = gate_of<A>(a, walk.row());
    SumGrads<A> grads{};
    if (kSums) grads = sum_grads_of<A>(a, walk.row());
    for (walk.first_cols(); walk.more_cols(); walk.next_cols()) {
      Inputs<Tile> in[Tile::kPacks];
#pragma unroll
      for (int k = 0; k < Tile::kPacks; ++k)
        if (walk.inside(k)) load_inputs<Tile, kSums>(in[k], a, plan.mask_cols, walk, k);
#pragma unroll
      for (int k = 0; k < Tile::kPacks; ++k) {
        if (!walk.inside(k)) continue;
        total[0] += backward_pack<Tile, kSums>(in[k].gy, in[k].x, in[k].f, in[k].bits, gate, grads);
        if (a.gx) gpu::store(at<T>(a.gx, walk.offset(k)), in[k].x);
        if (a.gf) gpu::store(at<T>(a.gf, walk.offset(k)), in[k].gy);
      }
    }
    if (a.ggate) store_sums(total, ggate, walk);
  }
}

int64_t piece_of(int64_t cols, int64_t pieces) {
  return ceil_div(ceil_div(cols, pieces), kPieceStep) * kPieceStep;
}

// Blocks per row: 1 where there are rows enough, or where the pieces would be too small.
int64_t pieces_of(int64_t rows, int64_t cols, Dtype dtype) {
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
  gpu::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const bool packed = (addresses | (cols * sizeof(T))) % 16 == 0;
    if (packed)
      body(Tile<T, gpu::kPackSize<T>, 2>());
    else
      body(Tile<T, 1, 8>());
  });
}

template <class... P>
uintptr_t join_addresses(const P*... p) {
  return (reinterpret_cast<uintptr_t>(p) | ...);
}

dim3 grid_of(int64_t rows, const Plan& plan) {
  const int64_t tiles = ceil_div(rows, kThreads >> plan.lane_bits);
  return dim3(unsigned(tiles < gpu::kMaxBlocks ? tiles : gpu::kMaxBlocks), unsigned(plan.pieces));
}

// Adds up scratch, [count, pieces], to out, [count].
template <class A>
void launch_sum_parts(const void* scratch, void* out, int64_t count, int pieces, void* stream) {
  const int64_t blocks = ceil_div(count, kThreads / 32);
  gpu::launch("residual_add: sum_parts_kernel", gpu::sum_parts_kernel<A>,
              dim3(unsigned(blocks < gpu::kMaxBlocks ? blocks : gpu::kMaxBlocks)), kThreads, stream,
              static_cast<const A*>(scratch), static_cast<A*>(out), count, pieces);
}

int64_t scratch_for(int64_t sums, int64_t rows, int64_t cols, Dtype dtype) {
  const int64_t pieces = pieces_of(rows, cols, dtype);
  return pieces == 1 ? 0 : sums * rows * pieces * (dtype == Dtype::kFloat64 ? 8 : 4);
}

}  // namespace

int64_t scratch_bytes(const Args& a) { return scratch_for(3, a.rows, a.cols, a.dtype); }
int64_t scratch_bytes(const BackwardArgs& a) {
  return a.ggate ? scratch_for(1, a.rows, a.cols, a.dtype) : 0;
}

void launch_cuda(const Args& a, void* stream) {
  if (a.rows == 0) return;
  with_tile(a.cols, a.dtype, join_addresses(a.x, a.f, a.y), [&](auto tile) {
    using Tile = decltype(tile);
    using A = typename Tile::A;
    const Plan plan = plan_for<Tile>(a.rows, a.cols, a.dtype);
    A* sums = static_cast<A*>(plan.pieces > 1 ? a.scratch : a.sums);
    gpu::launch("residual_add: add_kernel",
                a.relu ? add_kernel<Tile, true> : add_kernel<Tile, false>, grid_of(a.rows, plan),
                kThreads, stream, a, plan, sums);
    if (plan.pieces > 1) launch_sum_parts<A>(sums, a.sums, 3 * a.rows, plan.pieces, stream);
  });
}

void launch_cuda(const BackwardArgs& a, void* stream) {
  if (a.rows == 0) return;
  const auto addresses = join_addresses(a.gy, a.x, a.f, a.gx, a.gf);
  with_tile(a.cols, a.dtype, addresses, [&](auto tile) {
    using Tile = decltype(tile);
    using A = typename Tile::A;
    const Plan plan = plan_for<Tile>(a.rows, a.cols, a.dtype);
    A* ggate = static_cast<A*>(plan.pieces > 1 ? a.scratch : a.ggate);
    gpu::launch("residual_add: backward_kernel",
                a.gs ? backward_kernel<Tile, true> : backward_kernel<Tile, false>,
                grid_of(a.rows, plan), kThreads, stream, a, plan, ggate);
    if (a.ggate && plan.pieces > 1)
      launch_sum_parts<A>(ggate, a.ggate, a.rows, plan.pieces, stream);
  });
}

}  // namespace fastres::residual_add
