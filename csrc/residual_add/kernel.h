// residual_add: per row, y = act(x + p) with the perturbation p = gate * f, and the sums x*x, p*p,
// x*p.
//   forward   y = relu ? max(x + p, 0) : x + p;  mask bit = the ReLU lets the cotangent through
//   backward  g = mask ? gy : 0;  gx = g + 2 x gs[0] + p gs[2];  gp = g + 2 p gs[1] + x gs[2]
//             gf = gate gp;  ggate[row] = sum gp f    (gs: cotangents of the three sums, if any)
// A row is one sample; its elements are taken in memory order, so any dense layout is a row.
#pragma once
#include "../common/dtype.h"
#include "../common/sums.h"

namespace fastres::residual_add {

struct Args {
  const void* x;        // [rows, cols]
  const void* f;        // [rows, cols]
  const void* gate;     // [rows] with stride gate_stride, accumulate type; null: 1
  void* y;              // [rows, cols]; may be x or f
  void* sums;           // [3, rows], accumulate type
  uint8_t* mask;        // [rows, ceil(cols / 8)], bit c % 8 of byte c / 8; null: not wanted
  int64_t gate_stride;  // 0: one for all rows
  int64_t rows, cols;
  Dtype dtype;  // of x, f, y; the accumulate type is float64 for float64, else float32
  bool relu;
  void* scratch = nullptr;  // scratch_bytes(args), for rows split over several blocks
};

struct BackwardArgs {
  const void* gy;       // [rows, cols]; null: 0
  const void* x;        // [rows, cols]; null unless gs
  const void* f;        // [rows, cols]; null unless gs or ggate
  const void* gate;     // [rows] with stride gate_stride, accumulate type; null: 1
  const void* gs;       // [3, rows], accumulate type; null: 0
  const uint8_t* mask;  // [rows, ceil(cols / 8)]; null: all ones
  void* gx;             // [rows, cols]; null: not wanted (it is gy)
  void* gf;             // [rows, cols]; null: not wanted (it is gx)
  void* ggate;          // [rows], accumulate type; null: not wanted
  int64_t gate_stride;
  int64_t rows, cols;
  Dtype dtype;
  void* scratch = nullptr;  // scratch_bytes(args), for rows split over several blocks
};

// The cotangents of one row's sums.
template <class A> struct SumGrads {
  A skip_sq, branch_sq, dot;
  template <class V> FASTRES_HD V skip(const V& g, const V& x, const V& p) const {
    return g + (skip_sq + skip_sq) * x + dot * p;
  }
  template <class V> FASTRES_HD V perturbation(const V& g, const V& x, const V& p) const {
    return g + (branch_sq + branch_sq) * p + dot * x;
  }
};

// Bytes of device memory that launch_cuda needs beside its outputs, often 0. They depend on rows,
// cols, dtype and on whether ggate is null.
int64_t scratch_bytes(const Args& args);
int64_t scratch_bytes(const BackwardArgs& args);

void launch_cuda(const Args& args, void* stream);
void launch_cuda(const BackwardArgs& args, void* stream);

}  // namespace fastres::residual_add
