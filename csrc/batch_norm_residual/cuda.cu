// batch_norm_residual on CUDA: a kernel for the sums of each channel, one that joins them, and one
// for everything else. Threads stand along lines (planes or pixels), so that they read side by
// side; what they add up goes from blocks to scratch and is joined in order.
#include "cuda_channels.h"

namespace fastres::batch_norm_residual {
namespace {

// Calls one(row, line, pos, c) for all values of the block's pieces, and end(row) after each of
// them, both in whole warps; pos may be beyond the line. Grid: rows, pieces.
template <class One, class End>
__device__ __forceinline__ void for_each_value(const Shape& s, const Plan& plan, const One& one,
                                               const End& end) {
  const int lane = threadIdx.x & (plan.lanes - 1), group = threadIdx.x / plan.lanes;
  const int64_t lines = s.lines(), length = s.length(), piece = ceil_div(lines, plan.pieces);
  for (int64_t row = blockIdx.x; row < s.rows; row += gridDim.x) {
    const int64_t first = blockIdx.y * piece, last = first + piece < lines ? first + piece : lines;
    for (int64_t top = first; top < last; top += plan.groups)
      for (int64_t left = 0; left < length; left += plan.lanes) {
        const int64_t line = top + group, pos = line < last ? left + lane : length;
        one(row, row * lines + line, pos, s.pixels ? pos : line);
      }
    end(row);
  }
}

template <class T, bool kRelu>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Args a, Plan plan, const gpu::accumulate_t<T>* table,
                   gpu::accumulate_t<T>* parts) {
  using A = gpu::accumulate_t<T>;
  const Shape& s = a.shape;
  const int64_t length = s.length();
  Sums<A> total;
  for_each_value(
      s, plan,
      [&](int64_t row, int64_t line, int64_t pos, int64_t c) {
        unsigned bits = 0;
        if (pos < length) {
          const int64_t i = line * length + pos;
          const A gate = number<A>(a.gate, row * a.gate_stride, 1);
          const A p = gpu::product(gate, norm_of(table, s.channels, c)(read<T>(a.f, i)));
          const A skip = a.x ? read<T>(a.x, i) : A(0), sum = skip + p;
          if (a.x) total.add(skip, p);
          const bool pass = !(kRelu && sum <= 0);  // NaN passes
          bits = unsigned(pass) << pos % 8;
          static_cast<T*>(a.y)[i] = gpu::narrow<T>(pass ? sum : A(0));
        }
        if (!a.mask) return;
        for (int d = 1; d < 8; d *= 2) bits |= __shfl_xor_sync(~0u, bits, d);
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
template <class T, bool kGate>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(BackwardArgs a, Plan plan, const gpu::accumulate_t<T>* table,
                    gpu::accumulate_t<T>* parts) {
  using A = gpu::accumulate_t<T>;
  const Shape& s = a.shape;
  const int64_t length = s.length(), channels = s.channels;
  A v[1] = {};
  for_each_value(
      s, plan,
      [&](int64_t row, int64_t line, int64_t pos, int64_t c) {
        if (pos >= length) return;
        const int64_t i = line * length + pos;
        const A g = cotangent<T>(a, line, pos), f = read<T>(a.f, i);
        if constexpr (kGate) {
          v[0] += g * norm_of(table, channels, c)(f);
        } else {
          const A gated = gpu::product(number<A>(a.gate, row * a.gate_stride, 1), g);
          const Pull<A> pull{table[kMean * channels + c], table[kScale * channels + c],
                             table[kPerG * channels + c], table[kPerF * channels + c]};
          if (a.gx) static_cast<T*>(a.gx)[i] = gpu::narrow<T>(g);
          static_cast<T*>(a.gf)[i] =
              gpu::narrow<T>(a.training ? pull(gated, f) : pull.scale * gated);
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

template <class A, class Of>
void launch_channel_sums(const Of& of, const Shape& s, const Plan& plan, const Scratch& scratch,
                         void* stream) {
  const int64_t stacks = s.pixels ? ceil_div(s.channels, plan.lanes) : s.channels;
  gpu::launch("batch_norm_residual: channel_sums_kernel", channel_sums_kernel<A, Of>,
              dim3(unsigned(plan.splits), unsigned(blocks_of(stacks, 65535))), kThreads, stream, of,
              s, plan, static_cast<const A*>(scratch.table), scratch.sums);
}

}  // namespace

int64_t scratch_bytes(const Args& a) { return Scratch::bytes(a.shape, Plan(a.shape)); }
int64_t scratch_bytes(const BackwardArgs& a) { return Scratch::bytes(a.shape, Plan(a.shape)); }

void launch_cuda(const Args& a, void* stream) {
  const Shape& s = a.shape;
  const Plan plan(s);
  const Scratch scratch(a.scratch, s, plan);
  gpu::with_element(a.dtype, [&](auto element) {
    using T = decltype(element);
    using A = gpu::accumulate_t<T>;
    A *table = static_cast<A*>(scratch.table), *parts = static_cast<A*>(scratch.parts);
    if (a.training) launch_channel_sums<A>(Moments<T>{a, 0}, s, plan, scratch, stream);
    gpu::launch("batch_norm_residual: statistics_kernel", statistics_kernel<T>, grid_of_channels(s),
                kThreads, stream, a, plan, static_cast<const double*>(scratch.sums), table);
    gpu::launch("batch_norm_residual: forward_kernel",
                a.relu ? forward_kernel<T, true> : forward_kernel<T, false>, grid_of(s, plan),
                kThreads, stream, a, plan, static_cast<const A*>(table), parts);
    if (a.sums && s.rows)
      gpu::launch_sum_parts<A>(parts, a.sums, 3 * s.rows, int(plan.pieces), stream);
  });
}

void launch_cuda(const BackwardArgs& a, void* stream) {
  const Shape& s = a.shape;
  const Plan plan(s);
  const Scratch scratch(a.scratch, s, plan);
  gpu::with_element(a.dtype, [&](auto element) {
    using T = decltype(element);
    using A = gpu::accumulate_t<T>;
    A *table = static_cast<A*>(scratch.table), *parts = static_cast<A*>(scratch.parts);
    const A* filled = table;
    gpu::launch("batch_norm_residual: fill_kernel", fill_kernel<A>, grid_of_channels(s), kThreads,
                stream, a, table);
    if (a.training || a.gweight || a.gbias) {
      launch_channel_sums<A>(Reduction<T>{a, 0}, s, plan, scratch, stream);
      gpu::launch("batch_norm_residual: gradients_kernel", gradients_kernel<A>, grid_of_channels(s),
                  kThreads, stream, a, plan, static_cast<const double*>(scratch.sums), table);
    }
    if (a.ggate) {
      gpu::launch("batch_norm_residual: gate_kernel", backward_kernel<T, true>, grid_of(s, plan),
                  kThreads, stream, a, plan, filled, parts);
      if (s.rows) gpu::launch_sum_parts<A>(parts, a.ggate, s.rows, int(plan.pieces), stream);
    }
    gpu::launch("batch_norm_residual: backward_kernel", backward_kernel<T, false>, grid_of(s, plan),
                kThreads, stream, a, plan, filled, parts);
  });
}

}  // namespace fastres::batch_norm_residual
