// path_accumulate on the CPU: the kernels that do a range of tasks, a segment of a line each.
#pragma once
#include "../common/isa.h"
#include "../common/segments.h"
#include "kernel.h"

namespace fastres::path_accumulate {

// Does tasks [begin, end) of lines * segments; the sums of each go to `partial` where a line has
// several segments (join adds them up), else straight to the output.
FASTRES_CPU_KERNEL(accumulate, const Args&, Sums<double>* partial, int64_t begin, int64_t end)
FASTRES_CPU_KERNEL(join, const Args&, const Sums<double>* partial)

}  // namespace fastres::path_accumulate
