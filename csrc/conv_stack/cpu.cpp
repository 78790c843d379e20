// conv_stack on the CPU: picks the kernel for the dtype.
#include "cpu_forward.h"
#include "cpu_pairs.h"

namespace fastres::conv_stack::FASTRES_ISA {

namespace {

void run(const Args& a, int64_t first, int64_t images, void* buffer, Member* member) {
  const int64_t rows = rows_of_task(a.shape, images, member ? member->wanted : 1);
#if defined(FASTRES_PAIRS)
  if (in_pairs(a.shape)) return ForwardInPairs(a, first, images, rows, buffer).run(member);
#endif
  visit_stored(a.shape.dtype,
               [&](auto t) { Forward<decltype(t)>(a, first, images, rows, buffer).run(member); });
}

}  // namespace

void forward(const Args& a, int64_t first, int64_t images, void* buffer) {
  run(a, first, images, buffer, nullptr);
}
void forward_together(const Args& a, void* buffer, Team& team, int wanted) {
  Member member(team, wanted);
  run(a, 0, a.shape.batch, buffer, &member);
}

}  // namespace fastres::conv_stack::FASTRES_ISA
