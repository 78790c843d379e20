// batch_norm_residual on the CPU: how samples are cut into tasks, and the kernels that do a range
// of tasks.
#pragma once
#include "../common/isa.h"
#include "kernel.h"

namespace fastres::batch_norm_residual {

// A task takes so many values or more: 128 KiB of float32, enough to pay for handing it to a
// thread.
constexpr int64_t kTask = 32768;

// The cut: several samples to a task, or several tasks to a sample. It depends on the shape alone,
// so that the order of all sums does.
struct Tasks {
  int64_t samples = 1;   // per task
  int64_t lines;         // of a sample, per task
  int64_t segments = 1;  // tasks per sample
  int64_t count;         // of all tasks
  int64_t slots;         // a slot takes the sums of each channel, over one or more tasks

  explicit Tasks(const Shape& s) : lines(s.lines()) {
    if (s.cols() < kTask) {
      samples = s.cols() ? kTask / s.cols() : 1;
    } else {
      lines = ceil_div(kTask, s.length());
      segments = ceil_div(s.lines(), lines);
    }
    count = segments > 1 ? s.rows * segments : ceil_div(s.rows, samples);
    slots = s.pixels ? count : ceil_div(s.rows, samples);  // planes of a sample share one
  }
};

// Rows of a table of [5, padded] numbers of the accumulate type, one for each channel.
enum Entry { kMean, kScale, kBias, kPerG, kPerF, kEntries };
constexpr int64_t padded(int64_t channels) { return ceil_div(channels, 16) * 16; }

// Training: pivots, moments of all tasks to slots of [2, padded], fill_table. Else fill_table only.
// Then forward, whose sums go to `partial` where a sample has several tasks (join_forward adds them
// up), else straight to the output.
FASTRES_CPU_KERNEL(pivots, const Args&, void* table)
FASTRES_CPU_KERNEL(moments, const Args&, const void* table, double* slots, int64_t, int64_t)
FASTRES_CPU_KERNEL(fill_table, const Args&, const double* slots, void* table)
FASTRES_CPU_KERNEL(forward, const Args&, const void* table, Sums<double>* partial, int64_t, int64_t)
FASTRES_CPU_KERNEL(join_forward, const Args&, const Sums<double>* partial)

// begin_table; in training or where sums are wanted reduce, and end_table; backward.
FASTRES_CPU_KERNEL(begin_table, const BackwardArgs&, void* table)
FASTRES_CPU_KERNEL(reduce, const BackwardArgs&, const void* table, double* slots, double* partial,
                   int64_t, int64_t)
FASTRES_CPU_KERNEL(end_table, const BackwardArgs&, const double* slots, const double* partial,
                   void* table)
FASTRES_CPU_KERNEL(backward, const BackwardArgs&, const void* table, int64_t, int64_t)

}  // namespace fastres::batch_norm_residual
