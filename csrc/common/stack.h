// stack: what a stack of residual blocks x <- x + gate * (W2 act(W1 x + b1) + b2) is made of.
#pragma once
#include "dtype.h"

namespace fastres {

enum class Activation : int32_t { kIdentity, kRelu, kTanh, kSigmoid, kSilu, kGelu, kGeluTanh };

struct StackWeights {
  const void* w1;    // [L or 1, H, D]
  const void* b1;    // [L or 1, H]
  const void* w2;    // [L or 1, D, H]
  const void* b2;    // [L or 1, D]
  const void* gate;  // [L, B] with the two strides, accumulate type; null: 1
  int64_t gate_block_stride, gate_row_stride;
};

}  // namespace fastres
