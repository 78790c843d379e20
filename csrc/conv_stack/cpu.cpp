// conv_stack on the CPU: picks the kernel for the dtype.
#include "cpu_forward.h"

namespace fastres::conv_stack::FASTRES_ISA {

void forward(const Args& a, int64_t first, int64_t images, void* buffer) {
  visit_stored(a.shape.dtype,
               [&](auto t) { Forward<decltype(t)>(a, first, images, buffer).run(nullptr); });
}

void forward_together(const Args& a, void* buffer, Team& team, int wanted) {
  Member member(team, wanted);
  if (!member.takes_part()) return;
  visit_stored(a.shape.dtype,
               [&](auto t) { Forward<decltype(t)>(a, 0, a.shape.batch, buffer).run(&member); });
}

}  // namespace fastres::conv_stack::FASTRES_ISA
