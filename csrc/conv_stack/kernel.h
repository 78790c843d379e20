// conv_stack: L basic blocks of convolutions of 3x3, stride 1, padding 1, at one width:
//   a = relu(conv(x, w1) + b1);  f = conv(a, w2) + b2;  p = gate * f;  x <- relu(x + p)
// and per block and sample the sums x*x, p*p, x*p, of x before the block.
// The stream, the sums and every product are accumulated in float64 for float64, else in float32.
#pragma once
#include "../common/stack.h"

namespace fastres::conv_stack {

struct Shape {
  int64_t batch, channels, height, width;  // N, C, H, W
  int64_t blocks;                          // L
  Dtype dtype;         // of x, y and weights; the accumulate type follows from it
  bool channels_last;  // x and y are [N, H, W, C] in memory, else [N, C, H, W]
  bool tf32;           // CUDA: products of float32 may round their factors to tf32
};

struct Args {
  Shape shape;
  // w1, w2 [L, 3, 3, C in, C out], contiguous: row, column, channel read, channel written.
  // b1, b2 [L, C]; gate [L, N] with the two strides, accumulate type, null: 1.
  StackWeights weights;
  const void* x;            // [N, C, H, W] or [N, H, W, C]; not y
  void* y;                  // likewise
  void* sums;               // [L, 3, N], accumulate type; null: not wanted
  void* scratch = nullptr;  // CUDA: scratch_bytes(args)
};

// Bytes of scratch, for the current device.
int64_t scratch_bytes(const Args& args);

void launch_cuda(const Args& args, void* stream);

// The name of the kernels that take this shape on the current device, with weights on boundaries of
// 16 bytes: "layers" or "resident".
const char* route_cuda(const Shape& shape);

}  // namespace fastres::conv_stack
