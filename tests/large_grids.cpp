// large_grids: the grids of the CUDA kernels for tensors of any size, and the offsets of their
// last rows.
#include "../csrc/batch_norm_residual/cuda_channels.h"
#include "../csrc/common/gpu_rows.h"
#include "cuda_on_cpu/launches.h"

namespace {

using namespace fastres;

std::string found;

void expect(bool holds, const char* what, int64_t rows, int64_t cols) {
  if (!holds && found.empty())
    found = std::string(what) + ": " + std::to_string(rows) + " x " + std::to_string(cols);
}

bool is_grid(const dim3& grid) {  // of a GPU, but in x the CPU's limit
  return grid.x >= 1 && grid.x <= gpu::kMaxBlocks && grid.y >= 1 && grid.y <= 65535;
}

template <class Tile> void try_rows(int64_t rows, int64_t cols, Dtype dtype) {
  const gpu::Plan plan = gpu::plan_for<Tile>(rows, cols, dtype);
  expect(is_grid(gpu::grid_of(rows, plan)), "grid of rows", rows, cols);
  expect(plan.piece * plan.pieces >= cols, "pieces of a row", rows, cols);
  cuda_on_cpu::run_grid("walk", {1, 1, 1}, {gpu::kThreads, 1, 1}, [&] {
    gpu::Walk<Tile> walk(rows, cols, plan);
    if (threadIdx.x) return;
    walk.top = rows - 1;
    walk.left = cols - 1;
    expect(walk.row() == rows - 1 && walk.offset(0) == rows * cols - 1, "last offset", rows, cols);
  });
}

void try_channels(int64_t rows, int64_t channels, int64_t places, bool pixels) {
  namespace op = batch_norm_residual;
  const op::Shape shape{rows, channels, places, pixels};
  for (int width = 1; width <= 8; width *= 2) {
    const op::Plan plan(shape, width);
    expect(plan.splits >= 1 && plan.splits <= gpu::kFullGrid, "splits", rows, channels);
    expect(plan.pieces >= 1 && plan.pieces <= gpu::kFullGrid, "pieces", rows, channels);
    expect(plan.lanes % (8 / width) == 0 && plan.lanes * plan.groups == gpu::kThreads, "lanes",
           rows, channels);
  }
}

}  // namespace

// What does not hold, or null.
extern "C" const char* wrong() {
  for (int rows_bits = 0; rows_bits <= 36; ++rows_bits)
    for (int cols_bits = 0; rows_bits + cols_bits <= 36; ++cols_bits) {  // 128 GiB of float16
      const int64_t rows = (int64_t(1) << rows_bits) + 3, cols = (int64_t(1) << cols_bits) + 5;
      try_rows<gpu::Tile<float, 4, 2>>(rows, cols, Dtype::kFloat32);
      try_rows<gpu::Tile<double, 1, 8>>(rows, cols, Dtype::kFloat64);
      try_channels(rows, cols, 1, false);
      try_channels(rows, 3, cols, false);
      try_channels(rows, cols, 3, true);
      expect(ceil_div(rows, 64) * ceil_div(cols, 64) <= 0x7fffffff, "tiles", rows, cols);
    }
  return found.empty() ? nullptr : found.c_str();
}
