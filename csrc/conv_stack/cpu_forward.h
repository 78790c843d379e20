// cpu_forward: images through the blocks of convolutions.
#pragma once
#include "../common/buffer.h"
#include "../common/member.h"
#include "../common/sums.h"
#include "cpu_product.h"

namespace fastres::conv_stack::FASTRES_ISA {

// Element `at` of a tensor of stored elements.
template <class T> const T* in(const void* p, int64_t at) { return static_cast<const T*>(p) + at; }
template <class T> T* in(void* p, int64_t at) { return static_cast<T*>(p) + at; }

template <class T> class Forward {
  using A = typename Stored<T>::A;

 public:
  Forward(const Args& a, int64_t first, int64_t images, int64_t rows, void* buffer)
      : a_(a),
        s_(a.shape),
        first_(first),
        images_(images),
        line_((s_.width + 2) * kLanes),
        plane_((s_.height + 2) * line_),
        rows_(rows),
        tasks_(ceil_div(planes_of(s_), 2) * images * ceil_div(s_.height, rows)),
        x_(static_cast<A*>(buffer)),
        inner_(x_ + images * image_size(s_)),
        sums_(reinterpret_cast<double*>(inner_ + images * image_size(s_))),
        branch_(2 * rows * s_.width * kLanes * sizeof(A)) {}

  void run(Member* member) {
    if (member && !member->joins()) return;
    const int64_t lines = images_ * (s_.height + 2);
    share(member, lines, [&](int64_t line) { load_line(line); });
    for (int64_t block = 0; block < s_.blocks; ++block) {
      share(member, tasks_, [&](int64_t task) { inner(block, Task(*this, task)); });
      share(member, tasks_, [&](int64_t task) { join(block, Task(*this, task)); });
      if (a_.sums && (!member || member->first())) store_sums(block);
    }
    share(member, lines, [&](int64_t line) { store_line(line); });
  }

 private:
  // Some rows of an image, of two planes or the one that is left.
  struct Task {
    int64_t plane, planes, image, row, rows;
    Task(const Forward& f, int64_t number) {
      const int64_t each = ceil_div(f.s_.height, f.rows_);
      plane = number / each / f.images_ * 2, planes = least(2, planes_of(f.s_) - plane);
      image = number / each % f.images_;
      row = number % each * f.rows_, rows = least(f.rows_, f.s_.height - row);
    }
  };

  template <class Body> static void share(Member* member, int64_t count, const Body& body) {
    const int64_t last = member ? member->end(count) : count;
    for (int64_t task = member ? member->begin(count) : 0; task < last; ++task) body(task);
    if (member) member->meet();
  }

  // Pixel 0 of row `row` in a plane of 16 channels; row -1 and pixel -1 are the border.
  A* at(A* images, int64_t image, int64_t plane, int64_t row) const {
    return images + image * image_size(s_) + plane * plane_ + (row + 1) * line_ + kLanes;
  }
  int64_t channels_from(int64_t plane) const { return least(kLanes, s_.channels - plane * kLanes); }
  int64_t pixels() const { return s_.height * s_.width; }

  void load_line(int64_t line) {
    const int64_t image = line / (s_.height + 2), row = line % (s_.height + 2) - 1;
    for (int64_t plane = 0; plane < planes_of(s_); ++plane) {
      A* to = at(x_, image, plane, row);
      std::memset(to - kLanes, 0, line_ * sizeof(A));
      std::memset(at(inner_, image, plane, row) - kLanes, 0, line_ * sizeof(A));
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

  void store_line(int64_t line) {
    const int64_t image = line / (s_.height + 2), row = line % (s_.height + 2) - 1;
    if (row < 0 || row == s_.height) return;
    for (int64_t plane = 0; plane < planes_of(s_); ++plane) {
      const A* from = at(x_, image, plane, row);
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
      const Source<A> source{at(from, task.image, plane, task.row - 1) - kLanes, line_};
      convolve_rows(taps, source, task.rows, s_.width, out, out_plane, out_line);
    }
  }

  void inner(int64_t block, const Task& task) const {
    A* first = at(inner_, task.image, task.plane, task.row);
    convolve(a_.weights.w1, a_.weights.b1, x_, block, task, first, plane_, line_);
    for (int64_t p = 0; p < task.planes; ++p)
      for (int64_t r = 0; r < task.rows; ++r) {
        A* row = first + p * plane_ + r * line_;
        for (int64_t i = 0; i < s_.width * kLanes; i += kLanes)
          Stored<A>::store(row + i, Math<Tile<A>>::positive_part(Stored<A>::load(row + i)));
      }
  }

  void join(int64_t block, const Task& task) const {
    const int64_t line = s_.width * kLanes, plane = rows_ * line;
    A* f = static_cast<A*>(branch_.data());
    convolve(a_.weights.w2, a_.weights.b2, inner_, block, task, f, plane, line);
    for (int64_t r = 0; r < task.rows; ++r)
      join_row(block, task, task.row + r, f + r * line, plane);
  }

  // Adds a row of the branch, f [planes][W][16], to the stream, and keeps its share of the sums.
  void join_row(int64_t block, const Task& task, int64_t row, const A* f, int64_t f_plane) const {
    const A gate = gate_of<A>(a_.weights, block, first_ + task.image);
    Sums<double> total;
    for (int64_t p = 0; p < task.planes; ++p) {
      A* x = at(x_, task.image, task.plane + p, row);
      const A* branch = f + p * f_plane;
      const uint16_t real = (1u << channels_from(task.plane + p)) - 1;
      for_each_tile<Sums<Tile<A>>>(
          s_.width * kLanes,
          [&](int64_t i, int64_t, Sums<Tile<A>>& sums) __attribute__((always_inline)) {
            const Tile<A> skip = Stored<A>::load(x + i),
                          p = select(real, gate * Stored<A>::load(branch + i));
            sums.add(skip, p);
            Stored<A>::store(x + i, Math<Tile<A>>::positive_part(skip + p));
          },
          [&](const Sums<Tile<A>>& even, const Sums<Tile<A>>& odd) __attribute__((always_inline)) {
            total.skip_sq += (even.skip_sq + odd.skip_sq).sum();
            total.branch_sq += (even.branch_sq + odd.branch_sq).sum();
            total.dot += (even.dot + odd.dot).sum();
          });
    }
    double* to = sums(task.plane, task.image, row);
    to[0] = total.skip_sq, to[1] = total.branch_sq, to[2] = total.dot;
  }

  double* sums(int64_t plane, int64_t image, int64_t row) const {  // [3]
    return sums_ + ((plane / 2 * images_ + image) * s_.height + row) * 3;
  }

  void store_sums(int64_t block) const {
    for (int64_t image = 0; image < images_; ++image)
      for (int64_t k = 0; k < 3; ++k) {
        double total = 0;
        for (int64_t plane = 0; plane < planes_of(s_); plane += 2)
          for (int64_t row = 0; row < s_.height; ++row) total += sums(plane, image, row)[k];
        in<A>(a_.sums, (block * 3 + k) * s_.batch)[first_ + image] = static_cast<A>(total);
      }
  }

  const Args& a_;
  const Shape& s_;
  const int64_t first_, images_;
  const int64_t line_, plane_;  // elements of a row with its border, of a plane
  const int64_t rows_, tasks_;  // rows of a task
  A *const x_, *const inner_;   // [images, planes, H + 2, W + 2, 16]
  double* const sums_;          // [pairs of planes, images, H, 3]
  const Buffer branch_;         // [2, rows, W, 16]
};

}  // namespace fastres::conv_stack::FASTRES_ISA
