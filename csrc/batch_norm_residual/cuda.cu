// batch_norm_residual on CUDA: a kernel for the sums of each channel, one that joins them, and one
// for everything else. Threads stand along lines (planes or pixels), so that they read side by
// side; what they add up goes from blocks to scratch and is joined in order.
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

template <class A, class Any>
__device__ __forceinline__ void fill_norm(const Any& a, A* table, int64_t c) {
  const double var = static_cast<const A*>(a.var)[c];
  table[kMean * a.shape.channels + c] = static_cast<const A*>(a.mean)[c];
  table[kScale * a.shape.channels + c] = number<A>(a.weight, c, 1) / sqrt(var + a.eps);
  table[kBias * a.shape.channels + c] = number<A>(a.bias, c, 0);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(Args a, Plan plan, const double* sums, gpu::accumulate_t<T>* table) {
  using A = gpu::accumulate_t<T>;
  const double count = a.shape.count();
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < a.shape.channels;
       c += int64_t(gridDim.x) * kThreads) {
    if (a.training) {
      Moments<T> moments{a, 0};
      if (a.shape.rows * a.shape.places > 0) moments.begin(nullptr, c);
      const double mean = join_splits(a, plan, sums, 0, c) / count;
      const double var = join_splits(a, plan, sums, 1, c) / count - mean * mean;
      static_cast<A*>(a.mean)[c] = moments.pivot + mean;
      static_cast<A*>(a.var)[c] = var < 0 ? 0 : var;  // NaN stays
    }
    fill_norm(a, table, c);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) fill_kernel(BackwardArgs a, A* table) {
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < a.shape.channels;
       c += int64_t(gridDim.x) * kThreads)
    fill_norm(a, table, c);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(BackwardArgs a, Plan plan, const double* sums, A* table) {
  const int64_t channels = a.shape.channels;
  const double count = a.shape.count();
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < channels;
       c += int64_t(gridDim.x) * kThreads) {
    const double of_g = join_splits(a, plan, sums, 0, c), of_f = join_splits(a, plan, sums, 1, c);
    const double var = static_cast<const A*>(a.var)[c] + a.eps;
    table[kPerG * channels + c] = of_g / count;
    table[kPerF * channels + c] = of_f / (count * var);
    if (!a.gaffine) continue;
    static_cast<A*>(a.gaffine)[c] = of_f / sqrt(var);
    static_cast<A*>(a.gaffine)[channels + c] = of_g;
  }
}

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
          const A skip = read<T>(a.x, i), sum = skip + p;
          total.add(skip, p);
          const bool pass = !(kRelu && sum <= 0);  // NaN passes
          bits = unsigned(pass) << pos % 8;
          static_cast<T*>(a.y)[i] = gpu::narrow<T>(pass ? sum : A(0));
        }
        if (!a.mask) return;
        for (int d = 1; d < 8; d *= 2) bits |= __shfl_xor_sync(~0u, bits, d);
        if (pos < length && pos % 8 == 0) a.mask[line * ceil_div(length, 8) + pos / 8] = bits;
      },
      [&](int64_t row) {
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
    if (s.rows) gpu::launch_sum_parts<A>(parts, a.sums, 3 * s.rows, int(plan.pieces), stream);
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
    if (a.training || a.gaffine) {
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
