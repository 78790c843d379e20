// mlp_stack on the CPU: how the work is cut up, and the kernels that do a piece of it.
//
// Samples stand in the lanes of vectors, as they stand in the threads of a GPU: a tile of samples
// is kept feature by feature, and a weight multiplies a vector of samples. So the weights are read
// as they are, with nothing to pack and no packing to go stale; sums over features need no
// horizontal step, and no size needs padding. A tile goes through all blocks on one thread; where
// there are too few samples for that, all threads take the same tile and share out the rows of
// every product. Of so few that lanes would be idle, features stand beside them (cpu_few.h).
#pragma once
#include "../common/isa.h"
#include "../common/team.h"
#include "kernel.h"

namespace fastres::mlp_stack {

// Rows of a product that are done at a time, and whose share of a sum is added up first: the same
// for any number of threads, and so are the bits of the sums. 32 rows of 64 weights: 2048
// multiply-adds of a vector, ten times what it costs two threads to agree on the next step.
constexpr int64_t kChunk = 32;
constexpr int64_t kLargestGroup = 32;  // samples side by side in vectors; 16 in the narrow case

// 512 weights for each sample that threads tell each other of: below that a meeting costs more than
// a second thread brings. Products of few samples take half the time, and so it is 1024 weights,
// and 4096 for the meeting itself: two cores may be far from each other.
constexpr int64_t kWorthMeeting = 512;
inline bool pays_to_meet(const Shape& s) {
  return s.width * s.hidden >= 2 * kWorthMeeting * (s.batch + 4);
}

// Whether tile registers take the products, going up: they want 32 columns of bfloat16, and take 16
// samples in the time of one, which is that of reading the weights.
inline bool in_pairs(const Shape& s) {
  return isa() == Isa::kAmx && s.dtype == Dtype::kBFloat16 && s.batch > 1 && s.width % 32 == 0 &&
         s.hidden % 32 == 0;
}

// Likewise going down, where sums over samples are products too: of 32 samples.
inline bool in_pairs_down(const Shape& s) { return in_pairs(s) && s.batch > kLargestGroup / 2; }

// Few samples go through a kernel of their own, going up, which takes them by fours (cpu_few.h): up
// to 8, and up to 16 that no team takes.
constexpr int64_t kFour = 4, kMostFew = 16;
inline bool are_few(const Shape& s) {
  return !in_pairs(s) && s.batch <= (pays_to_meet(s) ? kMostFew / 2 : kMostFew) &&
         s.width % 16 == 0 && s.hidden % 16 == 0;
}

// Likewise going down, where one sample stands in a tile, and more of them meet its weights one
// after the other (cpu_few_down.h).
inline bool are_few_down(const Shape& s) {
  return s.batch <= kFour && s.width % 16 == 0 && s.hidden % 16 == 0;
}

// Whether threads that find no tile of their own had better share one, going up and going down.
// Tile registers leave little to share but the reading of weights: 64 KiB of a matrix, measured.
inline bool pays_to_share_up(const Shape& s) {
  if (in_pairs(s)) return s.width * s.hidden >= 32 << 10;
  return are_few(s) ? pays_to_meet(s) : s.width * s.hidden >= 16 * kWorthMeeting;
}
// Down the blocks a second thread has the weight gradients to do, behind a chain on the first, and
// that is worth more than sharing the chain up to larger blocks (measured with two threads). With
// more threads the chain would keep them waiting.
inline bool has_followers(const BackwardArgs& a) { return a.gw1 && !a.shape.shared; }
inline bool pays_to_share_down(const BackwardArgs& a, int64_t threads) {
  const bool few = are_few_down(a.shape), followed = has_followers(a) && threads <= 2;
  const int64_t worth = followed ? (few ? 256 : 64) : few ? 32 : 16;
  return a.shape.width * a.shape.hidden >= worth * kWorthMeeting;
}
// Whether the chain is one tile on one thread, which weight gradients can follow.
inline bool can_be_followed(const BackwardArgs& a, int64_t threads) {
  return has_followers(a) && a.shape.batch <= kLargestGroup && !pays_to_share_down(a, threads);
}

// Samples that threads do not share out among them, going up. Few of which no team pays are shared
// out by fours, if there is half a million multiply-adds to wake a thread for. Without AVX-512 a
// product takes 16 at a time, and those of two tiles need not wait for each other.
inline int64_t forward_step(const Args& a) {
  const Shape& s = a.shape;
  if (in_pairs(s)) return pays_to_share_up(s) ? kLargestGroup : kLargestGroup / 2;
  if (are_few(s) && !pays_to_meet(s))
    return (a.last - a.first) * s.width * s.hidden * s.batch < 1 << 19 ? kMostFew : kFour;
  const bool halved = isa() <= Isa::kAvx2 && s.batch <= kLargestGroup && !pays_to_share_up(s);
  return halved ? kLargestGroup / 2 : kLargestGroup;
}

// Threads that share one tile, where that pays, or 1.
inline int members_for(const Shape& s, int64_t step, int64_t threads, bool pays) {
  if (ceil_div(s.batch, step) >= threads || !pays) return 1;
  const int64_t chunks = ceil_div(s.width < s.hidden ? s.hidden : s.width, kChunk);
  const int64_t most = chunks < Team::kMost ? chunks : Team::kMost;
  return static_cast<int>(threads < most ? threads : most);
}

// Bytes of the accumulate type that a tile of `rows` samples needs: stream, hidden units, sums;
// with features in pairs both in half the bytes, beside the stream.
inline int64_t forward_tile_bytes(const Shape& s, int64_t rows) {
  const int64_t factors = in_pairs(s) ? (s.width + s.hidden) / 2 : s.hidden;
  const int64_t chunks = ceil_div(s.width, kChunk);
  return round_up(rows, kLargestGroup) * (s.width + factors + 3 * chunks) *
         accumulate_size_of(s.dtype);
}
// Downwards: cotangent, state, sums; in pairs the state, the cotangent again and that of the hidden
// units, in half the bytes; of few samples one sum each.
inline int64_t chain_tile_bytes(const Shape& s, int64_t rows) {
  const int64_t chunks = ceil_div(s.width, kChunk) + ceil_div(s.hidden, kChunk);
  if (are_few_down(s)) return rows * chunks * accumulate_size_of(s.dtype);
  const int64_t factors = in_pairs_down(s) ? s.width + s.hidden / 2 : s.width;
  return round_up(rows, kLargestGroup) * (s.width + factors + chunks) * accumulate_size_of(s.dtype);
}

// Samples [row, row + rows) through all blocks of the arguments; or all samples, by a team of which
// `wanted` members are expected. buffer: forward_tile_bytes, on a boundary of 64 bytes.
FASTRES_CPU_KERNEL(forward, const Args&, int64_t row, int64_t rows, void* buffer)
FASTRES_CPU_KERNEL(forward_together, const Args&, void* buffer, Team& team, int wanted)

// What the chain leaves of a slab of samples for the weight gradients of a block: gate * g [D,
// slab_of], dz and h [H, slab_of], in the accumulate type, or where products take them in pairs in
// bfloat16. 64 samples: 32 columns of them and 8 rows of cotangents stay in the nearest cache. Of
// few samples rows, and beside these x.
constexpr int64_t kSlab = 64;
inline int64_t slab_of(int64_t batch) { return batch <= 16 ? 16 : batch <= 32 ? 32 : kSlab; }
inline int64_t left_size(const Shape& s) {
  if (are_few_down(s)) return 2 * s.batch * (s.width + s.hidden);
  return slab_of(s.batch) * (s.width + 2 * s.hidden);
}
inline int64_t left_bytes(const Shape& s) {
  if (in_pairs_down(s)) return left_size(s) * 2;
  return left_size(s) * accumulate_size_of(s.dtype);
}

// Whether the chain adds a slab to the weight gradients as soon as it has made it, so that all of
// it is still in the caches of the core that made it. Tile after tile adds to those of a block, in
// the order of the samples: a tile is a block behind the one before it, for which a stack must be
// deep. Else it leaves all slabs in scratch, and `weights` adds them up.
inline bool in_turns(const BackwardArgs& a) {
  const bool whole = a.first == 0 && a.last == a.shape.blocks && a.shape.blocks >= 32;
  const bool wide = a.shape.dtype == Dtype::kFloat64 || a.shape.dtype == Dtype::kFloat32;
  return whole && wide && !a.shape.shared && a.shape.batch >= 2 * kSlab;
}

inline int64_t scratch_bytes(const Args&) { return 0; }
inline int64_t scratch_bytes(const BackwardArgs& a) {
  const int64_t slabs = (a.last - a.first) * ceil_div(a.shape.batch, slab_of(a.shape.batch));
  return in_turns(a) ? 0 : slabs * left_bytes(a.shape);
}

// The blocks whose weight gradients a tile has added to, and the same of the tile before it, if
// there is one.
struct Turn {
  const std::atomic<int64_t>* before;
  std::atomic<int64_t>* done;
};

// Likewise downwards; buffer: chain_tile_bytes, and in turns left_bytes more.
FASTRES_CPU_KERNEL(chain, const BackwardArgs&, int64_t row, int64_t rows, void* buffer)
FASTRES_CPU_KERNEL(chain_in_turn, const BackwardArgs&, int64_t row, int64_t rows, void* buffer,
                   const Turn& turn)
FASTRES_CPU_KERNEL(chain_together, const BackwardArgs&, void* buffer, Team& team, int wanted)

// Weight gradients: tasks [begin, end) of weight_tasks, each of `rows` rows of one. Tile registers
// take more of them, if that leaves two tasks a thread: the samples of a slab have to be brought
// into pairs for each task.
constexpr int64_t kPairedRows = 128;
inline int64_t weight_tasks(const BackwardArgs& a, int64_t rows) {
  const int64_t sets = a.shape.shared ? 1 : a.last - a.first;
  return sets * (ceil_div(a.shape.width, rows) + ceil_div(a.shape.hidden, rows));
}
inline int64_t rows_of_task(const BackwardArgs& a, int64_t threads) {
  int64_t rows = in_pairs_down(a.shape) ? kPairedRows : kChunk;
  while (rows > kChunk && weight_tasks(a, rows) < 2 * threads) rows /= 2;
  return rows;
}
FASTRES_CPU_KERNEL(weights, const BackwardArgs&, int64_t rows, int64_t begin, int64_t end)

}  // namespace fastres::mlp_stack
