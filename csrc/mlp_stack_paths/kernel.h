// mlp_stack_paths: the gradient of a stack of residual blocks, x <- x + gate * (W2 act(z) + b2),
// z = W1 x + b1, by the number of branches that its paths go through (Veit et al. 2016,
// arXiv 1605.06431). With d = gate * act'(z) of each block as the forward pass gives it, a branch
// sends a cotangent v back as J^T v = W1^T (d * (W2^T v)). From the last block to the first
//   G_k <- G_k + J^T G_{k-1}    R <- R + J^T (R + G_K)    g <- g + J^T g
// from G_0 = g = the cotangent and all else 0: G_k are the lengths, R the tail of those beyond K, g
// the ordinary gradient.
#pragma once
#include "../common/stack.h"

namespace fastres::mlp_stack_paths {

// How products of float32 take their factors, on CUDA: as they are; as sums of two tf32, 22 bits;
// as one, 11 bits, which is not exact.
enum class InputPrecision : int32_t { kIeee, kTf32x3, kTf32 };

struct Shape {
  int64_t batch, width, hidden;  // B, D, H
  int64_t blocks, longest;       // L; K, at most L
  Dtype dtype;                   // of all tensors: float32 or float64
  Activation activation;
  bool shared;  // the weights of block 0 are those of all blocks
  InputPrecision precision;

  FASTRES_HD bool has_tail() const { return longest < blocks; }
  FASTRES_HD int64_t rows() const { return longest + 1 + has_tail(); }  // G_0, ... G_K, and R
};

using Weights = StackWeights;

struct Args {
  Shape shape;
  Weights weights;
  const void* x;            // [B, D], before the first block
  const void* cotangent;    // [B, D], after the last
  double* log2_norms;       // [rows, B]: log2 ||row||
  double* dots;             // [rows, B]: <row, g>
  double* norms;            // [2, B]: ||sum of all rows - g||, ||g||
  void* gradient;           // g, [B, D]
  void* kept;               // [rows, B, D]: the rows themselves; null: not wanted
  void* tail;               // R, [B, D]; null: not wanted
  void* scratch = nullptr;  // scratch_bytes(args)
};

// By the shape alone.
int64_t scratch_bytes(const Args& args);

void launch_cuda(const Args& args, void* stream);

}  // namespace fastres::mlp_stack_paths
