// residual_add on the CPU: how rows are cut into tasks, and the kernels that do a range of tasks.
#pragma once
#include "../common/isa.h"
#include "kernel.h"

namespace fastres::residual_add {

// A row is cut into segments, one task each: 128 KiB of float32, enough to pay for handing it to a
// thread.
constexpr int64_t kSegment = 32768;
constexpr int64_t segments_of(int64_t cols) {
  return cols > kSegment ? ceil_div(cols, kSegment) : 1;
}

// Does tasks [begin, end) of rows * segments; the sums of each task go to `partial` where a row has
// several segments (join_forward, join_backward add them up), else straight to the outputs.
FASTRES_CPU_KERNEL(forward, const Args&, Sums<double>* partial, int64_t begin, int64_t end)
FASTRES_CPU_KERNEL(join_forward, const Args&, const Sums<double>* partial)
FASTRES_CPU_KERNEL(backward, const BackwardArgs&, double* partial, int64_t begin, int64_t end)
FASTRES_CPU_KERNEL(join_backward, const BackwardArgs&, const double* partial)

}  // namespace fastres::residual_add
