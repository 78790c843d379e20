// batch_norm_residual as operators: schemas, checks, outputs, and the CPU kernel on NumPy arrays.
#include "../common/op.h"

#include "kernel.h"
#if !defined(FASTRES_CUDA)
#include "../common/numpy.h"
#include "../common/parallel.h"
#include "cpu.h"
#endif

namespace fastres::batch_norm_residual {
namespace {

#if defined(FASTRES_CUDA)
template <class Any> void launch(Any args, const Tensor& x) {
  Tensor scratch = uninitialized(x, {scratch_bytes(args)}, ScalarType::Byte);
  args.scratch = scratch.mutable_data_ptr();
  on_stream_of(x, [&](void* stream) { launch_cuda(args, stream); });
}
#else
template <class Body> void for_tasks(const Tasks& tasks, const Body& body) {
  parallel_for(0, tasks.count, 1, body);
}

void launch(const Args& a) {
  const Tasks tasks(a.shape);
  const int64_t channels = padded(a.shape.channels);
  std::vector<double> table(kEntries * channels);
  std::vector<double> slots(a.training ? tasks.slots * 2 * channels : 0);
  std::vector<Sums<double>> partial(a.sums && tasks.segments > 1 ? tasks.count : 0);
  if (a.training && a.shape.any()) {
    pivots_for_this_cpu()(a, table.data());
    for_tasks(tasks, [&](int64_t begin, int64_t end) {
      moments_for_this_cpu()(a, table.data(), slots.data(), begin, end);
    });
  }
  fill_table_for_this_cpu()(a, slots.data(), table.data());
  Sums<double>* const to = partial.empty() ? nullptr : partial.data();
  for_tasks(tasks, [&](int64_t begin, int64_t end) {
    forward_for_this_cpu()(a, table.data(), to, begin, end);
  });
  if (to) join_forward_for_this_cpu()(a, to);
}

void launch(const BackwardArgs& a) {
  const Tasks tasks(a.shape);
  const int64_t channels = padded(a.shape.channels);
  std::vector<double> table(kEntries * channels);
  begin_table_for_this_cpu()(a, table.data());
  if (a.training || a.gweight || a.gbias || a.ggate) {
    std::vector<double> slots(tasks.slots * 2 * channels);
    std::vector<double> partial(tasks.segments > 1 ? tasks.count : a.shape.rows);
    for_tasks(tasks, [&](int64_t begin, int64_t end) {
      reduce_for_this_cpu()(a, table.data(), slots.data(), partial.data(), begin, end);
    });
    end_table_for_this_cpu()(a, slots.data(), partial.data(), table.data());
  }
  for_tasks(tasks, [&](int64_t begin, int64_t end) {
    backward_for_this_cpu()(a, table.data(), begin, end);
  });
}

template <class Any> void launch(const Any& args, const Tensor&) { launch(args); }
#endif

constexpr const char* kName = "batch_norm_residual";

Shape shape_of(const Tensor& t) {  // of a tensor with dense samples
  const int64_t rows = t.size(0), channels = t.size(1);
  int64_t places = 1;
  for (int64_t d = 2; d < t.dim(); ++d) places *= t.size(d);
  return {rows, channels, places, places == 1 || (channels > 1 && t.stride(1) == 1)};
}

// Whether samples are dense and each is [C, S] or [S, C] in memory.
bool has_lines(const Tensor& t) {
  if (!has_dense_samples(t)) return false;
  const Shape s = shape_of(t);
  return s.pixels || s.channels <= 1 || t.numel() == 0 || t.stride(1) == s.places;
}

// An uninitialised y: in the layout of the first that has lines, else contiguous.
Tensor output_of(const Tensor& x, const Tensor& f) {
  return has_lines(x)   ? uninitialized_like(x)
         : has_lines(f) ? uninitialized_like(f)
                        : uninitialized_contiguous(x);
}

void check_channels(const char* argument, const OptionalTensor& t, const Tensor& f,
                    ScalarType type) {
  if (t) check_small(kName, argument, *t, {f.size(1)}, type, f);
}

int64_t gate_stride(const OptionalTensor& gate, const Tensor& f, ScalarType wide) {
  if (!gate) return 0;
  check_small(kName, "gate", *gate, {f.size(0)}, wide, f);
  return gate->stride(0);
}

// A running statistic that is written in place.
void* moved(const char* argument, const OptionalTensor& t, const Tensor& f, ScalarType wide) {
  check_channels(argument, t, f, wide);
  STD_TORCH_CHECK(!t || t->is_contiguous(), kName, ": ", argument, " must be contiguous");
  return t ? t->mutable_data_ptr() : nullptr;
}

// The number of calls in training, which goes up in place.
int64_t* counted(const OptionalTensor& t, const Tensor& f) {
  if (!t) return nullptr;
  check_small(kName, "num_batches_tracked", *t, {}, ScalarType::Long, f);
  return static_cast<int64_t*>(t->mutable_data_ptr());
}

// y, sums, statistics [3, C], mask; sums are empty where there is no skip, and the mask where none
// is wanted. weight, bias, mean and var are of the accumulate type, or where statistics are given
// all of that of f. The running statistics and their count move in training, and are not read
// otherwise.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const OptionalTensor& x, const Tensor& f, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& var,
    const OptionalTensor& gate, double eps, bool relu, bool masked, const OptionalTensor& lost,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum,
    const OptionalTensor& num_batches_tracked) {
  const Dtype dtype = dtype_of(kName, "f", f);
  STD_TORCH_CHECK(f.dim() >= 2, kName, ": f must have 2 or more dimensions, got ", f.dim());
  if (x) check_like(kName, "x", *x, f);
  STD_TORCH_CHECK(bool(mean) == bool(var), kName, ": mean and var must be given both or none");
  STD_TORCH_CHECK(bool(running_mean) == bool(running_var), kName,
                  ": running_mean and running_var must be given both or none");
  const OptionalTensor weights = as_contiguous(weight), biases = as_contiguous(bias);
  const OptionalTensor means = as_contiguous(mean), vars = as_contiguous(var),
                       losts = as_contiguous(lost);
  const ScalarType wide = accumulate_type(dtype);
  const bool narrow = mean && mean->scalar_type() == f.scalar_type();
  const ScalarType small = narrow ? f.scalar_type() : wide;
  check_channels("weight", weights, f, small);
  check_channels("bias", biases, f, small);
  check_channels("mean", means, f, small);
  check_channels("var", vars, f, small);
  check_channels("lost", losts, f, wide);
  const bool training = !mean;
  Tensor y = on_large_pages(output_of(x ? *x : f, f));
  const OptionalTensor skip = in_layout(x, y);
  const Tensor branch = in_layout(f, y);
  const Shape shape = shape_of(y);
  Tensor sums = uninitialized(f, {3, x ? f.size(0) : 0}, wide);
  Tensor statistics = uninitialized(f, {3, f.size(1)}, wide);
  Tensor mask =
      uninitialized(f, {masked ? f.size(0) : 0, masked ? shape.mask_cols() : 0}, ScalarType::Byte);
  launch(Args{data_or_null(skip),
              branch.const_data_ptr(),
              data_or_null(weights),
              data_or_null(biases),
              data_or_null(gate),
              y.mutable_data_ptr(),
              x ? sums.mutable_data_ptr() : nullptr,
              data_or_null(means),
              data_or_null(vars),
              data_or_null(losts),
              statistics.mutable_data_ptr(),
              moved("running_mean", running_mean, f, wide),
              moved("running_var", running_var, f, wide),
              counted(num_batches_tracked, f),
              masked ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr,
              gate_stride(gate, f, wide),
              shape,
              eps,
              momentum,
              dtype,
              relu,
              training,
              narrow},
         f);
  return {y, sums, statistics, mask};
}

// gx is empty where it equals gy; all but gf where they are not wanted. gweight and gbias are [C],
// ggate [B]. gy has the layout of y, in whose memory order the mask is.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& gy, const OptionalTensor& mask, const Tensor& f, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& statistics, const OptionalTensor& gate, double eps,
    bool training, bool skip_grad, bool affine_grad, bool gate_grad) {
  const Dtype dtype = dtype_of(kName, "gy", gy);
  STD_TORCH_CHECK(gy.dim() >= 2 && has_lines(gy), kName, ": gy must have the layout of y");
  check_like(kName, "f", f, gy);
  const OptionalTensor weights = as_contiguous(weight), biases = as_contiguous(bias);
  const Tensor kept = as_contiguous(statistics);
  const OptionalTensor bits = as_contiguous(mask);
  const ScalarType wide = accumulate_type(dtype);
  check_channels("weight", weights, gy, wide);
  check_channels("bias", biases, gy, wide);
  check_small(kName, "statistics", kept, {3, gy.size(1)}, wide, gy);
  const Shape shape = shape_of(gy);
  if (bits)
    check_small(kName, "mask", *bits, {gy.size(0), shape.mask_cols()}, ScalarType::Byte, gy);
  const Tensor branch = in_layout(f, gy);
  const bool writes_gx = mask && skip_grad;
  Tensor gx =
      writes_gx ? on_large_pages(uninitialized_like(gy)) : uninitialized(gy, {0}, gy.scalar_type());
  Tensor gf = on_large_pages(uninitialized_like(gy));
  Tensor gweight = uninitialized(gy, {affine_grad ? gy.size(1) : 0}, wide);
  Tensor gbias = uninitialized(gy, {affine_grad ? gy.size(1) : 0}, wide);
  Tensor ggate = uninitialized(gy, {gate_grad ? gy.size(0) : 0}, wide);
  launch(BackwardArgs{gy.const_data_ptr(), branch.const_data_ptr(), data_or_null(weights),
                      data_or_null(biases), data_or_null(gate), kept.const_data_ptr(),
                      static_cast<const uint8_t*>(data_or_null(bits)),
                      writes_gx ? gx.mutable_data_ptr() : nullptr, gf.mutable_data_ptr(),
                      affine_grad ? gweight.mutable_data_ptr() : nullptr,
                      affine_grad ? gbias.mutable_data_ptr() : nullptr,
                      gate_grad ? ggate.mutable_data_ptr() : nullptr, gate_stride(gate, gy, wide),
                      shape, eps, dtype, training},
         gy);
  return {gx, gf, gweight, gbias, ggate};
}

#if !defined(FASTRES_CUDA)
// y, sums, mean, var = batch_norm_residual(x, f, ...) on C-contiguous arrays [B, C, ...].
py::tuple on_arrays(const py::object& x_given, const py::object& f_given, const py::object& weight,
                    const py::object& bias, const py::object& mean, const py::object& var,
                    double eps, bool relu) {
  const py::array x = numpy::as_array(kName, "x", x_given),
                  f = numpy::as_array(kName, "f", f_given);
  const Dtype dtype = numpy::check_array(kName, "x", x);
  numpy::check_like(kName, "f", f, x);
  const py::dtype wide = numpy::accumulate_type(dtype);
  const int64_t rows = x.shape(0), channels = x.shape(1);
  const int64_t lines = rows * channels, places = lines > 0 ? x.size() / lines : 0;
  auto channel_data = [&](const char* name, const py::object& given) -> const void* {
    if (given.is_none()) return nullptr;
    const py::array a = numpy::as_array(kName, name, given);
    numpy::check_vector(kName, name, a, channels, wide);
    return a.data();
  };
  const void *of_weight = channel_data("weight", weight), *of_bias = channel_data("bias", bias),
             *of_mean = channel_data("mean", mean), *of_var = channel_data("var", var);
  if (!of_mean != !of_var)
    throw py::value_error(numpy::message(kName, "var", "be given with mean", var));
  py::array y = numpy::empty_like(x), sums(wide, std::vector<py::ssize_t>{3, rows}),
            statistics(wide, std::vector<py::ssize_t>{3, channels});
  const Args args{x.data(),
                  f.data(),
                  of_weight,
                  of_bias,
                  nullptr,
                  y.mutable_data(),
                  sums.mutable_data(),
                  of_mean,
                  of_var,
                  nullptr,
                  statistics.mutable_data(),
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  0,
                  {rows, channels, places, places == 1},
                  eps,
                  0,
                  dtype,
                  relu,
                  !of_mean,
                  false};
  {
    const py::gil_scoped_release released;
    launch(args);
  }
  return py::make_tuple(y, sums, statistics[py::int_(0)], statistics[py::int_(1)]);
}

const numpy::Entry entry([](py::module_& m) {
  m.def(kName, &on_arrays, py::arg("x"), py::arg("f"), py::arg("weight") = py::none(),
        py::arg("bias") = py::none(), py::arg("mean") = py::none(), py::arg("var") = py::none(),
        py::arg("eps") = 1e-5, py::arg("relu") = false,
        "y, sums, mean, var = batch_norm_residual(x, f): x plus the normalised f [B, C, ...], "
        "[3, B] sums of x*x, p*p, x*p, and the statistics that f was normalised by");
});
#endif

}  // namespace
}  // namespace fastres::batch_norm_residual

#if defined(FASTRES_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fastres, m) {
  m.def(
      "_batch_norm_residual(Tensor? x, Tensor f, Tensor? weight, Tensor? bias, Tensor? mean, "
      "Tensor? var, Tensor? gate, float eps, bool relu, bool masked, Tensor? lost=None, "
      "Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, float momentum=0, "
      "Tensor(c!)? num_batches_tracked=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_batch_norm_residual_backward(Tensor gy, Tensor? mask, Tensor f, Tensor? weight, "
      "Tensor? bias, Tensor statistics, Tensor? gate, float eps, "
      "bool training, bool skip_grad, bool affine_grad, bool gate_grad) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
#endif
  m.impl("_batch_norm_residual", TORCH_BOX(&fastres::batch_norm_residual::forward));
  m.impl("_batch_norm_residual_backward", TORCH_BOX(&fastres::batch_norm_residual::backward));
}
