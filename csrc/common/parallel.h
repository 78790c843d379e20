// parallel: a range over torch's threads. What a thread throws reaches the caller as it was thrown;
// torch alone would report that something failed, not what.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>

namespace fastres {

// Runs body(from, to) for ranges of [begin, end), each of `grain` numbers at least.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  std::atomic<bool> failed{false};
  std::exception_ptr first;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    try {
      body(from, to);
    } catch (...) {
      if (!failed.exchange(true)) first = std::current_exception();
    }
  });
  if (first) std::rethrow_exception(first);
}

}  // namespace fastres
