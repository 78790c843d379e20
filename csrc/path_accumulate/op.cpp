// path_accumulate as an operator: schema, checks, outputs, and the CPU kernel on NumPy arrays.
#include "../common/op.h"

#include "kernel.h"
#if !defined(FASTRES_CUDA)
#include "../common/numpy.h"
#include "../common/parallel.h"
#include "cpu.h"
#endif

namespace fastres::path_accumulate {
namespace {

#if defined(FASTRES_CUDA)
void launch(Args args, const Tensor& like) {
  if (args.lines() == 0) return;
  Tensor scratch = uninitialized(like, {scratch_bytes(args)}, ScalarType::Byte);
  args.scratch = scratch.mutable_data_ptr();
  on_stream_of(like, [&](void* stream) { launch_cuda(args, stream); });
}
#else
void launch(const Args& a) {
  const int64_t segments = segments_of(a.cols), tasks = a.lines() * segments;
  std::vector<Sums<double>> partial(segments > 1 ? tasks : 0);
  Sums<double>* const to = partial.empty() ? nullptr : partial.data();
  parallel_for(0, tasks, least_tasks(a.cols),
               [&](int64_t begin, int64_t end) { accumulate_for_this_cpu()(a, to, begin, end); });
  if (to) join_for_this_cpu()(a, to);
}

void launch(const Args& args, const Tensor&) { launch(args); }
#endif

constexpr const char* kName = "path_accumulate";

// t must be one row of `like`, [samples, ...] of its [rows * samples, ...].
void check_row(const char* argument, const OptionalTensor& t, const Tensor& like, int64_t samples) {
  if (!t) return;
  bool same = t->scalar_type() == like.scalar_type() && t->device() == like.device() &&
              t->dim() == like.dim() && t->size(0) == samples;
  for (int64_t d = 1; same && d < t->dim(); ++d) same = t->size(d) == like.size(d);
  STD_TORCH_CHECK(same, kName, ": ", argument, " must have the shape, dtype and device of a row");
}

// One row in the layout of all rows.
OptionalTensor row_in_layout(const OptionalTensor& t, const Tensor& like) {
  if (!t || same_layout(*t, like)) return t;
  return filled(
      empty_strided(like, t->sizes().data(), like.strides().data(), like.dim(), like.scalar_type()),
      *t);
}

// branch, skip: [rows * samples, ...]; before, gradient: [samples, ...]; steps: [rows] int32.
// Returns the new rows and their sums, [1 or 2, rows * samples].
std::tuple<Tensor, Tensor> accumulate(const OptionalTensor& skip, const Tensor& branch,
                                      const OptionalTensor& before, const OptionalTensor& gradient,
                                      const OptionalTensor& steps, int64_t rows, bool tail) {
  const Dtype dtype = dtype_of(kName, "branch", branch);
  STD_TORCH_CHECK(branch.dim() >= 1 && rows >= 1 && branch.size(0) % rows == 0, kName,
                  ": rows must be a divisor of the first size of branch");
  const int64_t samples = branch.size(0) / rows;
  if (skip) check_like(kName, "skip", *skip, branch);
  check_row("before", before, branch, samples);
  check_row("gradient", gradient, branch, samples);
  if (steps) check_small(kName, "steps", *steps, {rows}, ScalarType::Int, branch);
  int64_t cols = 1;
  for (int64_t d = 1; d < branch.dim(); ++d) cols *= branch.size(d);
  Tensor out = uninitialized_like(skip ? *skip : branch, branch);
  const OptionalTensor own = in_layout(skip, out), first = row_in_layout(before, out),
                       g = row_in_layout(gradient, out), by = as_contiguous(steps);
  const Tensor from = in_layout(branch, out);
  Tensor sums = uninitialized(branch, {g ? 2 : 1, branch.size(0)}, accumulate_type(dtype));
  launch(Args{data_or_null(own), from.const_data_ptr(), data_or_null(first), data_or_null(g),
              static_cast<const int32_t*>(data_or_null(by)), out.mutable_data_ptr(),
              sums.mutable_data_ptr(), rows, samples, cols, dtype, tail, g.has_value()},
         branch);
  return {out, sums};
}

#if !defined(FASTRES_CUDA)
std::optional<py::array> array_like(const char* argument, const py::object& given,
                                    const py::array& like) {
  if (given.is_none()) return std::nullopt;
  py::array array = numpy::as_array(kName, argument, given);
  numpy::check_like(kName, argument, array, like);
  return array;
}

const void* data_or_null(const std::optional<py::array>& a) { return a ? a->data() : nullptr; }

// rows, sums = path_accumulate(skip, branch, gradient=None, before=None, steps=None, tail=False) on
// C-contiguous arrays [rows, samples, ...]; skip may be None.
py::tuple on_arrays(const py::object& skip_given, const py::object& branch_given,
                    const py::object& gradient_given, const py::object& before_given,
                    const py::object& steps_given, bool tail) {
  const py::array branch = numpy::as_array(kName, "branch", branch_given);
  const Dtype dtype = numpy::check_array(kName, "branch", branch);
  const int64_t rows = branch.shape(0), samples = branch.shape(1);
  if (rows == 0)
    throw py::value_error(numpy::message(kName, "branch", "have 1 or more rows", py::int_(0)));
  const py::array row = branch[py::int_(0)];
  const std::optional<py::array> skip = array_like("skip", skip_given, branch),
                                 gradient = array_like("gradient", gradient_given, row),
                                 before = array_like("before", before_given, row);
  std::optional<py::array> steps;
  if (!steps_given.is_none()) {
    steps = numpy::as_array(kName, "steps", steps_given);
    numpy::check_vector(kName, "steps", *steps, rows, py::dtype::of<int32_t>());
  }
  py::array out = numpy::empty_like(branch),
            sums(numpy::accumulate_type(dtype),
                 std::vector<py::ssize_t>{gradient ? 2 : 1, rows, samples});
  const Args args{data_or_null(skip),
                  branch.data(),
                  data_or_null(before),
                  data_or_null(gradient),
                  static_cast<const int32_t*>(data_or_null(steps)),
                  out.mutable_data(),
                  sums.mutable_data(),
                  rows,
                  samples,
                  samples ? row.size() / samples : 0,
                  dtype,
                  tail,
                  gradient.has_value()};
  {
    const py::gil_scoped_release released;
    launch(args);
  }
  return py::make_tuple(out, sums);
}

const numpy::Entry entry([](py::module_& m) {
  m.def(kName, &on_arrays, py::arg("skip"), py::arg("branch"), py::arg("gradient") = py::none(),
        py::arg("before") = py::none(), py::arg("steps") = py::none(), py::arg("tail") = false,
        "rows, sums = path_accumulate(skip, branch): row k is skip[k] + 2^steps[k] branch[k-1]; "
        "sums [1 or 2, R, B] of row*row and, with a gradient, row*gradient");
});
#endif

}  // namespace
}  // namespace fastres::path_accumulate

#if defined(FASTRES_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fastres, m) {
  m.def(
      "_path_accumulate(Tensor? skip, Tensor branch, Tensor? before, Tensor? gradient, "
      "Tensor? steps, int rows, bool tail) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
#endif
  m.impl("_path_accumulate", TORCH_BOX(&fastres::path_accumulate::accumulate));
}
