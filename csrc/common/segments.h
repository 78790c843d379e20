// segments: how the CPU kernels that sum along rows cut a row into tasks.
#pragma once
#include "dtype.h"

namespace fastres {

// One task each: 128 KiB of float32, enough to pay for handing it to a thread.
constexpr int64_t kSegment = 32768;
constexpr int64_t segments_of(int64_t cols) {
  return cols > kSegment ? ceil_div(cols, kSegment) : 1;
}

// Tasks that a thread takes at least: below 32768 elements a second thread costs more than it
// brings.
constexpr int64_t least_tasks(int64_t cols) {
  return ceil_div(32768, cols < kSegment ? cols + 1 : kSegment);
}

}  // namespace fastres
