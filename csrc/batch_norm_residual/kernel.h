// batch_norm_residual: y = act(x + p) with p = gate * n, where n = scale * (f - mean) + bias is the
// normalised branch and scale = weight / sqrt(var + eps); and per sample the sums x*x, p*p, x*p.
//   moments   mean and variance of each channel of f, over all samples and places (training)
//   forward   y, the sums; mask bit = the ReLU lets the cotangent through
//   reduce    g = mask ? gy : 0;  of_g = sum gate g and of_f = sum gate g (f - mean), per channel;
//             gbias = of_g, gweight = of_f / sqrt(var + eps);  ggate[row] = sum g n
//   backward  gx = g;  gf = scale * (gate g - of_g / count - (f - mean) of_f / (count (var + eps)))
//             in training, with count values per channel; else gf = scale * gate g
#pragma once
#include "../common/dtype.h"
#include "../common/sums.h"

namespace fastres::batch_norm_residual {

// A sample lies in memory as lines of equal length: planes, a line per channel, or pixels, a line
// per place. Each line of the mask begins with a byte.
struct Shape {
  int64_t rows;      // samples
  int64_t channels;  // C
  int64_t places;    // S, values of a channel in a sample
  bool pixels;       // a sample is [S, C] in memory (channels_last), else [C, S]

  FASTRES_HD int64_t lines() const { return pixels ? places : channels; }
  FASTRES_HD int64_t length() const { return pixels ? channels : places; }
  FASTRES_HD int64_t cols() const { return channels * places; }
  FASTRES_HD bool any() const { return rows > 0 && places > 0; }
  FASTRES_HD double count() const {  // values per channel; 1 of none, whose sums are 0
    return any() ? double(rows) * places : 1;
  }
  FASTRES_HD int64_t mask_cols() const { return lines() * ceil_div(length(), 8); }
};

struct Args {
  const void* x;       // [rows, cols]; null: 0, and there are no sums
  const void* f;       // [rows, cols]
  const void* weight;  // [C], accumulate type, or dtype where `narrow`; null: 1
  const void* bias;    // [C], likewise; null: 0
  const void* gate;    // [rows] with stride gate_stride, accumulate type; null: 1
  void* y;             // [rows, cols]
  void* sums;          // [3, rows], accumulate type; null where x is
  const void* mean;    // [C], as weight; given outside of training
  const void* var;     // [C], likewise
  const void* lost;    // [C], accumulate type; likewise, null: 0
  void* statistics;    // [3, C], accumulate type; by which f is normalised: mean, biased variance,
                       // and what rounding took of the mean
  void* running_mean;  // [C], accumulate type; moved in training; null: not wanted
  void* running_var;   // [C], likewise, by the unbiased variance
  int64_t* batches;    // counts the calls in training; null: not wanted
  uint8_t* mask;       // [rows, lines, ceil(length / 8)], bit c % 8 of byte c / 8; null: not wanted
  int64_t gate_stride;  // 0: one for all rows
  Shape shape;
  double eps, momentum;  // momentum: how far the running statistics move
  Dtype dtype;           // of x, f, y; the accumulate type is float64 for float64, else float32
  bool relu, training;
  bool narrow;              // not in training
  void* scratch = nullptr;  // scratch_bytes(args)
};

struct BackwardArgs {
  const void* gy;      // [rows, cols]
  const void* f;       // [rows, cols]
  const void* weight;  // [C], accumulate type; as in Args, down to gate
  const void* bias;
  const void* gate;
  const void* statistics;  // [3, C]
  const uint8_t* mask;     // [rows, lines, ceil(length / 8)]; null: all ones
  void* gx;                // [rows, cols]; null: not wanted (it is gy)
  void* gf;                // [rows, cols]
  void* gweight;           // [C], accumulate type; null: not wanted
  void* gbias;             // [C], likewise
  void* ggate;             // [rows], likewise
  int64_t gate_stride;
  Shape shape;
  double eps;
  Dtype dtype;
  bool training;
  void* scratch = nullptr;  // scratch_bytes(args)
};

// One channel's normalisation. V: a number, or a vector of them.
template <class V> struct Norm {
  V mean, scale, bias;
  FASTRES_HD V operator()(const V& f) const { return scale * (f - mean) + bias; }
};

// One channel's backward pass: per_g and per_f are the means that training takes away.
template <class V> struct Pull {
  V mean, scale, per_g, per_f;
  FASTRES_HD V operator()(const V& g, const V& f) const {
    return scale * (g - per_g - (f - mean) * per_f);
  }
};

// The statistics of a channel.
template <class A> struct Statistics {
  A mean, var, lost;
  FASTRES_HD static Statistics of(const void* all, int64_t channels, int64_t c) {
    const A* at = static_cast<const A*>(all) + c;
    return {at[0], at[channels], at[2 * channels]};
  }
  FASTRES_HD void keep(const Args& a, int64_t c) const {
    A* at = static_cast<A*>(a.statistics) + c;
    at[0] = mean;
    at[a.shape.channels] = var;
    at[2 * a.shape.channels] = lost;
  }
};

// Writes the batch's statistics of a channel, and moves the running ones towards them.
template <class A> FASTRES_HD void keep_moments(const Args& a, int64_t c, double mean, double var) {
  if (var < 0) var = 0;  // NaN stays
  const A rounded = static_cast<A>(mean);
  Statistics<A>{rounded, static_cast<A>(var), static_cast<A>(mean - rounded)}.keep(a, c);
  if (!a.running_mean || !a.shape.any()) return;
  const double count = a.shape.count(), m = a.momentum;
  A& running_mean = static_cast<A*>(a.running_mean)[c];
  A& running_var = static_cast<A*>(a.running_var)[c];
  running_mean = static_cast<A>((1 - m) * running_mean + m * mean);
  running_var = static_cast<A>((1 - m) * running_var + m * (var * (count / (count - 1))));
}

// Bytes of device memory that launch_cuda needs beside its outputs.
int64_t scratch_bytes(const Args& args);
int64_t scratch_bytes(const BackwardArgs& args);

void launch_cuda(const Args& args, void* stream);
void launch_cuda(const BackwardArgs& args, void* stream);

}  // namespace fastres::batch_norm_residual
