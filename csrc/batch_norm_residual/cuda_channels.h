// batch_norm_residual on CUDA: how blocks share the values; the sums of each channel, and the table
// of numbers that they give.
#pragma once
#include "../common/gpu_memory.h"
#include "../common/gpu_reduce.h"
#include "../common/gpu_rows.h"
#include "kernel.h"

namespace fastres::batch_norm_residual {
namespace {

using gpu::at;
using gpu::kThreads;

enum Entry { kMean, kScale, kBias, kPerG, kPerF, kEntries };  // of the table, [kEntries, C]

// What a thread takes at once: a pack of a line, the values of one channel or of as many.
template <class Element, int kWidth_, bool kPixels_> struct Layout {
  using T = Element;
  using A = gpu::accumulate_t<T>;
  using Pack = gpu::Pack<T, kWidth_>;
  static constexpr int kWidth = kWidth_, kChannels = kPixels_ ? kWidth : 1;
  static constexpr bool kPixels = kPixels_;
};

// Elements of a pack: 16 bytes where all lines begin on boundaries of 16, else one.
inline int width_of(const Shape& s, Dtype dtype, uintptr_t addresses) {
  const int64_t size = size_of(dtype);
  return (addresses | (s.length() * size)) % 16 == 0 ? int(16 / size) : 1;
}
inline int width_of(const Args& a) {
  return width_of(a.shape, a.dtype, gpu::join_addresses(a.x, a.f, a.y));
}
inline int width_of(const BackwardArgs& a) {
  return width_of(a.shape, a.dtype, gpu::join_addresses(a.gy, a.f, a.gx, a.gf));
}
template <class Any, class Body> void with_layout(const Any& a, const Body& body) {
  gpu::with_element(a.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = gpu::kPackSize<T>;
    const bool packed = width_of(a) > 1;
    if (a.shape.pixels) packed ? body(Layout<T, kWidth, true>()) : body(Layout<T, 1, true>());
    else packed ? body(Layout<T, kWidth, false>()) : body(Layout<T, 1, false>());
  });
}

// `lanes` threads, so many that they fill bytes of the mask, take a line together.
struct Plan {
  int lanes, groups;               // lanes * groups == kThreads
  int64_t stacks;                  // of channels that a block sums up together
  int64_t splits;                  // blocks that share the sums of a channel
  int64_t pieces;                  // blocks that share a sample
  int64_t step_rows, step_places;  // splits * groups places on, in samples and places
  // Of packs of `width` elements.
  Plan(const Shape& s, int width) {
    lanes = 8 / width;
    while (lanes < kThreads && lanes * width < s.length()) lanes *= 2;
    groups = kThreads / lanes;
    const int64_t wanted = ceil_div(gpu::kFullGrid, s.rows ? s.rows : 1);
    const int64_t most = ceil_div(s.lines(), groups);  // at least a line for each group
    pieces = wanted < most ? wanted : most ? most : 1;
    stacks = s.pixels ? ceil_div(s.channels, lanes * width) : s.channels;
    const int64_t lines = s.rows * (s.pixels ? s.places : 1);  // of one channel
    const int64_t full = ceil_div(gpu::kFullGrid, stacks ? stacks : 1);
    const int64_t fair = ceil_div(lines, 4 * groups);  // below 4 lines a thread it is not worth it
    splits = full < fair ? full : fair ? fair : 1;
    const int64_t places = s.places ? s.places : 1;
    step_rows = splits * groups / places;
    step_places = splits * groups % places;
  }
};
template <class Any> Plan plan_of(const Any& a) { return Plan(a.shape, width_of(a)); }

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
template <class L> __device__ __forceinline__ typename L::Pack pack(const void* p, int64_t i) {
  typename L::Pack loaded;
  gpu::load(loaded, at<typename L::T>(p, i));
  return loaded;
}

// An entry of the channels of a pack, from channel c on.
template <class L> struct Entries {
  using A = typename L::A;
  A v[L::kChannels];
  __device__ __forceinline__ Entries(const A* table, int64_t channels, Entry entry, int64_t c) {
    const A* const from = table + entry * channels + c;
    constexpr int kPack = L::kChannels == 1 ? 1 : gpu::kPackSize<A>;
#pragma unroll
    for (int i = 0; i < L::kChannels; i += kPack) {
      gpu::Pack<A, kPack> some;
      gpu::load(some, from + i);
#pragma unroll
      for (int e = 0; e < kPack; ++e) v[i + e] = some.v[e];
    }
  }
  __device__ __forceinline__ A of(int e) const { return v[L::kPixels ? e : 0]; }
};
template <class L> struct Norms {
  using A = typename L::A;
  Entries<L> mean, scale, bias;
  __device__ __forceinline__ Norms(const A* table, int64_t channels, int64_t c)
      : mean(table, channels, kMean, c),
        scale(table, channels, kScale, c),
        bias(table, channels, kBias, c) {}
  __device__ __forceinline__ Norm<A> of(int e) const {
    return {mean.of(e), scale.of(e), bias.of(e)};
  }
};

// The cotangents of a pack of y, 0 where the ReLU is closed.
template <class L> struct Cotangents {
  typename L::Pack gy;
  unsigned open = ~0u;
  __device__ __forceinline__ Cotangents(const BackwardArgs& a, int64_t line, int64_t pos) {
    const int64_t length = a.shape.length();
    gy = pack<L>(a.gy, line * length + pos);
    if (a.mask) open = a.mask[line * ceil_div(length, 8) + pos / 8] >> pos % 8;
  }
  __device__ __forceinline__ typename L::A of(int e) const {
    return open >> e & 1 ? gpu::widen(gy.v[e]) : 0;
  }
};

// What the sums of a channel are of: visit(e, first, second) for each value of a pack.
template <class L> struct Moments {
  using A = typename L::A;
  Args a;
  A pivot[L::kChannels];
  __device__ __forceinline__ void begin(const A*, int64_t c) {
    for (int e = 0; e < L::kChannels; ++e) {
      const int64_t first = a.shape.pixels ? c + e : c * a.shape.places;
      pivot[e] = a.shape.any() ? read<typename L::T>(a.f, first) : A(0);
      if (!(pivot[e] - pivot[e] == 0)) pivot[e] = 0;  // not finite
    }
  }
  template <class Visit>
  __device__ __forceinline__ void values(int64_t, int64_t line, int64_t pos,
                                         const Visit& visit) const {
    const auto f = pack<L>(a.f, line * a.shape.length() + pos);
#pragma unroll
    for (int e = 0; e < L::kWidth; ++e) {
      const double d = gpu::widen(f.v[e]) - pivot[L::kPixels ? e : 0];
      visit(e, d, d * d);
    }
  }
};
template <class L> struct Reduction {
  using A = typename L::A;
  BackwardArgs a;
  A mean[L::kChannels];
  __device__ __forceinline__ void begin(const A* table, int64_t c) {
    for (int e = 0; e < L::kChannels; ++e) mean[e] = table[c + e];
  }
  template <class Visit>
  __device__ __forceinline__ void values(int64_t row, int64_t line, int64_t pos,
                                         const Visit& visit) const {
    const A gate = number<A>(a.gate, row * a.gate_stride, 1);
    const Cotangents<L> gy(a, line, pos);
    const auto f = pack<L>(a.f, line * a.shape.length() + pos);
#pragma unroll
    for (int e = 0; e < L::kWidth; ++e) {
      const A g = gpu::product(gate, gy.of(e));
      visit(e, g, g * (gpu::widen(f.v[e]) - mean[L::kPixels ? e : 0]));
    }
  }
};

// Sums over the threads of a block that have the same channels, `lanes` apart, to out: of value i
// of the pack that lane l has, [l * kChannels + i / 2] of sums i % 2.
template <int kChannels, class Store>
__device__ __forceinline__ void sum_groups(double (&v)[2 * kChannels], int lanes,
                                           const Store& store) {
  SHARED_ARRAY(double, parts, [2 * kChannels][kThreads]);
  for (int distance = 16; distance >= lanes; distance /= 2)  // within the warp
#pragma unroll
    for (int i = 0; i < 2 * kChannels; ++i) v[i] += __shfl_xor_sync(~0u, v[i], distance);
  const int share = lanes < 32 ? 32 : lanes;  // threads of which `lanes` have sums
  const int lane = threadIdx.x % share, part = threadIdx.x / share;
  __syncthreads();  // the parts of the call before this one have been read
  if (lane < lanes)
#pragma unroll
    for (int i = 0; i < 2 * kChannels; ++i) parts[i][part * lanes + lane] = v[i];
  __syncthreads();
  for (int j = threadIdx.x; j < 2 * kChannels * lanes; j += kThreads) {
    double total = 0;
    for (int k = j % lanes; k < kThreads / share * lanes; k += lanes) total += parts[j / lanes][k];
    store(j % lanes, j / lanes, total);
  }
}

// Grid: splits, and channels (planes) or stacks of channels (pixels).
template <class L, class Of>
__global__ void __launch_bounds__(kThreads, 3)  // 80 registers
    channel_sums_kernel(Of of, Shape s, Plan plan, const typename L::A* table, double* sums) {
  const int lane = threadIdx.x & (plan.lanes - 1), group = threadIdx.x / plan.lanes;
  const unsigned start = blockIdx.x * plan.groups + group;
  for (int64_t stack = blockIdx.y; stack < plan.stacks; stack += gridDim.y) {
    const int64_t top = stack * plan.lanes * L::kWidth;  // pixels: the first channel of lane 0
    const int64_t c = L::kPixels ? top + lane * L::kWidth : stack;
    double sum[2 * L::kChannels] = {};
    const auto add = [&](int e, double first, double second) {
      double* const of_channel = sum + (L::kPixels ? 2 * e : 0);
      of_channel[0] += first;
      of_channel[1] += second;
    };
    if (c < s.channels) of.begin(table, c);
    if constexpr (!L::kPixels) {
      for (int64_t row = start; row < s.rows; row += plan.splits * plan.groups)
        for (int64_t pos = lane * L::kWidth; pos < s.places; pos += plan.lanes * L::kWidth)
          of.values(row, row * s.channels + c, pos, add);
      gpu::sum_lanes(sum, kThreads);
      for (int k = 0; threadIdx.x == 0 && k < 2; ++k)
        sums[(k * s.channels + c) * plan.splits + blockIdx.x] = sum[k];
    } else {
      if (c < s.channels && s.places > 0) {
        int64_t row = start < s.places ? 0 : start / unsigned(s.places);
        int64_t place = start - row * s.places;
        while (row < s.rows) {
          of.values(row, row * s.places + place, c, add);
          row += plan.step_rows;
          place += plan.step_places;
          if (place >= s.places) {
            place -= s.places;
            ++row;
          }
        }
      }
      sum_groups<L::kChannels>(sum, plan.lanes, [&](int of_lane, int i, double total) {
        const int64_t channel = top + of_lane * L::kWidth + i / 2;
        if (channel < s.channels)
          sums[(i % 2 * s.channels + channel) * plan.splits + blockIdx.x] = total;
      });
    }
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
      Moments<Layout<T, 1, false>> moments{a, {}};
      moments.begin(nullptr, c);
      const double moved = join_splits(a, plan, sums, 0, c) / count,
                   mean = moments.pivot[0] + moved;
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
