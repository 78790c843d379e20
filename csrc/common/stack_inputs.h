// stack_inputs: the tensors of a stack of residual blocks as an operator is given them: checked,
// and contiguous where the kernels want it.
#pragma once
#include "op.h"
#include "stack.h"

namespace fastres {

struct StackInputs {
  Tensor x, w1, b1, w2, b2;
  OptionalTensor gate;
  int64_t batch, width, hidden, blocks;
  Dtype dtype;
  Activation activation;
  bool shared;  // one set of weights for several blocks
  ScalarType wide;

  StackInputs(const char* op, const Tensor& x_given, const Tensor& w1_given, const Tensor& b1_given,
              const Tensor& w2_given, const Tensor& b2_given, const OptionalTensor& gate_given,
              int64_t blocks, int64_t activation)
      : x(as_contiguous(x_given)),
        w1(as_contiguous(w1_given)),
        b1(as_contiguous(b1_given)),
        w2(as_contiguous(w2_given)),
        b2(as_contiguous(b2_given)),
        gate(gate_given),
        blocks(blocks),
        activation(static_cast<Activation>(activation)) {
    STD_TORCH_CHECK(x.dim() == 2 && w1.dim() == 3, op, ": x must be [B, D] and w1 [L, H, D]");
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::kGeluTanh),
                    op, ": activation must be the number of one, got ", activation);
    const int64_t sets = w1.size(0);
    batch = x.size(0), width = x.size(1), hidden = w1.size(1), shared = sets != blocks;
    dtype = dtype_of(op, "x", x), wide = accumulate_type(dtype);
    STD_TORCH_CHECK(blocks >= 0 && (sets == blocks || sets == 1), op,
                    ": w1 must have 1 or blocks sets of weights, got ", sets);
    const ScalarType type = x.scalar_type();
    check_small(op, "w1", w1, {sets, hidden, width}, type, x);
    check_small(op, "b1", b1, {sets, hidden}, type, x);
    check_small(op, "w2", w2, {sets, width, hidden}, type, x);
    check_small(op, "b2", b2, {sets, width}, type, x);
    STD_TORCH_CHECK(width > 0 && hidden > 0, op, ": x and w1 must have features");
    if (gate) check_small(op, "gate", *gate, {blocks, batch}, wide, x);
  }

  StackWeights weights() const {
    return {w1.const_data_ptr(),       b1.const_data_ptr(), w2.const_data_ptr(),
            b2.const_data_ptr(),       data_or_null(gate),  gate ? gate->stride(0) : 0,
            gate ? gate->stride(1) : 0};
  }
};

}  // namespace fastres
