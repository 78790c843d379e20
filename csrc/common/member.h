// member: one thread's part in a team, and how it waits for the others.
#pragma once
#include <thread>

#include "team.h"
#include "tile.h"

namespace fastres::FASTRES_ISA {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}
template <class Condition> void wait_until(const Condition& condition) {
  for (int spins = 0; !condition(); ++spins) {
    pause();
    if (spins > 10000) std::this_thread::yield();  // whoever is waited for has lost its core
  }
}

// One thread's part in a team.
class Member {
 public:
  const int wanted;  // how many are expected
  Member(Team& team, int wanted) : wanted(wanted), team_(team) {}
  // Takes part, if it comes before the others begin; before, nothing below is known. From here on
  // others wait for this thread, so that it must not fail: it has taken its memory before.
  bool join() {
    index_ = team_.joined.fetch_add(1);
    if (index_ == 0) {
      // 10,000 looks, some 0.3 ms: a thread that sleeps has come by then, if it comes at all.
      for (int i = 0; i < 10000 && team_.joined.load() < wanted; ++i) pause();
      team_.size.store(team_.joined.exchange(Team::kMost));
    } else if (index_ < wanted) {
      wait_until([&] { return team_.size.load() > 0; });
    }
    size_ = team_.size.load();
    return index_ < size_;
  }
  // The tasks of `count` that are this member's: the same in every step, so that what it writes
  // stays in its core.
  int64_t begin(int64_t count) const { return count * index_ / size_; }
  int64_t end(int64_t count) const { return count * (index_ + 1) / size_; }
  // Ends a step: returns when all have.
  void meet() {
    team_.steps[index_].done.store(++step_, std::memory_order_release);
    for (int m = 0; m < size_; ++m)
      wait_until([&] { return team_.steps[m].done.load(std::memory_order_acquire) >= step_; });
  }
  bool first() const { return index_ == 0; }

 private:
  Team& team_;
  int index_ = 0, size_ = 0;
  int64_t step_ = 0;
};

// A step: body(i) for those i of [0, count) that are this member's, or for all where there is no
// team.
template <class Body> void share(Member* member, int64_t count, const Body& body) {
  const int64_t end = member ? member->end(count) : count;
  for (int64_t i = member ? member->begin(count) : 0; i < end; ++i) body(i);
  if (member) member->meet();
}

}  // namespace fastres::FASTRES_ISA
