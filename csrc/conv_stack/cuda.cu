// conv_stack on CUDA: picks the kernels for the shape, the dtype and the device.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda_launches.h"
#include "cuda_resident.h"

namespace fastres::conv_stack {
namespace {

// FASTRES_CONV_STACK: "layers", for every shape.
bool only_layers() {
  static const bool only = [] {
    const char* const given = std::getenv("FASTRES_CONV_STACK");
    const std::string name = given ? given : "";
    if (!name.empty() && name != "layers")
      throw std::runtime_error("conv_stack: FASTRES_CONV_STACK must be layers, got " + name);
    return !name.empty();
  }();
  return only;
}

// Calls body with the tile for images of this shape; returns false where the stack goes convolution
// by convolution.
template <class Body>
bool with_resident_tile(const Shape& s, const StackWeights& w, const Body& body) {
  const uintptr_t addresses = gpu::join_addresses(w.w1, w.b1, w.w2, w.b2);
  if (only_layers() || s.height != s.width || addresses % 16 != 0) return false;
  bool found = false;
  const auto take = [&](auto tile) {
    using Tile = decltype(tile);
    if (s.channels != Tile::kChannels || s.height != Tile::kSide) return;
    if (Tile::kBytes > gpu::most_shared_bytes()) return;
    found = true;
    body(tile);
  };
  gpu::with_arithmetic(s.dtype, s.tf32, [&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    if constexpr (Arithmetic::kTensor) {
      take(ResidentTile<Arithmetic, 16, 32, 4>());
      take(ResidentTile<Arithmetic, 32, 16, 4>());
      take(ResidentTile<Arithmetic, 64, 8, 2>());
    }
  });
  return found;
}

template <class Body> void with_layer_tile(const Shape& s, const Body& body) {
  gpu::with_arithmetic(s.dtype, s.tf32, [&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    if (s.channels <= 32) body(LayerTile<Arithmetic, true>());
    else body(LayerTile<Arithmetic, false>());
  });
}

}  // namespace

int64_t scratch_bytes(const Args& a) {
  int64_t bytes = 0;
  if (!with_resident_tile(a.shape, a.weights, [](auto) {}))
    with_layer_tile(a.shape,
                    [&](auto tile) { bytes = Scratch<decltype(tile)>(a.shape, nullptr).bytes; });
  return bytes;
}

const char* route_cuda(const Shape& s) {
  return with_resident_tile(s, {}, [](auto) {}) ? "resident" : "layers";
}

void launch_cuda(const Args& a, void* stream) {
  const bool done = with_resident_tile(a.shape, a.weights, [&](auto tile) {
    using Tile = decltype(tile);
    gpu::launch_tiles("conv_stack: resident_kernel", resident_kernel<Tile>,
                      dim3(unsigned(a.shape.batch)), stream, ResidentArgs<Tile>{a}, Tile::kBytes);
  });
  if (!done)
    with_layer_tile(a.shape, [&](auto tile) { forward_layers<decltype(tile)>(a, stream); });
}

}  // namespace fastres::conv_stack
