// cpu_forward: images through the blocks of convolutions.
#pragma once
#include "../common/buffer.h"
#include "cpu_product.h"
#include "cpu_stream.h"

namespace fastres::conv_stack::FASTRES_ISA {

template <class T> class Forward {
  using A = typename Stored<T>::A;

 public:
  Forward(const Args& a, int64_t first, int64_t images, int64_t rows, void* buffer)
      : a_(a),
        s_(a.shape),
        rows_(rows),
        inner_(static_cast<A*>(buffer)),
        stream_(a, first, images, rows, inner_ + images * image_size(s_)),
        branch_(2 * rows * s_.width * kLanes * sizeof(A)) {}

  void run(Member* member) { stream_.run(member, *this); }

  void load(int64_t image, int64_t row) const {
    for (int64_t plane = 0; plane < planes_of(s_); ++plane)
      std::memset(stream_.row_of(inner_, image, plane, row) - kLanes, 0, stream_.line * sizeof(A));
  }

  void inner(int64_t block, const Task& task) const {
    A* first = stream_.row_of(inner_, task.image, task.plane, task.row);
    convolve(a_.weights.w1, a_.weights.b1, stream_.x, block, task, first, stream_.plane,
             stream_.line);
    for (int64_t p = 0; p < task.planes; ++p)
      for (int64_t r = 0; r < task.rows; ++r) {
        A* row = first + p * stream_.plane + r * stream_.line;
        for (int64_t i = 0; i < s_.width * kLanes; i += kLanes)
          Stored<A>::store(row + i, Math<Tile<A>>::positive_part(Stored<A>::load(row + i)));
      }
  }

  void join(int64_t block, const Task& task) const {
    const int64_t line = s_.width * kLanes, plane = rows_ * line;
    A* f = static_cast<A*>(branch_.data());
    convolve(a_.weights.w2, a_.weights.b2, inner_, block, task, f, plane, line);
    for (int64_t r = 0; r < task.rows; ++r)
      stream_.add_row(block, task, task.row + r, f + r * line, plane);
  }

 private:
  // out [planes][rows][W][16] <- conv(from, w) + b. 16 channels that are read at a time: their
  // weights stay in the first cache while all rows use them.
  void convolve(const void* w, const void* b, A* from, int64_t block, const Task& task, A* out,
                int64_t out_plane, int64_t out_line) const {
    const int64_t c = s_.channels, first = task.plane * kLanes;
    for (int64_t plane = 0; plane < planes_of(s_); ++plane) {
      const int64_t read = plane * kLanes;
      const Taps<T> taps{in<T>(w, (block * 9 * c + read) * c + first), c,
                         plane ? nullptr : in<T>(b, block * c + first), least(kLanes, c - read),
                         least(2 * kLanes, c - first)};
      const Source<A> source{stream_.row_of(from, task.image, plane, task.row - 1) - kLanes,
                             stream_.line};
      convolve_rows(taps, source, task.rows, s_.width, out, out_plane, out_line);
    }
  }

  const Args& a_;
  const Shape& s_;
  const int64_t rows_;  // of a task
  A* const inner_;      // [images, planes, H + 2, W + 2, 16], as the stream
  Stream<T> stream_;
  const Buffer branch_;  // [2, rows, W, 16]
};

}  // namespace fastres::conv_stack::FASTRES_ISA
