// cpu_stream: the stream of some images, what is added to it, and the order of the steps.
#pragma once
#include "../common/member.h"
#include "../common/sums.h"
#include "../common/tile_product.h"
#include "../common/tile_rows.h"
#include "cpu.h"

namespace fastres::conv_stack::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

// Some rows of an image, of some planes.
struct Task {
  int64_t plane, planes, image, row, rows;
};

template <class T> class Stream {
  using A = typename Stored<T>::A;

 public:
  Stream(const Args& a, int64_t first, int64_t images, int64_t rows, void* buffer)
      : line((a.shape.width + 2) * kLanes),
        plane((a.shape.height + 2) * line),
        x(static_cast<A*>(buffer)),
        a_(a),
        s_(a.shape),
        first_(first),
        images_(images),
        rows_(rows),
        tasks_(ceil_div(planes_of(s_), planes_of_task(s_)) * images * ceil_div(s_.height, rows)),
        sums_(reinterpret_cast<double*>(x + images * image_size(s_))) {}

  const int64_t line, plane;  // elements of a row with its border, of a plane
  A* const x;                 // [images, planes, H + 2, W + 2, 16]

  // Pixel 0 of a row in a plane of 16 channels, of images that are laid out like these; row -1 and
  // pixel -1 are the border.
  A* row_of(A* images, int64_t image, int64_t number, int64_t row) const {
    return images + image * image_size(s_) + number * plane + (row + 1) * line + kLanes;
  }

  // kernel.load(image, row) for every row and the two at the border; then for every block
  // kernel.inner(block, task) and kernel.join(block, task) for all tasks, and the sums that add_row
  // left.
  template <class Kernel> void run(Member* member, Kernel& kernel) {
    if (member && !member->join()) return;
    const int64_t lines = s_.height + 2;
    share(member, images_ * lines, [&](int64_t number) {
      load_row(number / lines, number % lines - 1);
      kernel.load(number / lines, number % lines - 1);
    });
    for (int64_t block = 0; block < s_.blocks; ++block) {
      share(member, tasks_, [&](int64_t number) { kernel.inner(block, task(number)); });
      share(member, tasks_, [&](int64_t number) { kernel.join(block, task(number)); });
      if (a_.sums && (!member || member->first())) store_sums(block);
    }
    share(member, images_ * s_.height,
          [&](int64_t number) { store_row(number / s_.height, number % s_.height); });
  }

  // Adds a row of the branch, f [planes][W][16], to the stream, and keeps its share of the sums.
  void add_row(int64_t block, const Task& task, int64_t row, const A* f, int64_t f_plane) const {
    const A gate = gate_of<A>(a_.weights, block, first_ + task.image);
    Sums<double> total;
    for (int64_t p = 0; p < task.planes; ++p) {
      A* to = row_of(x, task.image, task.plane + p, row);
      const A* branch = f + p * f_plane;
      const uint16_t real = (1u << channels_from(task.plane + p)) - 1;
      for_each_tile<Sums<Tile<A>>>(
          s_.width * kLanes,
          [&](int64_t i, int64_t, Sums<Tile<A>>& sums) __attribute__((always_inline)) {
            const Tile<A> skip = Stored<A>::load(to + i),
                          p = select(real, gate * Stored<A>::load(branch + i));
            sums.add(skip, p);
            Stored<A>::store(to + i, Math<Tile<A>>::positive_part(skip + p));
          },
          [&](const Sums<Tile<A>>& even, const Sums<Tile<A>>& odd) __attribute__((always_inline)) {
            total.skip_sq += (even.skip_sq + odd.skip_sq).sum();
            total.branch_sq += (even.branch_sq + odd.branch_sq).sum();
            total.dot += (even.dot + odd.dot).sum();
          });
    }
    double* left = sums(task.plane, task.image, row);
    left[0] = total.skip_sq, left[1] = total.branch_sq, left[2] = total.dot;
  }

 private:
  Task task(int64_t number) const {
    const int64_t each = ceil_div(s_.height, rows_), most = planes_of_task(s_),
                  plane = number / each / images_ * most, row = number % each * rows_;
    return {plane, least(most, planes_of(s_) - plane), number / each % images_, row,
            least(rows_, s_.height - row)};
  }

  int64_t channels_from(int64_t plane) const { return least(kLanes, s_.channels - plane * kLanes); }
  int64_t pixels() const { return s_.height * s_.width; }

  void load_row(int64_t image, int64_t row) {
    for (int64_t plane = 0; plane < planes_of(s_); ++plane) {
      A* to = row_of(x, image, plane, row);
      std::memset(to - kLanes, 0, line * sizeof(A));
      if (row < 0 || row == s_.height) continue;
      const int64_t n = channels_from(plane), number = first_ + image, c = plane * kLanes;
      if (s_.channels_last) {
        const T* from = in<T>(a_.x, (number * pixels() + row * s_.width) * s_.channels + c);
        for (int64_t i = 0; i < s_.width; ++i)
          Stored<A>::store(to + i * kLanes, load(from + i * s_.channels, n));
      } else {
        load_samples(in<T>(a_.x, (number * s_.channels + c) * pixels() + row * s_.width), pixels(),
                     n, s_.width, to, kLanes, kLanes);
      }
    }
  }

  void store_row(int64_t image, int64_t row) const {
    for (int64_t plane = 0; plane < planes_of(s_); ++plane) {
      const A* from = row_of(x, image, plane, row);
      const int64_t n = channels_from(plane), number = first_ + image, c = plane * kLanes;
      if (s_.channels_last) {
        T* to = in<T>(a_.y, (number * pixels() + row * s_.width) * s_.channels + c);
        for (int64_t i = 0; i < s_.width; ++i)
          store(to + i * s_.channels, Stored<A>::load(from + i * kLanes), n);
      } else {
        store_samples(from, kLanes, n, s_.width,
                      in<T>(a_.y, (number * s_.channels + c) * pixels() + row * s_.width),
                      pixels());
      }
    }
  }

  double* sums(int64_t plane, int64_t image, int64_t row) const {  // [3]
    return sums_ + ((plane / planes_of_task(s_) * images_ + image) * s_.height + row) * 3;
  }

  void store_sums(int64_t block) const {
    for (int64_t image = 0; image < images_; ++image)
      for (int64_t k = 0; k < 3; ++k) {
        double total = 0;
        for (int64_t plane = 0; plane < planes_of(s_); plane += planes_of_task(s_))
          for (int64_t row = 0; row < s_.height; ++row) total += sums(plane, image, row)[k];
        in<A>(a_.sums, (block * 3 + k) * s_.batch)[first_ + image] = static_cast<A>(total);
      }
  }

  const Args& a_;
  const Shape& s_;
  const int64_t first_, images_;
  const int64_t rows_, tasks_;  // rows of a task
  double* const sums_;          // [planes / those of a task, images, H, 3]
};

}  // namespace fastres::conv_stack::FASTRES_ISA
