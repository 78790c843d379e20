// path_accumulate on CUDA: the step with its sums, in one pass over memory.
#include "../common/gpu_rows.h"
#include "kernel.h"

namespace fastres::path_accumulate {
namespace {

using gpu::kThreads;
using gpu::Plan;
using gpu::Walk;

// line / samples: in 32 bits where that is exact, a fifth of the instructions of 64.
__device__ __forceinline__ int64_t row_of(int64_t line, int64_t samples) {
  if ((line | samples) >> 32 == 0) return uint32_t(line) / uint32_t(samples);
  return line / samples;
}

// What is loaded ahead for one pack; zero where there is nothing.
template <class Tile>
struct Inputs {
  typename Tile::Pack skip{}, from{}, gradient{};
};
template <class Tile, bool kDot, class Line>
__device__ __forceinline__ void load_inputs(Inputs<Tile>& in, const Line& line, int64_t c) {
  if (line.skip) gpu::load(in.skip, line.skip + c);
  if (line.from) gpu::load(in.from, line.from + c);
  if (kDot) gpu::load(in.gradient, line.gradient + c);
}

// in.skip becomes the new row; its sums are added to the line's as one, so that errors grow with
// packs per thread, not columns. What stays in the tail is loaded here: it is one row of all.
template <class Tile, bool kDot, class Line>
__device__ __forceinline__ void accumulate_pack(Inputs<Tile>& in, const Line& line, int64_t c,
                                                Sums<typename Tile::A>& sums) {
  using A = typename Tile::A;
  typename Tile::Pack own{};
  if (line.own) gpu::load(own, line.own + c);
  Sums<A> of_pack;
#pragma unroll
  for (int j = 0; j < Tile::kWidth; ++j) {
    const A from = gpu::product(line.power, gpu::widen(in.from.v[j]));
    const A sum = gpu::widen(in.skip.v[j]) + from + gpu::widen(own.v[j]);
    of_pack.square += sum * sum;
    if (kDot) of_pack.dot += sum * gpu::widen(in.gradient.v[j]);
    in.skip.v[j] = gpu::narrow<typename Tile::T>(sum);
  }
  sums.square += of_pack.square;
  sums.dot += of_pack.dot;
}

template <class Tile, bool kDot>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(Args a, Plan plan, typename Tile::A* out) {  // out: [1 or 2, lines, pieces]
  using A = typename Tile::A;
  Walk<Tile> walk(a.lines(), a.cols, plan);
  for (walk.first_rows(); walk.more_rows(); walk.next_rows()) {
    const int64_t i = walk.row() < walk.rows ? walk.row() : 0;  // beyond: nothing is inside
    const int64_t row = row_of(i, a.samples);
    const Line<typename Tile::T, A> line(a, i, row, i - row * a.samples);
    Sums<A> total;
    for (walk.first_cols(); walk.more_cols(); walk.next_cols()) {
      Inputs<Tile> in[Tile::kPacks];
#pragma unroll
      for (int k = 0; k < Tile::kPacks; ++k)
        if (walk.inside(k)) load_inputs<Tile, kDot>(in[k], line, walk.col(k));
#pragma unroll
      for (int k = 0; k < Tile::kPacks; ++k) {
        if (!walk.inside(k)) continue;
        accumulate_pack<Tile, kDot>(in[k], line, walk.col(k), total);
        gpu::store(line.out + walk.col(k), in[k].skip);
      }
    }
    A v[kDot ? 2 : 1];
    v[0] = total.square;
    if constexpr (kDot) v[1] = total.dot;
    store_sums(v, out, walk);
  }
}

}  // namespace

int64_t scratch_bytes(const Args& a) {
  return gpu::parts_bytes(a.sum_count(), a.lines(), a.cols, a.dtype);
}

void launch_cuda(const Args& a, void* stream) {
  if (a.lines() == 0) return;
  const auto addresses = gpu::join_addresses(a.skip, a.branch, a.before, a.gradient, a.out);
  gpu::with_tile(a.cols, a.dtype, addresses, [&](auto tile) {
    using Tile = decltype(tile);
    using A = typename Tile::A;
    const Plan plan = gpu::plan_for<Tile>(a.lines(), a.cols, a.dtype);
    A* sums = static_cast<A*>(plan.pieces > 1 ? a.scratch : a.sums);
    gpu::launch("path_accumulate: accumulate_kernel",
                a.dot ? accumulate_kernel<Tile, true> : accumulate_kernel<Tile, false>,
                gpu::grid_of(a.lines(), plan), kThreads, stream, a, plan, sums);
    if (plan.pieces > 1)
      gpu::launch_sum_parts<A>(sums, a.sums, a.sum_count() * a.lines(), plan.pieces, stream);
  });
}

}  // namespace fastres::path_accumulate
