// mlp_stack as operators: schemas, checks, outputs, and the walk over segments of blocks backwards.
#include "../common/stack_inputs.h"
#include "kernel.h"
#if !defined(FASTRES_CUDA)
#include <array>
#include <atomic>

#include "../common/batch.h"
#include "../common/numpy.h"
#include "cpu.h"
#endif

namespace fastres::mlp_stack {
namespace {

constexpr const char* kName = "mlp_stack";

#if defined(FASTRES_CUDA)
// 64 MiB: so many blocks that one launch of their weight gradients fills the GPU.
int64_t left_bytes_of_segment(const Shape&) { return 64 << 20; }

void run(const Args& a, const Tensor& x) {
  on_stream_of(x, [&](void* stream) { launch_cuda(a, stream); });
}
void run(const BackwardArgs& a, const Tensor& x) {
  on_stream_of(x, [&](void* stream) {
    launch_cuda_chain(a, stream);
    if (a.gw1) launch_cuda_weights(a, stream);
  });
}
#else
// 1 MiB a thread: what the chain leaves for the weight gradients is then still in second caches.
// The gradients of shared weights are sums over segments, which no number of threads may change.
int64_t left_bytes_of_segment(const Shape& s) {
  return int64_t(1 << 20) * (s.shared ? 2 : torch::stable::get_num_threads());
}

// Passes all samples through `alone`(row, rows, buffer) tile by tile, each of whole `step`s, or as
// one tile through `together`(buffer, team, members) where not all threads find one.
template <class Bytes, class Alone, class Together>
void for_tiles(const Shape& s, int64_t step, bool pays_to_share, const Bytes& bytes,
               const Alone& alone, const Together& together) {
  const int members = members_for(s, step, torch::stable::get_num_threads(), pays_to_share);
  if (members > 1) return as_team(members, bytes(s, s.batch), together);
  fastres::for_tiles(
      s.batch, step, [&](int64_t rows) { return bytes(s, rows); },
      [&](int64_t, int64_t row, int64_t rows, void* buffer) { alone(row, rows, buffer); });
}

void run(const Args& a) {
  for_tiles(
      a.shape, forward_step(a), pays_to_share_up(a.shape), forward_tile_bytes,
      [&](int64_t row, int64_t rows, void* buffer) {
        forward_for_this_cpu()(a, row, rows, buffer);
      },
      [&](void* buffer, Team& team, int members) {
        forward_together_for_this_cpu()(a, buffer, team, members);
      });
}
void run_in_turns(const BackwardArgs& a) {
  std::vector<std::atomic<int64_t>> done(ceil_div(a.shape.batch, kSlab));  // of each tile
  const Shape& s = a.shape;
  const auto bytes = [&](int64_t rows) { return chain_tile_bytes(s, rows) + left_bytes(s); };
  fastres::for_tiles(s.batch, kSlab, bytes,
                     [&](int64_t tile, int64_t row, int64_t rows, void* buffer) {
                       const Turn turn{tile ? &done[tile - 1] : nullptr, &done[tile]};
                       chain_in_turn_for_this_cpu()(a, row, rows, buffer, turn);
                     });
}
// The chain on the thread that comes first, and behind it, on all threads, the weight gradients.
void run_followed(BackwardArgs a, int64_t threads, int64_t rows) {
  std::atomic<int64_t> came{0}, next{0}, done{0};
  a.done = &done;
  const int64_t tasks = weight_tasks(a, rows);
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    if (came++ == 0) {
      try {
        const Buffer buffer(chain_tile_bytes(a.shape, a.shape.batch));
        chain_for_this_cpu()(a, 0, a.shape.batch, buffer.data());
      } catch (...) {  // of memory that was not to be had: nobody is to wait for the rest
        done = a.shape.blocks;
        throw;
      }
    }
    for (int64_t task = next++; task < tasks; task = next++)
      weights_for_this_cpu()(a, rows, task, task + 1);
  });
}
void run(const BackwardArgs& a) {
  if (in_turns(a)) return run_in_turns(a);
  const int64_t threads = torch::stable::get_num_threads(), rows = rows_of_task(a, threads);
  if (can_be_followed(a, threads)) return run_followed(a, threads, rows);
  for_tiles(
      a.shape, kLargestGroup, pays_to_share_down(a, threads), chain_tile_bytes,
      [&](int64_t row, int64_t rows, void* buffer) { chain_for_this_cpu()(a, row, rows, buffer); },
      [&](void* buffer, Team& team, int members) {
        chain_together_for_this_cpu()(a, buffer, team, members);
      });
  if (!a.gw1) return;
  parallel_for(0, weight_tasks(a, rows), 1,
               [&](int64_t begin, int64_t end) { weights_for_this_cpu()(a, rows, begin, end); });
}
template <class Any> void run(const Any& args, const Tensor&) { run(args); }
#endif

Shape shape_of(const StackInputs& in, bool tf32) {
  return {in.batch, in.width, in.hidden, in.blocks, in.dtype, in.activation, in.shared, tf32};
}

Tensor scratch_of(const Tensor& like, int64_t bytes) {
  return on_large_pages(uninitialized(like, {bytes}, ScalarType::Byte));
}

void* data_if(bool wanted, const Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& w1, const Tensor& b1,
                                           const Tensor& w2, const Tensor& b2,
                                           const OptionalTensor& gate, int64_t blocks,
                                           int64_t activation, int64_t every, bool stats,
                                           bool tf32) {
  const StackInputs in(kName, x, w1, b1, w2, b2, gate, blocks, activation);
  const Shape s = shape_of(in, tf32);
  Tensor y = uninitialized_like(in.x);
  Tensor sums =
      stats ? uninitialized(x, {blocks, 3, s.batch}, in.wide) : uninitialized(x, {0}, in.wide);
  Tensor states = every ? on_large_pages(uninitialized(
                              x, {ceil_div(blocks, every), s.batch, s.width}, x.scalar_type()))
                        : uninitialized(x, {0}, x.scalar_type());
  Args args{s,
            in.weights(),
            0,
            blocks,
            in.x.const_data_ptr(),
            y.mutable_data_ptr(),
            data_if(every, states),
            std::max<int64_t>(every, 1),
            data_if(stats, sums)};
  const Tensor scratch = scratch_of(x, scratch_bytes(args));
  args.scratch = scratch.mutable_data_ptr();
  if (s.batch) run(args, x);
  return {y, sums, states};
}

// Blocks whose backward pass is one segment: those between two saved states, or as many as leave
// left_bytes_of_segment(s).
int64_t segment_of(const Shape& s, int64_t every) {
  if (every > 1) return every;
  if (!scratch_bytes(BackwardArgs{s, {}, 0, s.blocks})) return s.blocks;
  const int64_t each = scratch_bytes(BackwardArgs{s, {}, 0, 1});
  return std::min(s.blocks,
                  std::max<int64_t>(1, left_bytes_of_segment(s) / std::max<int64_t>(each, 1)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& gy, const OptionalTensor& gstates, const Tensor& states, const Tensor& w1,
    const Tensor& b1, const Tensor& w2, const Tensor& b2, const OptionalTensor& gate,
    int64_t blocks, int64_t activation, int64_t every, bool weights, bool gate_grad, bool tf32) {
  const StackInputs in(kName, gy, w1, b1, w2, b2, gate, blocks, activation);
  const Shape s = shape_of(in, tf32);
  const ScalarType type = gy.scalar_type();
  STD_TORCH_CHECK(every >= 1 && states.dim() == 3 && states.size(0) == ceil_div(blocks, every),
                  kName, ": states must have one state for every ", every, " blocks");
  const OptionalTensor given = as_contiguous(gstates);
  const Tensor kept = as_contiguous(states);

  Tensor g = filled(uninitialized(gy, {s.batch, s.width}, in.wide), in.x);  // becomes gx
  Tensor recomputed =
      every > 1 ? uninitialized(gy, {every, s.batch, s.width}, type) : uninitialized(gy, {0}, type);
  Tensor grads[4];
  const Tensor* const of[4] = {&in.w1, &in.b1, &in.w2, &in.b2};
  for (int i = 0; i < 4; ++i) {
    grads[i] =
        weights ? on_large_pages(empty_strided(gy, of[i]->sizes().data(), of[i]->strides().data(),
                                               of[i]->dim(), s.shared ? in.wide : type))
                : uninitialized(gy, {0}, type);
    if (weights && (s.batch == 0 || blocks == 0)) torch::stable::zero_(grads[i]);
  }
  Tensor ggate =
      gate_grad ? uninitialized(gy, {blocks, s.batch}, in.wide) : uninitialized(gy, {0}, in.wide);
  const int64_t state_bytes = s.batch * s.width * size_of(s.dtype);
  const auto state = [&](const Tensor& t, int64_t i) {
    return static_cast<char*>(t.mutable_data_ptr()) + i * state_bytes;
  };
  // Down the blocks, segment by segment.
  const int64_t segment = segment_of(s, every);
  const Args again{s, in.weights(), 0, segment};
  const BackwardArgs down{s, in.weights(), 0, segment};
  const Tensor scratch = scratch_of(gy, std::max(scratch_bytes(again), scratch_bytes(down)));
  for (int64_t last = s.batch ? blocks : 0, first; last > 0; last = first) {
    first = (last - 1) / segment * segment;
    if (every > 1)
      run(Args{s, in.weights(), first, last, state(kept, first / every), nullptr,
               state(recomputed, 0), 1, nullptr, scratch.mutable_data_ptr()},
          gy);
    run(BackwardArgs{s, in.weights(), first, last,
                     every > 1 ? state(recomputed, 0) : state(kept, first), g.mutable_data_ptr(),
                     given ? state(*given, first) : nullptr, data_if(gate_grad, ggate),
                     data_if(weights, grads[0]), data_if(weights, grads[1]),
                     data_if(weights, grads[2]), data_if(weights, grads[3]), last < blocks,
                     scratch.mutable_data_ptr()},
        gy);
  }
  const auto narrowed = [&](const Tensor& t) {
    if (t.scalar_type() == type) return t;
    return filled(empty_strided(t, t.sizes().data(), t.strides().data(), t.dim(), type), t);
  };
  return {narrowed(g),        narrowed(grads[0]), narrowed(grads[1]),
          narrowed(grads[2]), narrowed(grads[3]), ggate};
}

#if defined(FASTRES_CUDA)
bool persistent(const Tensor& x, int64_t hidden, bool tf32) {
  Shape s{x.size(0), x.size(1), hidden, 1, dtype_of(kName, "x", x), Activation::kRelu, false, tf32};
  bool found = false;
  on_stream_of(x, [&](void*) { found = std::string(route_cuda(s)) == "persistent"; });
  return found;
}
#else
constexpr std::array<const char*, 7> kActivations = {"identity", "relu", "tanh",     "sigmoid",
                                                     "silu",     "gelu", "gelu_tanh"};

// y, sums = mlp_stack(x, w1, b1, w2, b2, activation="relu") on C-contiguous arrays.
py::tuple on_arrays(const py::object& x_given, const py::object& w1_given,
                    const py::object& b1_given, const py::object& w2_given,
                    const py::object& b2_given, const std::string& activation) {
  const auto known = std::find(kActivations.begin(), kActivations.end(), activation);
  if (known == kActivations.end())
    throw py::value_error(
        numpy::message(kName, "activation", "be the name of one", py::str(activation)));
  const py::array x = numpy::as_array(kName, "x", x_given);
  const py::array weights[4] = {
      numpy::as_array(kName, "w1", w1_given), numpy::as_array(kName, "b1", b1_given),
      numpy::as_array(kName, "w2", w2_given), numpy::as_array(kName, "b2", b2_given)};
  const Dtype dtype = numpy::check_array(kName, "x", x);
  if (x.ndim() != 2 || weights[0].ndim() != 3)
    throw py::value_error(
        numpy::message(kName, "w1", "have shape [L, H, D] and x [B, D]", weights[0].attr("shape")));
  const int64_t blocks = weights[0].shape(0), hidden = weights[0].shape(1), width = x.shape(1);
  if (hidden == 0 || width == 0)
    throw py::value_error(
        numpy::message(kName, "w1", "have sizes H, D >= 1", weights[0].attr("shape")));
  const std::vector<py::ssize_t> shapes[4] = {
      {blocks, hidden, width}, {blocks, hidden}, {blocks, width, hidden}, {blocks, width}};
  const char* const names[4] = {"w1", "b1", "w2", "b2"};
  for (int i = 0; i < 4; ++i)
    numpy::check_like(kName, names[i], weights[i], py::array(x.dtype(), shapes[i]));
  const Shape s{x.shape(0), width, hidden,
                blocks,     dtype, static_cast<Activation>(known - kActivations.begin()),
                false,      false};
  py::array y = numpy::empty_like(x),
            sums(numpy::accumulate_type(dtype), std::vector<py::ssize_t>{blocks, 3, s.batch});
  const Weights w{weights[0].data(), weights[1].data(), weights[2].data(), weights[3].data()};
  const Args args{s, w, 0, blocks, x.data(), y.mutable_data(), nullptr, 1, sums.mutable_data()};
  {
    const py::gil_scoped_release released;
    if (s.batch) run(args);
  }
  return py::make_tuple(y, sums);
}

const numpy::Entry entry([](py::module_& m) {
  m.def(kName, &on_arrays, py::arg("x"), py::arg("w1"), py::arg("b1"), py::arg("w2"), py::arg("b2"),
        py::arg("activation") = "relu",
        "y, sums = mlp_stack(x, w1, b1, w2, b2): L residual blocks x += W2 act(W1 x + b1) + b2, "
        "and the [L, 3, B] sums of x*x, p*p, x*p of each, with p what the block adds");
});
#endif

}  // namespace
}  // namespace fastres::mlp_stack

#if defined(FASTRES_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
  m.impl("_mlp_stack_persistent", TORCH_BOX(&fastres::mlp_stack::persistent));
#else
STABLE_TORCH_LIBRARY_FRAGMENT(fastres, m) {
  m.def(
      "_mlp_stack(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? gate, int blocks, "
      "int activation, int every, bool stats, bool tf32) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_mlp_stack_backward(Tensor gy, Tensor? gstates, Tensor states, Tensor w1, Tensor b1, "
      "Tensor w2, Tensor b2, Tensor? gate, int blocks, int activation, int every, bool weights, "
      "bool gate_grad, bool tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_mlp_stack_persistent(Tensor x, int hidden, bool tf32) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
#endif
  m.impl("_mlp_stack", TORCH_BOX(&fastres::mlp_stack::forward));
  m.impl("_mlp_stack_backward", TORCH_BOX(&fastres::mlp_stack::backward));
}
