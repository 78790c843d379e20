// mlp_stack on CUDA: picks the kernels for the shape, the dtype and the device.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda_launches.h"
#include "cuda_persistent_chain.h"

namespace fastres::mlp_stack {
namespace {

// Tiles of the kernels that take the whole stack. Few samples, so that many multiprocessors have
// some: a tile is through a block as soon as it can. Else as many as amortise the weights that each
// tile reads, and more columns at a time where there are more than 64.
template <class Arithmetic> using FewTile = gpu::ProductTile<Arithmetic, 16, 64, 16, 16>;
template <class Arithmetic> using NarrowTile = gpu::ProductTile<Arithmetic, 64, 64, 32, 32>;
template <class Arithmetic> using WideTile = gpu::ProductTile<Arithmetic, 64, 128, 32, 32>;

enum class Choice { kByShape, kLayers, kPersistent };

// FASTRES_MLP_STACK: "layers", or "persistent" wherever shared memory allows it.
Choice chosen() {
  static const Choice choice = [] {
    const char* const given = std::getenv("FASTRES_MLP_STACK");
    const std::string name = given ? given : "";
    if (name.empty()) return Choice::kByShape;
    if (name == "layers") return Choice::kLayers;
    if (name == "persistent") return Choice::kPersistent;
    throw std::runtime_error("mlp_stack: FASTRES_MLP_STACK must be layers or persistent, got " +
                             name);
  }();
  return choice;
}

// Calls body with the tile for the whole stack and its bytes of shared memory; returns false where
// the stack goes layer by layer.
template <class Body> bool with_persistent_tile(const Shape& s, bool chain, const Body& body) {
  const int64_t widest = s.width > s.hidden ? s.width : s.hidden, most = gpu::most_shared_bytes();
  if (chosen() == Choice::kLayers || s.dtype == Dtype::kFloat64) return false;
  // 256: beyond, the products of a layer fill the GPU, and panels of weights are read too often.
  // 1024 at most: so that no number of bytes overflows.
  if (widest > (chosen() == Choice::kPersistent ? 1024 : 256)) return false;
  bool found = false;
  const auto take = [&](auto tile) {
    const int64_t bytes = Layout<decltype(tile)>(s, chain).bytes;
    if (found || bytes > most) return;
    found = true;
    body(tile, bytes);
  };
  const auto pick = [&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    // As long as each tile of 16 samples has a multiprocessor to itself.
    const bool few = ceil_div(s.batch, 16) <= gpu::kMultiprocessors;
    if constexpr (sizeof(typename Arithmetic::T) == 2)
      if (!few && widest > 64) take(WideTile<Arithmetic>());
    if (!few) take(NarrowTile<Arithmetic>());
    take(FewTile<Arithmetic>());
  };
  if (s.dtype == Dtype::kBFloat16) pick(Arithmetic<__nv_bfloat16, true>());
  else if (s.dtype == Dtype::kFloat16) pick(Arithmetic<__half, true>());
  else if (s.tf32) pick(Arithmetic<float, true>());
  else pick(Arithmetic<float, false>());
  return found;
}

template <class Body> void with_layer_tile(const Shape& s, const Body& body) {
  gpu::with_arithmetic(s.dtype, s.tf32,
                       [&](auto arithmetic) { body(LayerTile<decltype(arithmetic)>()); });
}

template <class Tile> dim3 tiles_of_samples(const Shape& s) {
  return dim3(unsigned(ceil_div(s.batch, Tile::kM)));
}

template <template <class> class Scratch> int64_t bytes_of(const Shape& s, int64_t blocks) {
  int64_t bytes = 0;
  gpu::with_element(
      s.dtype, [&](auto element) { bytes = Scratch<decltype(element)>(s, blocks, nullptr).bytes; });
  return bytes;
}

}  // namespace

int64_t scratch_bytes(const Args& a) { return bytes_of<ForwardScratch>(a.shape, a.last - a.first); }
int64_t scratch_bytes(const BackwardArgs& a) {
  return bytes_of<BackwardScratch>(a.shape, a.last - a.first);
}

const char* route_cuda(const Shape& s) {
  return with_persistent_tile(s, false, [](auto, int64_t) {}) ? "persistent" : "layers";
}

void launch_cuda(const Args& a, void* stream) {
  const bool done =
      a.first < a.last &&
      with_persistent_tile(
          a.shape, false,
          [&](auto tile, int64_t bytes) {
            using Tile = decltype(tile);
            launch_tiles("mlp_stack: persistent_kernel", persistent_kernel<Tile>,
                         tiles_of_samples<Tile>(a.shape), stream, PersistentArgs<Tile>{a}, bytes);
          });
  if (done) return;
  with_layer_tile(a.shape, [&](auto tile) { forward_layers<decltype(tile)>(a, stream); });
}

void launch_cuda_chain(const BackwardArgs& a, void* stream) {
  const bool done = with_persistent_tile(a.shape, true, [&](auto tile, int64_t bytes) {
    using Tile = decltype(tile);
    const BackwardScratch<typename Tile::T> scratch(a.shape, a.last - a.first, a.scratch);
    launch_tiles("mlp_stack: persistent_chain_kernel", persistent_chain_kernel<Tile>,
                 tiles_of_samples<Tile>(a.shape), stream,
                 PersistentChainArgs<Tile>{a, a.gw1 ? scratch.gated : nullptr,
                                           a.gw1 ? scratch.delta : nullptr,
                                           a.gw1 ? scratch.hidden : nullptr},
                 bytes);
  });
  if (done) return;
  with_layer_tile(a.shape, [&](auto tile) { chain_layers<decltype(tile)>(a, stream); });
}

void launch_cuda_weights(const BackwardArgs& a, void* stream) {
  with_layer_tile(a.shape, [&](auto tile) { weight_gradients<decltype(tile)>(a, stream); });
}

}  // namespace fastres::mlp_stack
