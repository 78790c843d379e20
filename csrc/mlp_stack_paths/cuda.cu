// mlp_stack_paths on CUDA: the derivatives by a forward pass, then all rows of each sample down all
// blocks; where their memory lies, by the shape and the device.
#include <string>

#include "cuda_paths.h"

namespace fastres::mlp_stack_paths {
namespace {

// Blocks of threads whose rows lie in global memory: two for each multiprocessor.
constexpr int64_t kMostBlocks = 2 * gpu::kMultiprocessors;
// Fewer warps than this do not keep a multiprocessor busy.
constexpr int kLeastWarps = 4;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int warps_wanted(const Shape& s) {
  const int64_t rows = Places(s).added_to(s.blocks);
  return int(least(ceil_div(rows, kRowsOfWarp), kMostWarps));
}
// Samples at a time in the forward pass: 16, if the GPU is full with these.
bool few(const Shape& s) { return s.batch <= 4 * gpu::kMultiprocessors; }
int64_t samples_at_a_time(const Shape& s) { return few(s) ? 4 : 16; }

template <class T> int64_t slope_memory(const Shape& s) {  // of a block of threads
  return few(s) ? SlopesLayout<T, 1>(s).rows_bytes : SlopesLayout<T, 4>(s).rows_bytes;
}

// Memory that every device has in shared memory is not in scratch.
template <class T> struct Scratch {
  char *slopes, *slope_memory;
  char *rows, *tile;
  int64_t bytes;
  Scratch(const Shape& s, void* scratch) {
    gpu::Cutter cutter(scratch);
    const int warps = warps_wanted(s);
    const int64_t blocks = least(s.batch, kMostBlocks);
    const PathsLayout<T> few_rows(s, int(least(warps, kLeastWarps)), Memory::kShared),
        one_warp(s, 1, Memory::kRowsGlobal), all_warps(s, warps, Memory::kGlobal);
    const SlopesLayout<T, 1> few_samples(s);
    const auto take = [&](int64_t shared_bytes, int64_t count, int64_t bytes_of_each) {
      return cutter.take<char>(shared_bytes <= gpu::kLeastSharedBytes ? 0 : count * bytes_of_each);
    };
    slopes = cutter.take<char>(s.blocks * s.batch * few_rows.slope_bytes);
    slope_memory = take(few_samples.rows_bytes + few_samples.shared_bytes,
                        least(ceil_div(s.batch, samples_at_a_time(s)), kMostBlocks),
                        mlp_stack_paths::slope_memory<T>(s));
    rows = take(few_rows.shared_bytes, blocks, few_rows.rows_bytes);
    tile_needed = one_warp.shared_bytes > gpu::kLeastSharedBytes;
    tile = take(one_warp.shared_bytes, blocks, all_warps.tile_bytes);
    bytes = cutter.bytes();
  }
  bool tile_needed;
};

// Launches a kernel that no other shares its type of arguments and memory with.
template <class Kernel, class KernelArgs>
void launch(const char* name, Kernel* kernel, std::atomic<uint64_t>& allowed, int64_t blocks,
            int threads, int64_t shared_bytes, void* stream, const KernelArgs& args) {
  gpu::launch_with_shared(name, kernel, allowed, dim3(unsigned(least(blocks, gpu::kMaxBlocks))),
                          threads, shared_bytes, stream, args);
}

template <class T, int kRows, bool kShared>
void launch_slopes(const SlopesArgs<T>& args, void* stream) {
  static std::atomic<uint64_t> allowed{0};
  const SlopesLayout<T, kRows> layout(args.a.shape);
  const int64_t tiles = ceil_div(args.a.shape.batch, 4 * kRows);
  launch("mlp_stack_paths: slopes_kernel", slopes_kernel<T, kRows, kShared>, allowed,
         kShared ? tiles : least(tiles, kMostBlocks), kSlopeThreads,
         layout.shared_bytes + (kShared ? layout.rows_bytes : 0), stream, args);
}

template <class T> void find_slopes(const SlopesArgs<T>& args, void* stream) {
  const Shape& s = args.a.shape;
  const int64_t most = gpu::most_shared_bytes();
  const auto fits = [&](const auto& layout) {
    return layout.shared_bytes + layout.rows_bytes <= most;
  };
  if (!few(s) && fits(SlopesLayout<T, 4>(s))) launch_slopes<T, 4, true>(args, stream);
  else if (fits(SlopesLayout<T, 1>(s))) launch_slopes<T, 1, true>(args, stream);
  else if (few(s)) launch_slopes<T, 1, false>(args, stream);
  else launch_slopes<T, 4, false>(args, stream);
}

template <class Arithmetic, Memory kMemory>
void launch_paths(const PathsArgs<typename Arithmetic::T>& args, int warps, void* stream) {
  using T = typename Arithmetic::T;
  static std::atomic<uint64_t> allowed{0};
  const Shape& s = args.a.shape;
  static const std::string name = std::string("mlp_stack_paths: paths_kernel, ") +
                                  (kMemory == Memory::kShared       ? "shared"
                                   : kMemory == Memory::kRowsGlobal ? "rows global"
                                                                    : "global") +
                                  Arithmetic::kName;
  launch(name.c_str(), paths_kernel<Arithmetic, kMemory>, allowed,
         kMemory == Memory::kShared ? s.batch : least(s.batch, kMostBlocks), 32 * warps,
         PathsLayout<T>(s, warps, kMemory).shared_bytes, stream, args);
}

template <class Arithmetic>
void find_paths(const PathsArgs<typename Arithmetic::T>& args, bool may_be_global, void* stream) {
  using T = typename Arithmetic::T;
  const Shape& s = args.a.shape;
  const int64_t most = gpu::most_shared_bytes();
  const int wanted = warps_wanted(s);
  // The most warps that fit, of `fewest` or more; else 0.
  const auto warps_in = [&](Memory memory, int fewest) {
    int warps = wanted;
    while (warps >= fewest && PathsLayout<T>(s, warps, memory).shared_bytes > most) --warps;
    return warps >= fewest ? warps : 0;
  };
  const int enough = int(least(wanted, kLeastWarps));
  if (const int warps = warps_in(Memory::kShared, enough))
    launch_paths<Arithmetic, Memory::kShared>(args, warps, stream);
  else if (const int warps = warps_in(Memory::kRowsGlobal, may_be_global ? enough : 1))
    launch_paths<Arithmetic, Memory::kRowsGlobal>(args, warps, stream);
  else launch_paths<Arithmetic, Memory::kGlobal>(args, wanted, stream);
}

template <class Body> void with_arithmetic(const Shape& s, const Body& body) {
  if (s.dtype == Dtype::kFloat64) body(MultiplyAdds<double>());
  else if (s.precision == InputPrecision::kTf32x3) body(TensorCores<3>());
  else if (s.precision == InputPrecision::kTf32) body(TensorCores<1>());
  else body(MultiplyAdds<float>());
}

}  // namespace

int64_t scratch_bytes(const Args& a) {
  int64_t bytes = 0;
  with_arithmetic(a.shape, [&](auto arithmetic) {
    bytes = Scratch<typename decltype(arithmetic)::T>(a.shape, nullptr).bytes;
  });
  return bytes;
}

void launch_cuda(const Args& a, void* stream) {
  if (a.shape.batch == 0) return;
  with_arithmetic(a.shape, [&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    using T = typename Arithmetic::T;
    const Scratch<T> scratch(a.shape, a.scratch);
    if (a.shape.blocks)
      find_slopes<T>(SlopesArgs<T>{a, scratch.slopes, scratch.slope_memory}, stream);
    find_paths<Arithmetic>(PathsArgs<T>{a, scratch.slopes, scratch.rows, scratch.tile},
                           scratch.tile_needed, stream);
  });
}

}  // namespace fastres::mlp_stack_paths
