// cpu_derivatives: samples through all blocks, upwards, of which the derivatives of the activations
// are kept.
#pragma once
#include "../common/activation.h"
#include "../common/tile_product.h"
#include "cpu.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

// act'(z) of 16 samples and all hidden features of a block: [H] words of a bit for each sample, or
// [H, 16] values.
template <class A> struct Derivatives {
  void* const at;
  Derivatives(const Args& a, int64_t block, int64_t group)
      : at(static_cast<char*>(a.scratch) + (block * ceil_div(a.shape.batch, kLanes) + group) *
                                               a.shape.hidden * derivative_bytes(a.shape)) {}
  uint16_t* bits() const { return static_cast<uint16_t*>(at); }
  A* values() const { return static_cast<A*>(at); }
};

// z -> act(z), [rows, kTiles, 16], and its derivatives, of each tile.
template <Activation kActivation, int kTiles, class A>
void derive(A* z, int64_t rows, const Derivatives<A>* to, int64_t count) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      A* place = z + (r * kTiles + t) * kLanes;
      const Tile<A> given = Stored<A>::load(place);
      if constexpr (kActivation == Activation::kRelu) to[t].bits()[r] = positive_bits(given);
      else if constexpr (kActivation == Activation::kIdentity) to[t].bits()[r] = 0xffff;
      else Stored<A>::store(to[t].values() + r * kLanes, derivative<kActivation>(given));
      Stored<A>::store(place, value<kActivation>(given));
    }
}

// Samples of groups [first, first + count), count at most kTiles.
template <class A, int kTiles>
void derive_groups(const Args& a, int64_t first, int64_t count, void* buffer) {
  constexpr int64_t kGroup = kTiles * kLanes;
  static_assert(kTiles * sizeof(A) <= 8, "forward_bytes");
  const Shape& s = a.shape;
  const int64_t row = first * kLanes, samples = least(kGroup, s.batch - row);
  A *const x = static_cast<A*>(buffer), *const h = x + kGroup * s.width,
           *const f = h + kGroup * s.hidden;
  const auto in = [](const void* p, int64_t i) { return static_cast<const A*>(p) + i; };
  load_samples(in(a.x, row * s.width), s.width, samples, s.width, x, kGroup, kGroup);
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int64_t set = s.shared ? 0 : block, matrix = set * s.width * s.hidden;
    const Rows<A> w1{in(a.weights.w1, matrix), s.width}, w2{in(a.weights.w2, matrix), s.hidden};
    product<kTiles>(s.hidden, w1, in(a.weights.b1, set * s.hidden), x, kGroup, s.width, h, kGroup);
    const Derivatives<A> to[2] = {{a, block, first}, {a, block, first + 1}};
    pick_activation(s.activation, [&](auto activation) {
      derive<decltype(activation)::value, kTiles>(h, s.hidden, to, count);
    });
    if (block + 1 == s.blocks) break;
    product<kTiles>(s.width, w2, in(a.weights.b2, set * s.width), h, kGroup, s.hidden, f, kGroup);
    const GateTiles<A, kTiles> gate(a.weights, block, row, samples);
    for (int64_t d = 0; d < s.width * kTiles; ++d)
      Stored<A>::store(x + d * kLanes, Stored<A>::load(x + d * kLanes) +
                                           gate.v[d % kTiles] * Stored<A>::load(f + d * kLanes));
  }
}

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
