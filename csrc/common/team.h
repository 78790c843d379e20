// team: threads that go through the same steps together, each doing its share of every step.
#pragma once
#include <atomic>
#include <cstdint>

namespace fastres {

// Threads that go through one piece of work together: those that have come when the first of them
// begins. Whoever comes later goes away again, so that all who wait for one another are at work.
struct Team {
  static constexpr int kMost = 64;
  struct alignas(128) Step {  // two lines: neighbours are fetched in pairs
    std::atomic<int64_t> done{0};
  };
  std::atomic<int> joined{0}, size{0};
  Step steps[kMost];  // of each member
};

}  // namespace fastres
