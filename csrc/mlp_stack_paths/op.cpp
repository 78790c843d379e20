// mlp_stack_paths as an operator: schema, checks, outputs.
#include "../common/stack_inputs.h"
#include "kernel.h"
#if !defined(FASTRES_CUDA)
#include "../common/buffer.h"
#include "../common/parallel.h"
#include "cpu.h"
#endif

namespace fastres::mlp_stack_paths {
namespace {

constexpr const char* kName = "mlp_stack_paths";

#if defined(FASTRES_CUDA)
void run(const Args& a, const Tensor& x) {
  on_stream_of(x, [&](void* stream) { launch_cuda(a, stream); });
}
#else
void run(const Args& a, const Tensor&) {
  const Shape& s = a.shape;
  parallel_for(0, ceil_div(s.batch, 16), 2, [&](int64_t begin, int64_t end) {
    const Buffer buffer(forward_bytes(s));
    derivatives_for_this_cpu()(a, begin, end, buffer.data());
  });
  const int64_t samples = tile_samples(s, torch::stable::get_num_threads());
  const int64_t tiles = ceil_div(s.batch, samples);
  parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const Buffer buffer(lengths_bytes(s, samples));
    for (int64_t tile = begin; tile < end; ++tile)
      lengths_for_this_cpu()(a, tile * samples, samples, buffer.data());
  });
}
#endif

// log2_norms [rows, B], dots [rows, B], norms [2, B], gradient [B, D], tail [B, D], and with `keep`
// the rows [rows, B, D], else [0].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> paths(
    const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    const OptionalTensor& gate, const Tensor& cotangent, int64_t blocks, int64_t activation,
    int64_t longest, bool keep, int64_t precision) {
  const StackInputs in(kName, x, w1, b1, w2, b2, gate, blocks, activation);
  check_like(kName, "cotangent", cotangent, x);
  STD_TORCH_CHECK(in.dtype == Dtype::kFloat32 || in.dtype == Dtype::kFloat64, kName,
                  ": x must be float32 or float64");
  STD_TORCH_CHECK(0 <= longest && longest <= blocks, kName, ": longest must be 0 to ", blocks,
                  ", got ", longest);
  STD_TORCH_CHECK(0 <= precision && precision <= 2, kName, ": precision must be 0 to 2, got ",
                  precision);
  const Shape s{in.batch,      in.width,  in.hidden,
                blocks,        longest,   in.dtype,
                in.activation, in.shared, static_cast<InputPrecision>(precision)};
  const ScalarType type = x.scalar_type();
  const Tensor g = as_contiguous(cotangent);
  const auto measures = [&](int64_t rows) {
    return uninitialized(x, {rows, s.batch}, ScalarType::Double);
  };
  Tensor log2_norms = measures(s.rows()), dots = measures(s.rows()), norms = measures(2);
  Tensor gradient = uninitialized_like(in.x), tail = uninitialized_like(in.x);
  Tensor kept =
      keep ? uninitialized(x, {s.rows(), s.batch, s.width}, type) : uninitialized(x, {0}, type);
  if (!s.has_tail()) torch::stable::zero_(tail);
  Args args{s,
            in.weights(),
            in.x.const_data_ptr(),
            g.const_data_ptr(),
            static_cast<double*>(log2_norms.mutable_data_ptr()),
            static_cast<double*>(dots.mutable_data_ptr()),
            static_cast<double*>(norms.mutable_data_ptr()),
            gradient.mutable_data_ptr(),
            keep ? kept.mutable_data_ptr() : nullptr,
            s.has_tail() ? tail.mutable_data_ptr() : nullptr};
  const Tensor scratch = uninitialized(x, {scratch_bytes(args)}, ScalarType::Byte);
  args.scratch = scratch.mutable_data_ptr();
  if (s.batch) run(args, x);
  return {log2_norms, dots, norms, gradient, tail, kept};
}

}  // namespace
}  // namespace fastres::mlp_stack_paths

#if defined(FASTRES_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fastres, m) {
  m.def(
      "_mlp_stack_paths(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? gate, Tensor "
      "cotangent, int blocks, int activation, int longest, bool keep, int precision) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
#endif
  m.impl("_mlp_stack_paths", TORCH_BOX(&fastres::mlp_stack_paths::paths));
}
