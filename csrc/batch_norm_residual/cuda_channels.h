// batch_norm_residual on CUDA: how blocks share the values; the sums of each channel, and the table
// of numbers that they give.
#pragma once
#include "../common/gpu_reduce.h"
#include "../common/gpu_rows.h"
#include "kernel.h"

namespace fastres::batch_norm_residual {
namespace {

using gpu::kThreads;

enum Entry { kMean, kScale, kBias, kPerG, kPerF, kEntries };  // of the table, [kEntries, C]

// `lanes` threads, 8 or more so that they fill bytes of the mask, take a line together.
struct Plan {
  int lanes, groups;               // lanes * groups == kThreads
  int64_t splits;                  // blocks that share the sums of a channel
  int64_t pieces;                  // blocks that share a sample
  int64_t step_rows, step_places;  // splits * groups places on, in samples and places
  explicit Plan(const Shape& s) {
    lanes = 8;
    while (lanes < kThreads && lanes < s.length()) lanes *= 2;
    groups = kThreads / lanes;
    const int64_t wanted = ceil_div(gpu::kFullGrid, s.rows ? s.rows : 1);
    const int64_t most = ceil_div(s.lines(), groups);  // at least a line for each group
    pieces = wanted < most ? wanted : most ? most : 1;
    const int64_t stacks = s.pixels ? ceil_div(s.channels, lanes) : s.channels;
    const int64_t lines = s.rows * (s.pixels ? s.places : 1);  // of one channel
    const int64_t full = ceil_div(gpu::kFullGrid, stacks ? stacks : 1);
    const int64_t fair = ceil_div(lines, 4 * groups);  // below 4 lines a thread it is not worth it
    splits = full < fair ? full : fair ? fair : 1;
    const int64_t places = s.places ? s.places : 1;
    step_rows = splits * groups / places;
    step_places = splits * groups % places;
  }
};

// Where the parts of the scratch begin.
struct Scratch {
  double* sums;  // [2, C, splits]
  void* table;   // [kEntries, C], accumulate type
  void* parts;   // [3, rows, pieces], accumulate type
  static int64_t bytes(const Shape& s, const Plan& plan) {
    return 8 * (2 * s.channels * plan.splits + kEntries * s.channels + 3 * s.rows * plan.pieces);
  }
  Scratch(void* at, const Shape& s, const Plan& plan)
      : sums(static_cast<double*>(at)),
        table(sums + 2 * s.channels * plan.splits),
        parts(sums + 2 * s.channels * plan.splits + kEntries * s.channels) {}
};

template <class T>
__device__ __forceinline__ gpu::accumulate_t<T> read(const void* p, int64_t i) {
  return gpu::widen(static_cast<const T*>(p)[i]);
}
template <class A>
__device__ __forceinline__ A number(const void* p, int64_t i, A otherwise) {
  return p ? static_cast<const A*>(p)[i] : otherwise;
}
template <class A>
__device__ __forceinline__ Norm<A> norm_of(const A* table, int64_t channels, int64_t c) {
  return {table[kMean * channels + c], table[kScale * channels + c], table[kBias * channels + c]};
}

// The cotangent of y at a place of a line, 0 where the ReLU is closed.
template <class T>
__device__ __forceinline__ gpu::accumulate_t<T> cotangent(const BackwardArgs& a, int64_t line,
                                                          int64_t pos) {
  const int64_t length = a.shape.length();
  if (a.mask && !(a.mask[line * ceil_div(length, 8) + pos / 8] >> pos % 8 & 1)) return 0;
  return read<T>(a.gy, line * length + pos);
}

// What the sums of a channel are of, value by value.
template <class T> struct Moments {
  using A = gpu::accumulate_t<T>;
  Args a;
  A pivot;
  __device__ __forceinline__ void begin(const A*, int64_t c) {
    pivot = a.shape.any() ? read<T>(a.f, a.shape.pixels ? c : c * a.shape.places) : A(0);
    if (!(pivot - pivot == 0)) pivot = 0;  // not finite
  }
  __device__ __forceinline__ void add(int64_t, int64_t line, int64_t pos, double (&sum)[2]) const {
    const double d = read<T>(a.f, line * a.shape.length() + pos) - pivot;
    sum[0] += d;
    sum[1] += d * d;
  }
};
template <class T> struct Reduction {
  using A = gpu::accumulate_t<T>;
  BackwardArgs a;
  A mean;
  __device__ __forceinline__ void begin(const A* table, int64_t c) { mean = table[c]; }
  __device__ __forceinline__ void add(int64_t row, int64_t line, int64_t pos,
                                      double (&sum)[2]) const {
    const A gate = number<A>(a.gate, row * a.gate_stride, 1);
    const A g = gpu::product(gate, cotangent<T>(a, line, pos));
    sum[0] += g;
    sum[1] += g * (read<T>(a.f, line * a.shape.length() + pos) - mean);
  }
};

// Grid: splits, and channels (planes) or stacks of `lanes` channels (pixels).
template <class A, class Of>
__global__ void __launch_bounds__(kThreads)
    channel_sums_kernel(Of of, Shape s, Plan plan, const A* table, double* sums) {
  SHARED_ARRAY(double, shared, [kThreads][2]);
  const int lane = threadIdx.x & (plan.lanes - 1), group = threadIdx.x / plan.lanes;
  const int64_t stacks = s.pixels ? ceil_div(s.channels, plan.lanes) : s.channels;
  const unsigned start = blockIdx.x * plan.groups + group;
  for (int64_t stack = blockIdx.y; stack < stacks; stack += gridDim.y) {
    const int64_t c = s.pixels ? stack * plan.lanes + lane : stack;
    double sum[2] = {};
    if (c < s.channels) of.begin(table, c);
    if (!s.pixels) {
      for (int64_t row = start; row < s.rows; row += plan.splits * plan.groups)
        for (int64_t pos = lane; pos < s.places; pos += plan.lanes)
          of.add(row, row * s.channels + c, pos, sum);
    } else if (c < s.channels && s.places > 0) {
      int64_t row = start < s.places ? 0 : start / unsigned(s.places);
      int64_t place = start - row * s.places;
      while (row < s.rows) {
        of.add(row, row * s.places + place, c, sum);
        row += plan.step_rows;
        place += plan.step_places;
        if (place >= s.places) {
          place -= s.places;
          ++row;
        }
      }
    }
    const int take = s.pixels ? plan.lanes : 1;  // threads whose sums are one channel's
    shared[threadIdx.x][0] = sum[0];
    shared[threadIdx.x][1] = sum[1];
    __syncthreads();
    if (threadIdx.x < unsigned(take) && c < s.channels)
      for (int k = 0; k < 2; ++k) {
        double total = 0;
        for (int i = threadIdx.x; i < kThreads; i += take) total += shared[i][k];
        sums[(k * s.channels + c) * plan.splits + blockIdx.x] = total;
      }
    __syncthreads();
  }
}

template <class Any>
__device__ __forceinline__ double join_splits(const Any& a, const Plan& plan, const double* sums,
                                              int k, int64_t c) {
  double total = 0;
  for (int64_t i = 0; i < plan.splits; ++i)
    total += sums[(k * a.shape.channels + c) * plan.splits + i];
  return total;
}

// given(p): the channel's number there. What rounding took of the mean goes to the bias.
template <class A, class Any, class Given>
__device__ __forceinline__ void fill_norm(const Any& a, A* table, int64_t c, const Given& given) {
  const auto of = Statistics<A>::of(a.statistics, a.shape.channels, c);
  const double scale = (a.weight ? given(a.weight) : 1) / sqrt(of.var + a.eps);
  const double bias = a.bias ? given(a.bias) : 0;
  table[kMean * a.shape.channels + c] = of.mean;
  table[kScale * a.shape.channels + c] = scale;
  table[kBias * a.shape.channels + c] = bias - scale * of.lost;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(Args a, Plan plan, const double* sums, gpu::accumulate_t<T>* table) {
  using A = gpu::accumulate_t<T>;
  const double count = a.shape.count();
  if (a.batches && blockIdx.x == 0 && threadIdx.x == 0) ++*a.batches;
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < a.shape.channels;
       c += int64_t(gridDim.x) * kThreads) {
    if (a.training) {
      Moments<T> moments{a, 0};
      moments.begin(nullptr, c);
      const double moved = join_splits(a, plan, sums, 0, c) / count, mean = moments.pivot + moved;
      keep_moments<A>(a, c, mean, join_splits(a, plan, sums, 1, c) / count - moved * moved);
    }
    const auto given = [&](const void* p) { return a.narrow ? read<T>(p, c) : read<A>(p, c); };
    if (!a.training) Statistics<A>{given(a.mean), given(a.var), number<A>(a.lost, c, 0)}.keep(a, c);
    fill_norm(a, table, c, given);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) fill_kernel(BackwardArgs a, A* table) {
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < a.shape.channels;
       c += int64_t(gridDim.x) * kThreads)
    fill_norm(a, table, c, [&](const void* p) { return read<A>(p, c); });
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(BackwardArgs a, Plan plan, const double* sums, A* table) {
  const int64_t channels = a.shape.channels;
  const double count = a.shape.count();
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < channels;
       c += int64_t(gridDim.x) * kThreads) {
    const auto of = Statistics<A>::of(a.statistics, channels, c);
    const double var = of.var + a.eps, lost = of.lost;
    const double of_g = join_splits(a, plan, sums, 0, c);
    const double of_f = join_splits(a, plan, sums, 1, c) - lost * of_g;
    const double per_f = of_f / (count * var);
    table[kPerG * channels + c] = of_g / count - lost * per_f;
    table[kPerF * channels + c] = per_f;
    if (a.gweight) static_cast<A*>(a.gweight)[c] = of_f / sqrt(var);
    if (a.gbias) static_cast<A*>(a.gbias)[c] = of_g;
  }
}

}  // namespace
}  // namespace fastres::batch_norm_residual
