// residual_add as operators: schemas, checks, outputs, and the CPU kernel on NumPy arrays.
#include "../common/op.h"

#include "kernel.h"
#if !defined(FASTRES_CUDA)
#include "../common/numpy.h"
#include "../common/parallel.h"
#include "cpu.h"
#endif

namespace fastres::residual_add {
namespace {

#if defined(FASTRES_CUDA)
template <class Any> void launch(Any args, const Tensor& x) {
  if (args.rows == 0) return;
  Tensor scratch = uninitialized(x, {scratch_bytes(args)}, ScalarType::Byte);
  args.scratch = scratch.mutable_data_ptr();
  on_stream_of(x, [&](void* stream) { launch_cuda(args, stream); });
}
#else
template <class Body> void for_tasks(int64_t rows, int64_t cols, const Body& body) {
  parallel_for(0, rows * segments_of(cols), least_tasks(cols), body);
}

void launch(const Args& a) {
  std::vector<Sums<double>> partial(segments_of(a.cols) > 1 ? a.rows * segments_of(a.cols) : 0);
  Sums<double>* const to = partial.empty() ? nullptr : partial.data();
  for_tasks(a.rows, a.cols,
            [&](int64_t begin, int64_t end) { forward_for_this_cpu()(a, to, begin, end); });
  if (to) join_forward_for_this_cpu()(a, to);
}

void launch(const BackwardArgs& a) {
  std::vector<double> partial(a.ggate && segments_of(a.cols) > 1 ? a.rows * segments_of(a.cols)
                                                                 : 0);
  double* const to = partial.empty() ? nullptr : partial.data();
  for_tasks(a.rows, a.cols,
            [&](int64_t begin, int64_t end) { backward_for_this_cpu()(a, to, begin, end); });
  if (to) join_backward_for_this_cpu()(a, to);
}

template <class Any> void launch(const Any& args, const Tensor&) { launch(args); }
#endif

constexpr const char* kName = "residual_add";

int64_t cols_of(const Tensor& x) {
  int64_t cols = 1;
  for (int64_t d = 1; d < x.dim(); ++d) cols *= x.size(d);
  return cols;
}

void check_inputs(const Tensor& x, const Tensor& f) {
  STD_TORCH_CHECK(x.dim() >= 2, kName, ": x must have 2 or more dimensions, got ", x.dim());
  check_like(kName, "f", f, x);
}

int64_t gate_stride(const OptionalTensor& gate, const Tensor& x) {
  if (!gate) return 0;
  check_small(kName, "gate", *gate, {x.size(0)}, accumulate_type(dtype_of(kName, "x", x)), x);
  return gate->stride(0);
}

// y <- act(x + gate * f), and the sums; mask may be empty. All of one layout.
Tensor add_into(const Tensor& y, const Tensor& x, const Tensor& f, const OptionalTensor& gate,
                bool relu, const Tensor* mask) {
  const Dtype dtype = dtype_of(kName, "x", x);
  Tensor sums = uninitialized(x, {3, x.size(0)}, accumulate_type(dtype));
  launch(Args{x.const_data_ptr(), f.const_data_ptr(), data_or_null(gate), y.mutable_data_ptr(),
              sums.mutable_data_ptr(),
              mask ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr,
              gate_stride(gate, x), x.size(0), cols_of(x), dtype, relu},
         x);
  return sums;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& f, const OptionalTensor& gate,
                                   bool relu) {
  check_inputs(x, f);
  Tensor y = uninitialized_like(x, f);
  return {y, add_into(y, in_layout(x, y), in_layout(f, y), gate, relu, nullptr)};
}

// With the ReLU, and the mask that its backward needs.
std::tuple<Tensor, Tensor, Tensor> forward_masked(const Tensor& x, const Tensor& f,
                                                  const OptionalTensor& gate) {
  check_inputs(x, f);
  Tensor y = uninitialized_like(x, f);
  Tensor mask = uninitialized(x, {x.size(0), ceil_div(cols_of(x), 8)}, ScalarType::Byte);
  Tensor sums = add_into(y, in_layout(x, y), in_layout(f, y), gate, true, &mask);
  return {y, sums, mask};
}

Tensor forward_into(const Tensor& x, const Tensor& f, Tensor y) {
  check_inputs(x, f);
  check_like(kName, "y", y, x);
  STD_TORCH_CHECK(has_dense_samples(x) && same_layout(x, f) && same_layout(x, y), kName,
                  ": x, f and y must have one layout with dense samples");
  return add_into(y, x, f, std::nullopt, false, nullptr);
}

// gx and gf are empty where they equal gy and gx. gy has the layout of y, in whose memory order the
// mask is.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& gy, const OptionalTensor& mask,
                                            const OptionalTensor& gate, const OptionalTensor& x,
                                            const OptionalTensor& f, const OptionalTensor& gs,
                                            bool gate_grad) {
  const Dtype dtype = dtype_of(kName, "gy", gy);
  STD_TORCH_CHECK(has_dense_samples(gy), kName, ": gy must have dense samples");
  STD_TORCH_CHECK(f || !(gs || gate_grad), kName,
                  ": f must be given for the gradients of sums and gate");
  STD_TORCH_CHECK(x || !gs, kName, ": x must be given for the gradients of sums");
  if (x) check_like(kName, "x", *x, gy);
  if (f) check_like(kName, "f", *f, gy);
  if (mask)
    check_small(kName, "mask", *mask, {gy.size(0), ceil_div(cols_of(gy), 8)}, ScalarType::Byte, gy);
  if (gs) check_small(kName, "gs", *gs, {3, gy.size(0)}, accumulate_type(dtype), gy);
  const OptionalTensor skip = in_layout(x, gy), branch = in_layout(f, gy);
  const OptionalTensor sums = as_contiguous(gs), bits = as_contiguous(mask);
  auto output = [&](bool wanted) {
    return wanted ? uninitialized_like(gy) : uninitialized(gy, {0}, gy.scalar_type());
  };
  Tensor gx = output(mask || gs), gf = output(gate || gs);
  Tensor ggate = uninitialized(gy, {gate_grad ? gy.size(0) : 0}, accumulate_type(dtype));
  launch(BackwardArgs{gy.const_data_ptr(), data_or_null(skip), data_or_null(branch),
                      data_or_null(gate), data_or_null(sums),
                      static_cast<const uint8_t*>(data_or_null(bits)),
                      mask || gs ? gx.mutable_data_ptr() : nullptr,
                      gate || gs ? gf.mutable_data_ptr() : nullptr,
                      gate_grad ? ggate.mutable_data_ptr() : nullptr, gate_stride(gate, gy),
                      gy.size(0), cols_of(gy), dtype},
         gy);
  return {gx, gf, ggate};
}

#if !defined(FASTRES_CUDA)
// y, sums = residual_add(x, f, gate=None, relu=False) on C-contiguous arrays [B, ...].
py::tuple on_arrays(const py::object& x_given, const py::object& f_given,
                    const py::object& gate_given, bool relu) {
  const py::array x = numpy::as_array(kName, "x", x_given),
                  f = numpy::as_array(kName, "f", f_given);
  const Dtype dtype = numpy::check_array(kName, "x", x);
  numpy::check_like(kName, "f", f, x);
  const int64_t rows = x.shape(0), cols = rows ? x.size() / rows : 0;
  const py::dtype sum_type = numpy::accumulate_type(dtype);
  std::optional<py::array> gate;
  if (!gate_given.is_none()) {
    gate = numpy::as_array(kName, "gate", gate_given);
    numpy::check_vector(kName, "gate", *gate, rows, sum_type);
  }
  py::array y = numpy::empty_like(x), sums(sum_type, std::vector<py::ssize_t>{3, rows});
  const Args args{x.data(),
                  f.data(),
                  gate ? gate->data() : nullptr,
                  y.mutable_data(),
                  sums.mutable_data(),
                  nullptr,
                  gate ? 1 : 0,
                  rows,
                  cols,
                  dtype,
                  relu};
  {
    const py::gil_scoped_release released;
    launch(args);
  }
  return py::make_tuple(y, sums);
}

const numpy::Entry entry([](py::module_& m) {
  m.def(kName, &on_arrays, py::arg("x"), py::arg("f"), py::arg("gate") = py::none(),
        py::arg("relu") = false,
        "y, sums = residual_add(x, f): x + gate * f, and [3, B] sums of x*x, p*p, x*p "
        "with p = gate * f");
});
#endif

}  // namespace
}  // namespace fastres::residual_add

#if defined(FASTRES_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fastres, m) {
  m.def("_residual_add(Tensor x, Tensor f, Tensor? gate, bool relu) -> (Tensor, Tensor)");
  m.def("_residual_add_masked(Tensor x, Tensor f, Tensor? gate) -> (Tensor, Tensor, Tensor)");
  m.def("_residual_add_(Tensor x, Tensor f, Tensor(a!) y) -> Tensor");
  m.def(
      "_residual_add_backward(Tensor gy, Tensor? mask, Tensor? gate, Tensor? x, Tensor? f, "
      "Tensor? gs, bool gate_grad)"
      " -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
#endif
  m.impl("_residual_add", TORCH_BOX(&fastres::residual_add::forward));
  m.impl("_residual_add_masked", TORCH_BOX(&fastres::residual_add::forward_masked));
  m.impl("_residual_add_", TORCH_BOX(&fastres::residual_add::forward_into));
  m.impl("_residual_add_backward", TORCH_BOX(&fastres::residual_add::backward));
}
