// cuda_copies: cp.async on fibers. A copy lands when its thread waits for it, and not before: until
// then its target is full of NaN, for whoever reads too early, or still wanted what was there.
#pragma once
#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

inline void start_copy(const char* what, void* to, const void* from, unsigned bytes, bool inside,
                       Site at) {
  check_aligned(what, to, bytes, at);
  check_aligned(what, from, bytes, at);
  if (!is_shared(to) || is_shared(from)) fail(what, ": not from global to shared memory", at);
  char now[16];  // read here too, so that a sanitizer sees where the copy was started
  if (inside) std::memcpy(now, from, bytes);
  asm volatile("" ::"r"(now) : "memory");
  poison(to, bytes);
  self().copies.push_back({to, inside ? from : nullptr, bytes, self().groups});
}

inline void wait_for_copies(unsigned left) {
  Fiber& me = self();
  const auto landed = [&me, left](const Copy& copy) {
    if (copy.group + left >= me.groups) return false;
    if (copy.from) std::memcpy(copy.to, copy.from, copy.bytes);
    else std::memset(copy.to, 0, copy.bytes);
    return true;
  };
  me.copies.erase(std::remove_if(me.copies.begin(), me.copies.end(), landed), me.copies.end());
}

}  // namespace cuda_on_cpu
