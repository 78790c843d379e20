// conv_stack on the CPU: picks the kernel for the dtype.
#include "cpu_forward.h"

namespace fastres::conv_stack::FASTRES_ISA {

void forward(const Args& a, int64_t first, int64_t images, void* buffer) {
  const int64_t rows = rows_of_task(a.shape, images, 1);
  visit_stored(a.shape.dtype,
               [&](auto t) { Forward<decltype(t)>(a, first, images, rows, buffer).run(nullptr); });
}

void forward_together(const Args& a, void* buffer, Team& team, int wanted) {
  Member member(team, wanted);
  const int64_t images = a.shape.batch, rows = rows_of_task(a.shape, images, wanted);
  visit_stored(a.shape.dtype,
               [&](auto t) { Forward<decltype(t)>(a, 0, images, rows, buffer).run(&member); });
}

}  // namespace fastres::conv_stack::FASTRES_ISA
