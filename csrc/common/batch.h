// batch: its samples over the threads, in tiles that each takes by itself, or as one tile that they
// take together.
#pragma once
#include <algorithm>
#include <atomic>

#include "buffer.h"
#include "dtype.h"
#include "parallel.h"
#include "team.h"

namespace fastres {

// Passes all samples through `alone`(tile, first, samples, buffer), each tile of whole `step`s of
// samples, begun in their order; `bytes`(samples) is what a tile needs.
template <class Bytes, class Alone>
void for_tiles(int64_t batch, int64_t step, const Bytes& bytes, const Alone& alone) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t steps = ceil_div(batch, step);
  // 512 KiB: with the weights of a block in the second cache of a core.
  const int64_t fixed = bytes(0), each = bytes(step) - fixed;
  const int64_t most = std::max<int64_t>(1, ((512 << 10) - fixed) / each);
  const int64_t tiles = threads * ceil_div(steps, threads * most);  // as many for each thread
  const int64_t samples = ceil_div(steps, tiles) * step, count = ceil_div(batch, samples);
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    const Buffer buffer(bytes(samples));
    for (int64_t tile = next++; tile < count; tile = next++)
      alone(tile, tile * samples, std::min(samples, batch - tile * samples), buffer.data());
  });
}

// Passes all samples through `together`(buffer, team, members) as one tile.
template <class Together>
void as_team(int members, int64_t bytes, const Together& together) {
  const Buffer buffer(bytes);
  Team team;
  parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    // Where there is one thread after all it gets the whole range.
    together(buffer.data(), team, end - begin == members ? 1 : members);
  });
}

}  // namespace fastres
