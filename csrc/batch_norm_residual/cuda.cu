// batch_norm_residual on CUDA: a kernel for the sums of each channel, one that joins them, and one
// for everything else. Threads stand along lines (planes or pixels), so that they read side by
// side; what they add up goes from blocks to scratch and is joined in order.
#include "cuda_channels.h"

namespace fastres::batch_norm_residual {
namespace {

// Calls one(row, line, pos, c) for all packs of the block's pieces, and end(row) after each of
// them, both in whole warps; pos may be beyond the line. Grid: rows, pieces.
template <class L, class One, class End>
__device__ __forceinline__ void for_each_pack(const Shape& s, const Plan& plan, const One& one,
                                              const End& end) {
  const int lane = threadIdx.x & (plan.lanes - 1), group = threadIdx.x / plan.lanes;
  const int64_t lines = s.lines(), length = s.length(), piece = ceil_div(lines, plan.pieces);
  for (int64_t row = blockIdx.x; row < s.rows; row += gridDim.x) {
    const int64_t first = blockIdx.y * piece, last = first + piece < lines ? first + piece : lines;
    for (int64_t top = first; top < last; top += plan.groups)
      for (int64_t left = 0; left < length; left += plan.lanes * L::kWidth) {
        const int64_t line = top + group, pos = line < last ? left + lane * L::kWidth : length;
        one(row, row * lines + line, pos, L::kPixels ? pos : line);
      }
    end(row);
  }
}

template <class L>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Args a, Plan plan, const typename L::A* table, typename L::A* parts) {
  using T = typename L::T;
  using A = typename L::A;
  const Shape& s = a.shape;
  const int64_t length = s.length();
  Sums<A> total;
  for_each_pack<L>(
      s, plan,
      [&](int64_t row, int64_t line, int64_t pos, int64_t c) {
        unsigned bits = 0;
        if (pos < length) {
          const int64_t i = line * length + pos;
          const auto f = pack<L>(a.f, i);
          typename L::Pack x = {}, y;
          if (a.x) x = pack<L>(a.x, i);
          const A gate = number<A>(a.gate, row * a.gate_stride, 1);
          const Norms<L> norms(table, s.channels, c);
#pragma unroll
          for (int e = 0; e < L::kWidth; ++e) {
            const A p = gpu::product(gate, norms.of(e)(gpu::widen(f.v[e])));
            const A skip = a.x ? gpu::widen(x.v[e]) : A(0), sum = skip + p;
            if (a.x) total.add(skip, p);
            const bool pass = !(a.relu && sum <= 0);  // NaN passes
            bits |= unsigned(pass) << e;
            y.v[e] = gpu::narrow<T>(pass ? sum : A(0));
          }
          gpu::store(at<T>(a.y, i), y);
          bits <<= pos % 8;
        }
        if (!a.mask) return;
#pragma unroll
        for (int d = 1; d < 8 / L::kWidth; d *= 2) bits |= __shfl_xor_sync(~0u, bits, d);
        if (pos < length && pos % 8 == 0) a.mask[line * ceil_div(length, 8) + pos / 8] = bits;
      },
      [&](int64_t row) {
        if (!a.sums) return;
        A v[3] = {total.skip_sq, total.branch_sq, total.dot};
        total = {};
        gpu::sum_lanes(v, kThreads);
        for (int k = 0; threadIdx.x == 0 && k < 3; ++k)
          parts[(k * s.rows + row) * plan.pieces + blockIdx.y] = v[k];
      });
}

// kGate: only ggate, to parts [rows, pieces].
template <class L, bool kGate>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(BackwardArgs a, Plan plan, const typename L::A* table, typename L::A* parts) {
  using T = typename L::T;
  using A = typename L::A;
  const Shape& s = a.shape;
  const int64_t length = s.length(), channels = s.channels;
  A v[1] = {};
  for_each_pack<L>(
      s, plan,
      [&](int64_t row, int64_t line, int64_t pos, int64_t c) {
        if (pos >= length) return;
        const int64_t i = line * length + pos;
        const Cotangents<L> gy(a, line, pos);
        const auto f = pack<L>(a.f, i);
        if constexpr (kGate) {
          const Norms<L> norms(table, channels, c);
#pragma unroll
          for (int e = 0; e < L::kWidth; ++e) v[0] += gy.of(e) * norms.of(e)(gpu::widen(f.v[e]));
        } else {
          const A gate = number<A>(a.gate, row * a.gate_stride, 1);
          const Entries<L> mean(table, channels, kMean, c), scale(table, channels, kScale, c),
              per_g(table, channels, kPerG, c), per_f(table, channels, kPerF, c);
          typename L::Pack gx, gf;
#pragma unroll
          for (int e = 0; e < L::kWidth; ++e) {
            const A g = gy.of(e), gated = gpu::product(gate, g);
            const Pull<A> pull{mean.of(e), scale.of(e), per_g.of(e), per_f.of(e)};
            gx.v[e] = gpu::narrow<T>(g);
            gf.v[e] =
                gpu::narrow<T>(a.training ? pull(gated, gpu::widen(f.v[e])) : pull.scale * gated);
          }
          if (a.gx) gpu::store(at<T>(a.gx, i), gx);
          gpu::store(at<T>(a.gf, i), gf);
        }
      },
      [&](int64_t row) {
        if constexpr (kGate) {
          gpu::sum_lanes(v, kThreads);
          if (threadIdx.x == 0) parts[row * plan.pieces + blockIdx.y] = v[0];
          v[0] = 0;
        }
      });
}

// Blocks of a grid: 1 where there is nothing to do.
int64_t blocks_of(int64_t wanted, int64_t most) {
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}
dim3 grid_of(const Shape& s, const Plan& plan) {
  return dim3(unsigned(blocks_of(s.rows, gpu::kMaxBlocks)), unsigned(plan.pieces));
}
dim3 grid_of_channels(const Shape& s) {
  return dim3(unsigned(blocks_of(ceil_div(s.channels, kThreads), gpu::kMaxBlocks)));
}

template <class L, class Of>
void launch_channel_sums(const Of& of, const Shape& s, const Plan& plan, const Scratch& scratch,
                         void* stream) {
  gpu::launch("batch_norm_residual: channel_sums_kernel", channel_sums_kernel<L, Of>,
              dim3(unsigned(plan.splits), unsigned(blocks_of(plan.stacks, 65535))), kThreads,
              stream, of, s, plan, static_cast<const typename L::A*>(scratch.table), scratch.sums);
}

}  // namespace

int64_t scratch_bytes(const Args& a) { return Scratch::bytes(a.shape, plan_of(a)); }
int64_t scratch_bytes(const BackwardArgs& a) { return Scratch::bytes(a.shape, plan_of(a)); }

void launch_cuda(const Args& a, void* stream) {
  const Shape& s = a.shape;
  const Plan plan = plan_of(a);
  const Scratch scratch(a.scratch, s, plan);
  with_layout(a, [&](auto layout) {
    using L = decltype(layout);
    using A = typename L::A;
    A *table = static_cast<A*>(scratch.table), *parts = static_cast<A*>(scratch.parts);
    if (a.training) launch_channel_sums<L>(Moments<L>{a, {}}, s, plan, scratch, stream);
    gpu::launch("batch_norm_residual: statistics_kernel", statistics_kernel<typename L::T>,
                grid_of_channels(s), kThreads, stream, a, plan,
                static_cast<const double*>(scratch.sums), table);
    gpu::launch("batch_norm_residual: forward_kernel", forward_kernel<L>, grid_of(s, plan),
                kThreads, stream, a, plan, static_cast<const A*>(table), parts);
    if (a.sums && s.rows)
      gpu::launch_sum_parts<A>(parts, a.sums, 3 * s.rows, int(plan.pieces), stream);
  });
}

void launch_cuda(const BackwardArgs& a, void* stream) {
  const Shape& s = a.shape;
  const Plan plan = plan_of(a);
  const Scratch scratch(a.scratch, s, plan);
  with_layout(a, [&](auto layout) {
    using L = decltype(layout);
    using A = typename L::A;
    A *table = static_cast<A*>(scratch.table), *parts = static_cast<A*>(scratch.parts);
    const A* filled = table;
    gpu::launch("batch_norm_residual: fill_kernel", fill_kernel<A>, grid_of_channels(s), kThreads,
                stream, a, table);
    if (a.training || a.gweight || a.gbias) {
      launch_channel_sums<L>(Reduction<L>{a, {}}, s, plan, scratch, stream);
      gpu::launch("batch_norm_residual: gradients_kernel", gradients_kernel<A>, grid_of_channels(s),
                  kThreads, stream, a, plan, static_cast<const double*>(scratch.sums), table);
    }
    if (a.ggate) {
      gpu::launch("batch_norm_residual: gate_kernel", backward_kernel<L, true>, grid_of(s, plan),
                  kThreads, stream, a, plan, filled, parts);
      if (s.rows) gpu::launch_sum_parts<A>(parts, a.ggate, s.rows, int(plan.pieces), stream);
    }
    gpu::launch("batch_norm_residual: backward_kernel", backward_kernel<L, false>, grid_of(s, plan),
                kThreads, stream, a, plan, filled, parts);
  });
}

}  // namespace fastres::batch_norm_residual
