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
  Forward(const Args& a, int64_t first, int64_t images, void* buffer)
      : a_(a),
        s_(a.shape),
        first_(first),
        images_(images),
        line_((s_.width + 2) * kLanes),
        plane_((s_.height + 2) * line_),
        tasks_(tasks_of(s_, images)),
        x_(static_cast<A*>(buffer)),
        inner_(x_ + images * image_size(s_)),
        sums_(reinterpret_cast<double*>(inner_ + images * image_size(s_))),
        row_(2 * s_.width * kLanes * sizeof(A)) {}

  void run(Member* member) {
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
  // Two planes of a row of an image, or the one that is left.
  struct Task {
    int64_t number, plane, image, row;
    Task(const Forward& f, int64_t number)
        : number(number),
          plane(number / f.s_.height / f.images_ * 2),
          image(number / f.s_.height % f.images_),
          row(number % f.s_.height) {}
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

  // Calls each(t, plane) for the planes of a task, after the convolution of its row:
  // out [2][W][16] <- conv(from, w) + b.
  void convolve(const void* w, const void* b, A* from, int64_t block, const Task& task, A* out,
                int64_t out_plane) const {
    const int64_t c = s_.channels, first = task.plane * kLanes;
    const Taps<T> taps{in<T>(w, block * 9 * c * c + first), c, in<T>(b, block * c + first),
                       least(2 * kLanes, c - first)};
    const Source<A> source{at(from, task.image, 0, task.row - 1) - kLanes, line_, plane_};
    convolve_row(taps, source, s_.width, out, out_plane);
  }
  int64_t planes(const Task& task) const { return least(2, planes_of(s_) - task.plane); }

  void inner(int64_t block, const Task& task) const {
    A* row = at(inner_, task.image, task.plane, task.row);
    convolve(a_.weights.w1, a_.weights.b1, x_, block, task, row, plane_);
    for (int64_t p = 0; p < planes(task); ++p)
      for (int64_t i = 0; i < s_.width * kLanes; i += kLanes) {
        A* place = row + p * plane_ + i;
        Stored<A>::store(place, Math<Tile<A>>::positive_part(Stored<A>::load(place)));
      }
  }

  void join(int64_t block, const Task& task) const {
    A* f = static_cast<A*>(row_.data());
    convolve(a_.weights.w2, a_.weights.b2, inner_, block, task, f, s_.width * kLanes);
    const A gate = gate_of<A>(a_.weights, block, first_ + task.image);
    Sums<double> total;
    for (int64_t p = 0; p < planes(task); ++p) {
      A* x = at(x_, task.image, task.plane + p, task.row);
      const A* branch = f + p * s_.width * kLanes;
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
    double* to = sums_ + task.number * 3;
    to[0] = total.skip_sq, to[1] = total.branch_sq, to[2] = total.dot;
  }

  void store_sums(int64_t block) const {
    for (int64_t image = 0; image < images_; ++image)
      for (int64_t k = 0; k < 3; ++k) {
        double total = 0;
        for (int64_t plane = 0; plane < planes_of(s_); plane += 2)
          for (int64_t row = 0; row < s_.height; ++row)
            total += sums_[((plane / 2 * images_ + image) * s_.height + row) * 3 + k];
        in<A>(a_.sums, (block * 3 + k) * s_.batch)[first_ + image] = static_cast<A>(total);
      }
  }

  const Args& a_;
  const Shape& s_;
  const int64_t first_, images_, line_, plane_, tasks_;  // elements of a row, of a plane
  A *const x_, *const inner_;                            // [images, planes, H + 2, W + 2, 16]
  double* const sums_;                                   // [tasks, 3]
  const Buffer row_;                                     // [2, W, 16], of the branch
};

}  // namespace fastres::conv_stack::FASTRES_ISA
