// cpu_pairs: images in bfloat16 through the blocks by the tile registers of AMX. What products take
// of the stream and of the inner activations is rounded to bfloat16 for them, as eager's is; the
// stream itself stays in float32. Where products take it channels stand side by side, so that the
// three pixels that one row of a kernel reads are one run of 3 C elements.
#pragma once
#include "../common/buffer.h"
#include "../common/pairs.h"
#include "cpu_stream.h"

#if defined(FASTRES_PAIRS)
namespace fastres::conv_stack::FASTRES_ISA {

class ForwardInPairs {
 public:
  ForwardInPairs(const Args& a, int64_t first, int64_t images, int64_t rows, void* buffer)
      : a_(a),
        s_(a.shape),
        line_((s_.width + 2) * s_.channels),
        x_(static_cast<BFloat16*>(buffer)),
        inner_(x_ + images * image_size(s_)),
        stream_(a, first, images, rows, inner_ + images * image_size(s_)),
        products_(round_up(rows * (s_.width + 2), kLanes) * kLanes * sizeof(float)),
        weights_(9 * s_.channels * kLanes * sizeof(BFloat16)) {}

  void run(Member* member) {
    const AmxTiles registers;
    stream_.run(member, *this);
  }

  void load(int64_t image, int64_t row) const {
    std::memset(row_of(x_, image, row), 0, line_ * sizeof(BFloat16));
    std::memset(row_of(inner_, image, row), 0, line_ * sizeof(BFloat16));
    if (row < 0 || row == s_.height) return;
    for (int64_t plane = 0; plane < planes_of(s_); ++plane) round_stream(image, plane, row);
  }

  void inner(int64_t block, const Task& task) {
    const float* f = convolve(a_.weights.w1, a_.weights.b1, x_, block, task);
    for (int64_t r = 0; r < task.rows; ++r, f += pixels_apart() * kLanes) {
      BFloat16* to = row_of(inner_, task.image, task.row + r) + s_.channels + task.plane * kLanes;
      for (int64_t i = 0; i < s_.width; ++i) {
        const Tile<float> v = Stored<float>::load(f + i * kLanes);
        store_rounded(to + i * s_.channels, Math<Tile<float>>::positive_part(v));
      }
    }
  }

  void join(int64_t block, const Task& task) {
    const float* f = convolve(a_.weights.w2, a_.weights.b2, inner_, block, task);
    for (int64_t r = task.row; r < task.row + task.rows; ++r, f += pixels_apart() * kLanes) {
      stream_.add_row(block, task, r, f, 0);
      round_stream(task.image, task.plane, r);
    }
  }

 private:
  // Whether 16 pixels of a product stand in one row; else they go on past its border, two pixels
  // for nothing, and from the last row up to 15 pixels into what lies behind: the next image,
  // inner_ or the stream, which is 9 C floats at least. Whatever it holds, and whoever writes it,
  // only sums that nobody reads come of it.
  bool in_rows() const { return s_.width % kLanes == 0; }
  // Pixels of a product from one row to the next.
  int64_t pixels_apart() const { return in_rows() ? s_.width : s_.width + 2; }

  // Pixel -1 of a row, of images [H + 2, W + 2, C]; row -1 is the border.
  BFloat16* row_of(BFloat16* images, int64_t image, int64_t row) const {
    return images + image * image_size(s_) + (row + 1) * line_;
  }

  void round_stream(int64_t image, int64_t plane, int64_t row) const {
    const float* from = stream_.row_of(stream_.x, image, plane, row);
    BFloat16* to = row_of(x_, image, row) + s_.channels + plane * kLanes;
    for (int64_t i = 0; i < s_.width; ++i)
      store_rounded(to + i * s_.channels, Stored<float>::load(from + i * kLanes));
  }

  // The weights for the 16 channels of a plane, 9 C rows, in pairs: often those of the task before.
  const BFloat16* weights_of(const void* w, int64_t block, int64_t plane) {
    const BFloat16* from = in<BFloat16>(w, block * 9 * s_.channels * s_.channels + plane * kLanes);
    BFloat16* const to = static_cast<BFloat16*>(weights_.data());
    if (from != held_)
      for (int64_t r = 0; r < 9 * s_.channels; r += 2)
        pair_rows(from + r * s_.channels, from + (r + 1) * s_.channels, to + r * kLanes);
    held_ = from;
    return to;
  }

  // conv(from, w) + b for the rows of a task, [rows, pixels_apart, 16].
  const float* convolve(const void* w, const void* b, BFloat16* from, int64_t block,
                        const Task& task) {
    const BFloat16* weights = weights_of(w, block, task.plane);
    alignas(64) float bias[kLanes];
    move(in<BFloat16>(b, block * s_.channels + task.plane * kLanes), bias, kLanes);
    const BFloat16* first = row_of(from, task.image, task.row - 1);
    const auto source = [&](int64_t pixel) {
      return first + (pixel + (in_rows() ? pixel / s_.width * 2 : 0)) * s_.channels;
    };
    float* const out = static_cast<float*>(products_.data());
    const int64_t count = (task.rows - 1) * pixels_apart() + s_.width;
    int64_t i = 0;
    for (; i + kLanes < count; i += 2 * kLanes)
      product<2>(source(i), source(i + kLanes), weights, bias, out + i * kLanes);
    if (i < count) product<1>(source(i), nullptr, weights, bias, out + i * kLanes);
    return out;
  }

  // Twice 16 pixels, or once, of which the 9 C elements that are read begin at a and b.
  template <int kTimes>
  void product(const BFloat16* a, const BFloat16* b, const BFloat16* weights, const float* bias,
               float* out) const {
    const int64_t c = s_.channels;
    load_amx<0>(bias, 0);
    if constexpr (kTimes == 2) load_amx<1>(bias, 0);
    for (int64_t y = 0; y < 3; ++y) {
      int64_t k = y * line_;
      for (const int64_t end = k + 3 * c / kPaired * kPaired; k < end; k += kPaired) {
        load_amx<3>(weights, kPaired);
        load_amx<2>(a + k, c);
        multiply_add_amx<0, 2, 3>();
        if constexpr (kTimes == 2) load_amx<2>(b + k, c), multiply_add_amx<1, 2, 3>();
        weights += kPaired * kLanes;
      }
      if (3 * c % kPaired == 0) continue;
      load_amx<5>(weights, kPaired);
      load_amx<4>(a + k, c);
      multiply_add_amx<0, 4, 5>();
      if constexpr (kTimes == 2) load_amx<4>(b + k, c), multiply_add_amx<1, 4, 5>();
      weights += kPaired / 2 * kLanes;
    }
    store_amx<0>(out, kLanes);
    if constexpr (kTimes == 2) store_amx<1>(out + kLanes * kLanes, kLanes);
  }

  const Args& a_;
  const Shape& s_;
  const int64_t line_;                // elements of a row with its border
  BFloat16 *const x_, *const inner_;  // [images, H + 2, W + 2, C]
  Stream<BFloat16> stream_;
  const Buffer products_, weights_;
  const BFloat16* held_ = nullptr;  // what weights_ was made of
};

}  // namespace fastres::conv_stack::FASTRES_ISA
#endif
