// mlp_stack: L residual blocks, x <- x + p with p = gate * f, f = W2 h + b2, h = act(z),
// z = W1 x + b1, and per block and sample the sums x*x, p*p, x*p.
//   backward, from the cotangent g of the stream after a block to the one before it:
//     q = W2^T g;  dz = gate * q * act'(z);  g <- g + W1^T dz
//     gate' = <q, h> + <g, b2>
//     W2' = sum (gate g) h^T;  b2' = sum gate g;  W1' = sum dz x^T;  b1' = sum dz
// The stream, the sums and every product are accumulated in float64 for float64, else in float32.
#pragma once
#include <atomic>

#include "../common/stack.h"

namespace fastres::mlp_stack {

struct Shape {
  int64_t batch, width, hidden;  // B, D, H
  int64_t blocks;                // L
  Dtype dtype;                   // of x, y, states and weights; the accumulate type follows from it
  Activation activation;
  bool shared;  // the weights of block 0 are those of all blocks
  bool tf32;    // CUDA: products of float32 may round their factors to tf32
};

using Weights = StackWeights;

// Blocks [first, last).
struct Args {
  Shape shape;
  Weights weights;
  int64_t first, last;
  const void* x;            // [B, D], before block `first`
  void* y;                  // [B, D], after block `last` - 1; null: not wanted; not x
  void* states;             // [ceil((last - first) / every), B, D], the stream before blocks first,
                            // first + every, ...; null: not wanted
  int64_t every;            // 1 or more
  void* sums;               // [L, 3, B], accumulate type; null: not wanted
  void* scratch = nullptr;  // scratch_bytes(args)
};

// Blocks [first, last), in two launches: the chain down the blocks, which leaves in scratch what
// the weight gradients need, then those, of all these blocks at once.
struct BackwardArgs {
  Shape shape;
  Weights weights;
  int64_t first, last;
  const void* states;  // [last - first, B, D], the stream before each of the blocks
  void* g;  // [B, D], accumulate type; in: cotangent after the last block, out: before the first
  const void* gstates;  // [last - first, B, D], cotangents of `states`, to be added to g; null: 0
  void* ggate;          // [L, B], accumulate type; null: not wanted
  // Weight gradients, as the weights. Where these are shared they are sums over the blocks in the
  // accumulate type, and `add` says that those of other blocks are there already.
  void *gw1, *gb1, *gw2, *gb2;  // all null: not wanted
  bool add;
  void* scratch = nullptr;  // scratch_bytes(args), the same for both launches
  // On the CPU: of how many blocks, from the last, scratch is complete; null: nobody waits.
  std::atomic<int64_t>* done = nullptr;
};

// Bytes of scratch: by the shape and the number of blocks alone.
int64_t scratch_bytes(const Args& args);
int64_t scratch_bytes(const BackwardArgs& args);

void launch_cuda(const Args& args, void* stream);
void launch_cuda_chain(const BackwardArgs& args, void* stream);
void launch_cuda_weights(const BackwardArgs& args, void* stream);

// The name of the kernels that take this shape on the current device: "layers" or "persistent".
const char* route_cuda(const Shape& shape);

}  // namespace fastres::mlp_stack
