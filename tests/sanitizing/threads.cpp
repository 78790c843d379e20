// threads: torch's parallel_for by threads that the thread sanitizer sees. torch's own are OpenMP's,
// whose run-time library is not instrumented: every loop would look like a race.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
thread_local bool inside = false;  // a loop within a loop has one thread, as torch's
}  // namespace

extern "C" AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return 0;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                             ParallelFunc body, void* context) {
  const int64_t size = end - begin;
  if (size <= 0) return 0;
  const int64_t most =
      inside ? 1 : std::min(kThreads, grain > 0 ? (size + grain - 1) / grain : size);
  const int64_t each = (size + most - 1) / most;
  const auto run = [&](int64_t from) {
    inside = true;
    body(from, std::min(end, from + each), context);
    inside = false;
  };
  if (most == 1) {
    body(begin, end, context);
    return 0;
  }
  std::vector<std::thread> others;
  for (int64_t from = begin + each; from < end; from += each) others.emplace_back(run, from);
  run(begin);
  for (std::thread& thread : others) thread.join();
  return 0;
}
