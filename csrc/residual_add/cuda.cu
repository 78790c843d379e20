// residual_add on CUDA: the add with its three sums, and its backward, in one pass over memory
// each.
#include "../common/gpu_rows.h"
#include "kernel.h"

namespace fastres::residual_add {
namespace {

using gpu::kThreads;
using gpu::Plan;
using gpu::Walk;

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

}  // namespace

int64_t scratch_bytes(const Args& a) { return gpu::parts_bytes(3, a.rows, a.cols, a.dtype); }
int64_t scratch_bytes(const BackwardArgs& a) {
  return a.ggate ? gpu::parts_bytes(1, a.rows, a.cols, a.dtype) : 0;
}

void launch_cuda(const Args& a, void* stream) {
  if (a.rows == 0) return;
  gpu::with_tile(a.cols, a.dtype, gpu::join_addresses(a.x, a.f, a.y), [&](auto tile) {
    using Tile = decltype(tile);
    using A = typename Tile::A;
    const Plan plan = gpu::plan_for<Tile>(a.rows, a.cols, a.dtype);
    A* sums = static_cast<A*>(plan.pieces > 1 ? a.scratch : a.sums);
    gpu::launch("residual_add: add_kernel",
                a.relu ? add_kernel<Tile, true> : add_kernel<Tile, false>,
                gpu::grid_of(a.rows, plan), kThreads, stream, a, plan, sums);
    if (plan.pieces > 1) gpu::launch_sum_parts<A>(sums, a.sums, 3 * a.rows, plan.pieces, stream);
  });
}

void launch_cuda(const BackwardArgs& a, void* stream) {
  if (a.rows == 0) return;
  const auto addresses = gpu::join_addresses(a.gy, a.x, a.f, a.gx, a.gf);
  gpu::with_tile(a.cols, a.dtype, addresses, [&](auto tile) {
    using Tile = decltype(tile);
    using A = typename Tile::A;
    const Plan plan = gpu::plan_for<Tile>(a.rows, a.cols, a.dtype);
    A* ggate = static_cast<A*>(plan.pieces > 1 ? a.scratch : a.ggate);
    gpu::launch("residual_add: backward_kernel",
                a.gs ? backward_kernel<Tile, true> : backward_kernel<Tile, false>,
                gpu::grid_of(a.rows, plan), kThreads, stream, a, plan, ggate);
    if (a.ggate && plan.pieces > 1)
      gpu::launch_sum_parts<A>(ggate, a.ggate, a.rows, plan.pieces, stream);
  });
}

}  // namespace fastres::residual_add
