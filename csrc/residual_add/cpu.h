// residual_add on the CPU: the kernels that do a range of tasks, a segment of a row each.
#pragma once
#include "../common/isa.h"
#include "../common/segments.h"
#include "kernel.h"

namespace fastres::residual_add {

// Does tasks [begin, end) of rows * segments; the sums of each task go to `partial` where a row has
// several segments (join_forward, join_backward add them up), else straight to the outputs.
FASTRES_CPU_KERNEL(forward, const Args&, Sums<double>* partial, int64_t begin, int64_t end)
FASTRES_CPU_KERNEL(join_forward, const Args&, const Sums<double>* partial)
FASTRES_CPU_KERNEL(backward, const BackwardArgs&, double* partial, int64_t begin, int64_t end)
FASTRES_CPU_KERNEL(join_backward, const BackwardArgs&, const double* partial)

}  // namespace fastres::residual_add
