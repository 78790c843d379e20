// path_accumulate: G_k <- S^T G_k + V_{k-1}, for all path lengths k at once, and of each new row
// and sample its sums G_k*G_k and G_k*g.
//   out[k, b] = skip[k, b] + 2^steps[k] from[k, b]    from[k] = branch[k-1],  from[0] = before or 0
//   with tail, the last row holds all longer lengths, which stay in it: + branch[k, b]
// A line is one sample of one row; its elements are taken in memory order.
#pragma once
#include <cmath>
#include <limits>

#include "../common/dtype.h"

namespace fastres::path_accumulate {

struct Args {
  const void* skip;      // [rows, samples, cols]: S^T G; null: 0
  const void* branch;    // [rows, samples, cols]: V = J^T G
  const void* before;    // [samples, cols]: what the row before the first brings; null: 0
  const void* gradient;  // [samples, cols]: g; null unless dot, and where it is empty
  const int32_t* steps;  // [rows]; null: 0
  void* out;             // [rows, samples, cols]; may be skip
  void* sums;            // [1 + dot, rows, samples], accumulate type: squares and dots
  int64_t rows, samples, cols;
  Dtype dtype;  // of all but steps and sums; the accumulate type is float64 for float64, else
                // float32
  bool tail;
  bool dot;
  void* scratch = nullptr;  // scratch_bytes(args), for lines split over several blocks

  FASTRES_HD int64_t lines() const { return rows * samples; }
  FASTRES_HD int sum_count() const { return dot ? 2 : 1; }
};

// The sums of one line. A: a number, or a vector of partial sums.
template <class A> struct Sums {
  A square{}, dot{};
};

// 2^exponent. One too large for A becomes A's largest power: only zeros can be multiplied by more.
template <class A> FASTRES_HD A power_of_two(int32_t exponent) {
  constexpr int32_t kMost = std::numeric_limits<A>::max_exponent - 1;
  return std::ldexp(A(1), exponent < kMost ? exponent : kMost);
}

// What goes into one line: pointers to its elements, null where there is nothing.
template <class T, class A> struct Line {
  const T *skip, *from, *own, *gradient;
  T* out;
  A power{1};

  FASTRES_HD Line(const Args& a, int64_t line, int64_t row, int64_t sample) {
    const int64_t at = line * a.cols, within = sample * a.cols;
    skip = a.skip ? static_cast<const T*>(a.skip) + at : nullptr;
    out = static_cast<T*>(a.out) + at;
    own = a.tail && row == a.rows - 1 ? static_cast<const T*>(a.branch) + at : nullptr;
    gradient = a.gradient ? static_cast<const T*>(a.gradient) + within : nullptr;
    if (row > 0) from = static_cast<const T*>(a.branch) + at - a.samples * a.cols;
    else from = a.before ? static_cast<const T*>(a.before) + within : nullptr;
    if (a.steps) power = power_of_two<A>(a.steps[row]);
  }
};

// Bytes of device memory that launch_cuda needs beside its outputs, often 0. They depend on sizes,
// dtype and dot.
int64_t scratch_bytes(const Args& args);
void launch_cuda(const Args& args, void* stream);

}  // namespace fastres::path_accumulate
