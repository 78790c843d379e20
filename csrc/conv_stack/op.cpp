// conv_stack as an operator: schema, checks, outputs, and the images that a thread takes at a time.
#include "../common/op.h"
#include "kernel.h"
#if !defined(FASTRES_CUDA)
#include "../common/batch.h"
#include "../common/numpy.h"
#include "cpu.h"
#endif

namespace fastres::conv_stack {
namespace {

constexpr const char* kName = "conv_stack";

#if defined(FASTRES_CUDA)
void run(Args a, const Tensor& x) {
  on_stream_of(x, [&](void* stream) {
    const Tensor scratch = uninitialized(x, {scratch_bytes(a)}, ScalarType::Byte);
    a.scratch = scratch.mutable_data_ptr();
    launch_cuda(a, stream);
  });
}

bool resident(const Tensor& x, bool tf32) {
  const Shape s{x.size(0), x.size(1), x.size(2), x.size(3), 1, dtype_of(kName, "x", x), true, tf32};
  bool found = false;
  on_stream_of(x, [&](void*) { found = std::string(route_cuda(s)) == "resident"; });
  return found;
}
#else
// Threads that take all images together, or 1: they do where that pays, and would otherwise leave
// some of them idle for a good part of the time.
int members_for(const Shape& s, int64_t threads) {
  const int64_t rows = rows_of(s, s.batch), rounds = ceil_div(s.batch, threads);
  if (s.batch % threads == 0 || rounds > 4 || rows < 2 || !pays_to_share(s, threads)) return 1;
  return static_cast<int>(std::min({threads, rows, static_cast<int64_t>(Team::kMost)}));
}

void run(const Args& a) {
  const Shape& s = a.shape;
  if (const int members = members_for(s, torch::stable::get_num_threads()); members > 1)
    return as_team(members, buffer_bytes(s, s.batch), [&](void* buffer, Team& team, int wanted) {
      forward_together_for_this_cpu()(a, buffer, team, wanted);
    });
  for_tiles(
      s.batch, 1, [&](int64_t images) { return buffer_bytes(s, images); },
      [&](int64_t, int64_t image, int64_t images, void* buffer) {
        forward_for_this_cpu()(a, image, images, buffer);
      });
}
void run(const Args& a, const Tensor&) { run(a); }
#endif

bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// w [L, C, C, 3, 3] as [L, 3, 3, C in, C out]: itself where it lies so, else a copy.
Tensor packed(const Tensor& w) {
  const int64_t c = w.size(1), c2 = c * c;
  const int64_t strides[5] = {9 * c2, 1, c, 3 * c2, c2};
  bool same = true;
  for (int d = 0; d < 5; ++d) same &= w.size(d) == 1 || w.stride(d) == strides[d];
  return same ? w : filled(empty_strided(w, w.sizes().data(), strides, 5, w.scalar_type()), w);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_given, const Tensor& w1, const Tensor& b1,
                                   const Tensor& w2, const Tensor& b2, const OptionalTensor& gate,
                                   bool stats, bool tf32) {
  STD_TORCH_CHECK(x_given.dim() == 4 && w1.dim() == 5, kName,
                  ": x must be [N, C, H, W] and w1 [L, C, C, 3, 3]");
  STD_TORCH_CHECK(x_given.size(1) > 0 && x_given.size(2) > 0 && x_given.size(3) > 0, kName,
                  ": x must have sizes C, H, W >= 1");
  const bool channels_last = !x_given.is_contiguous() && is_channels_last(x_given);
  const Tensor x = channels_last ? x_given : as_contiguous(x_given);
  const Dtype dtype = dtype_of(kName, "x", x);
  const ScalarType type = x.scalar_type(), wide = accumulate_type(dtype);
  const int64_t blocks = w1.size(0), batch = x.size(0), channels = x.size(1);
  check_small(kName, "w1", w1, {blocks, channels, channels, 3, 3}, type, x);
  check_small(kName, "w2", w2, {blocks, channels, channels, 3, 3}, type, x);
  check_small(kName, "b1", b1, {blocks, channels}, type, x);
  check_small(kName, "b2", b2, {blocks, channels}, type, x);
  if (gate) check_small(kName, "gate", *gate, {blocks, batch}, wide, x);
  const Tensor weights[4] = {packed(w1), as_contiguous(b1), packed(w2), as_contiguous(b2)};
  Tensor y = uninitialized_like(x);
  Tensor sums = stats ? uninitialized(x, {blocks, 3, batch}, wide) : uninitialized(x, {0}, wide);
  const Shape s{batch, channels, x.size(2), x.size(3), blocks, dtype, channels_last, tf32};
  const Args args{s,
                  {weights[0].const_data_ptr(), weights[1].const_data_ptr(),
                   weights[2].const_data_ptr(), weights[3].const_data_ptr(), data_or_null(gate),
                   gate ? gate->stride(0) : 0, gate ? gate->stride(1) : 0},
                  x.const_data_ptr(),
                  y.mutable_data_ptr(),
                  stats ? sums.mutable_data_ptr() : nullptr};
  if (batch) run(args, x);
  return {y, sums};
}

#if !defined(FASTRES_CUDA)
// y, sums = conv_stack(x, w1, b1, w2, b2) on C-contiguous arrays, weights [L, 3, 3, C in, C out].
py::tuple on_arrays(const py::object& x_given, const py::object& w1_given,
                    const py::object& b1_given, const py::object& w2_given,
                    const py::object& b2_given) {
  const py::array x = numpy::as_array(kName, "x", x_given);
  const py::array weights[4] = {
      numpy::as_array(kName, "w1", w1_given), numpy::as_array(kName, "b1", b1_given),
      numpy::as_array(kName, "w2", w2_given), numpy::as_array(kName, "b2", b2_given)};
  const Dtype dtype = numpy::check_array(kName, "x", x);
  if (x.ndim() != 4 || weights[0].ndim() != 5)
    throw py::value_error(numpy::message(
        kName, "w1", "have shape [L, 3, 3, C, C] and x [N, C, H, W]", weights[0].attr("shape")));
  if (x.shape(1) == 0 || x.shape(2) == 0 || x.shape(3) == 0)
    throw py::value_error(numpy::message(kName, "x", "have sizes C, H, W >= 1", x.attr("shape")));
  const int64_t blocks = weights[0].shape(0), channels = x.shape(1);
  const std::vector<py::ssize_t> shapes[4] = {{blocks, 3, 3, channels, channels},
                                              {blocks, channels},
                                              {blocks, 3, 3, channels, channels},
                                              {blocks, channels}};
  const char* const names[4] = {"w1", "b1", "w2", "b2"};
  for (int i = 0; i < 4; ++i)
    numpy::check_like(kName, names[i], weights[i], py::array(x.dtype(), shapes[i]));
  const Shape s{x.shape(0), channels, x.shape(2), x.shape(3), blocks, dtype, false, false};
  py::array y = numpy::empty_like(x),
            sums(numpy::accumulate_type(dtype), std::vector<py::ssize_t>{blocks, 3, s.batch});
  const Args args{
      s,
      {weights[0].data(), weights[1].data(), weights[2].data(), weights[3].data(), nullptr, 0, 0},
      x.data(),
      y.mutable_data(),
      sums.mutable_data()};
  {
    const py::gil_scoped_release released;
    if (s.batch) run(args);
  }
  return py::make_tuple(y, sums);
}

const numpy::Entry entry([](py::module_& m) {
  m.def(kName, &on_arrays, py::arg("x"), py::arg("w1"), py::arg("b1"), py::arg("w2"), py::arg("b2"),
        "y, sums = conv_stack(x, w1, b1, w2, b2): L blocks x = relu(x + conv2(relu(conv1(x)))) of "
        "convolutions of 3x3 with weights [L, 3, 3, C in, C out] and biases, and the [L, 3, N] "
        "sums of x*x, p*p, x*p of each, with p what the block adds");
});
#endif

}  // namespace
}  // namespace fastres::conv_stack

#if defined(FASTRES_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
  m.impl("_conv_stack_resident", TORCH_BOX(&fastres::conv_stack::resident));
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fastres, m) {
  m.def(
      "_conv_stack(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? gate, bool stats, "
      "bool tf32) -> (Tensor, Tensor)");
  m.def("_conv_stack_resident(Tensor x, bool tf32) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
#endif
  m.impl("_conv_stack", TORCH_BOX(&fastres::conv_stack::forward));
}
