// cpu_backward: the cotangents of a tile of samples through the blocks, downwards; then the weight
// gradients of all these blocks, from what the tiles left in scratch.
#pragma once
#include "activation.h"
#include "cpu_tile.h"

namespace fastres::mlp_stack::FASTRES_ISA {

// What the chain leaves for the weight gradients, of each block: gated = gate * g [D, stride],
// delta = dz [H, stride], hidden = h [batch, H].
template <class A> struct Left {
  const Shape& s;
  const int64_t stride;
  A* const at;
  Left(const Shape& s, void* scratch)
      : s(s), stride(feature_stride(s.batch)), at(static_cast<A*>(scratch)) {}
  A* gated(int64_t block) const { return at + block * left_size(s); }
  A* delta(int64_t block) const { return gated(block) + stride * s.width; }
  A* hidden(int64_t block) const { return delta(block) + stride * s.hidden; }
};

// From z and q, [rows, kGroup] both: h <- act(z) over z, dz <- gate * q * act'(z) to delta [rows,
// stride]; the sums of q * h over the rows, [kGroup].
template <Activation kActivation, int kTiles, class A>
void derive(A* z, const A* q, int64_t rows, const GateTiles<A, kTiles>& gate, A* delta,
            int64_t stride, A* sums) {
  Tile<A> dot[kTiles]{};
  for (int64_t r = 0; r < rows; ++r)
    for (int t = 0; t < kTiles; ++t) {
      A* place = z + (r * kTiles + t) * kLanes;
      const Tile<A> given = Stored<A>::load(place), h = value<kActivation>(given),
                    cotangent = Stored<A>::load(q + (r * kTiles + t) * kLanes);
      dot[t] += cotangent * h;
      Stored<A>::store(place, h);
      Stored<A>::store(delta + r * stride + t * kLanes,
                       gate.v[t] * (cotangent * derivative<kActivation>(given)));
    }
  for (int t = 0; t < kTiles; ++t) Stored<A>::store(sums + t * kLanes, dot[t]);
}

// Blocks count down: number 0 is the last one.
template <class T, int kTiles> class Chain {
  using A = typename Stored<T>::A;
  static constexpr int64_t kGroup = kTiles * kLanes;

 public:
  Chain(const BackwardArgs& a, int64_t row, int64_t rows, void* buffer)
      : a_(a),
        derive_(pick_activation(
            a.shape.activation,
            [](auto activation) { return &derive<decltype(activation)::value, kTiles, A>; })),
        s_(a.shape),
        place_(row, rows),
        left_(a.shape, a.scratch),
        x_(static_cast<A*>(buffer)),
        g_(x_ + place_.lanes() * s_.width),
        sums_(g_ + place_.lanes() * s_.width),
        w1_(s_.width > s_.hidden ? s_.width : s_.hidden, s_.width * s_.hidden, -1),
        w2_(s_.width, s_.width * s_.hidden, -1) {}

  void run(Member* member) {
    in_order(
        member, a_.last - a_.first, hidden_chunks(), ceil_div(s_.width, kChunk), [&] { load(); },
        [&](int64_t number, int64_t chunk) {
          if (chunk == 0 && number > 0)
            add_gate_gradient(number - 1, hidden_chunks(), sums_chunks());
          hidden(number, Chunk(chunk, s_.hidden));
        },
        [&](int64_t number, int64_t chunk) {
          if (chunk == 0) add_gate_gradient(number, 0, hidden_chunks());
          stream(number, Chunk(chunk, s_.width));
        },
        [&] { finish(); });
  }

 private:
  int64_t local(int64_t number) const { return a_.last - a_.first - 1 - number; }
  int64_t block(int64_t number) const { return a_.last - 1 - number; }
  int64_t set(int64_t number) const { return s_.shared ? 0 : block(number); }
  A* x(int64_t group) const { return x_ + group * kGroup * s_.width; }  // [D, kGroup]
  A* g(int64_t group) const { return g_ + group * kGroup * s_.width; }  // [D, kGroup]
  A* sums(int64_t group, int64_t chunk) const {                         // [kGroup]
    return sums_ + (chunk * place_.count + group) * kGroup;
  }
  int64_t hidden_chunks() const { return ceil_div(s_.hidden, kChunk); }
  int64_t sums_chunks() const { return hidden_chunks() + ceil_div(s_.width, kChunk); }
  // Features from `feature` on of a group's samples, of a [batch, D] tensor of a local block.
  int64_t at(int64_t local, int64_t group, int64_t feature) const {
    return (local * s_.batch + place_.first(group)) * s_.width + feature;
  }

  void load_state(int64_t number, int64_t group, int64_t from, int64_t size) {
    load_samples(in<T>(a_.states, at(local(number), group, from)), s_.width, place_.size(group),
                 size, x(group) + from * kGroup, kGroup, kGroup);
  }

  void load() {
    for (int64_t i = 0; i < place_.count; ++i) {
      load_samples(in<A>(a_.g, at(0, i, 0)), s_.width, place_.size(i), s_.width, g(i), kGroup,
                   kGroup);
      load_state(0, i, 0, s_.width);
    }
  }

  // h <- act(z), dz <- gate * q * act'(z) with z = W1 x + b1, q = W2^T g; and the chunk's share of
  // <q, h>.
  void hidden(int64_t number, const Chunk& chunk) {
    const int64_t row_at = set(number) * s_.hidden + chunk.first;
    const Rows<A> w1 = w1_.rows(in<T>(a_.weights.w1, row_at * s_.width), chunk.size, s_.width);
    const Columns<A> w2 =
        w2_.columns(in<T>(a_.weights.w2, set(number) * s_.width * s_.hidden + chunk.first),
                    s_.hidden, s_.width, chunk.size);
    const A* b1 = w1_.bias(in<T>(a_.weights.b1, row_at), chunk.size);
    alignas(64) A h[kChunk * kGroup], q[kChunk * kGroup];
    for (int64_t i = 0; i < place_.count; ++i) {
      const GateTiles<A, kTiles> gate(a_.weights, block(number), place_.first(i), place_.size(i));
      A* delta = left_.delta(local(number)) + chunk.first * left_.stride + place_.first(i);
      product<kTiles>(chunk.size, w1, b1, x(i), kGroup, s_.width, h, kGroup);
      product<kTiles, Columns<A>, A>(chunk.size, w2, nullptr, g(i), kGroup, s_.width, q, kGroup);
      derive_(h, q, chunk.size, gate, delta, left_.stride, sums(i, chunk.number));
      if (a_.gw1)
        store_samples(h, kGroup, place_.size(i), chunk.size,
                      left_.hidden(local(number)) + place_.first(i) * s_.hidden + chunk.first,
                      s_.hidden);
    }
  }

  // g <- g + W1^T dz; the chunk's share of <g, b2>; and x of the block below.
  void stream(int64_t number, const Chunk& chunk) {
    const Columns<A> w1 =
        w1_.columns(in<T>(a_.weights.w1, set(number) * s_.hidden * s_.width + chunk.first),
                    s_.width, s_.hidden, chunk.size);
    const A* b2 = w2_.bias(in<T>(a_.weights.b2, set(number) * s_.width + chunk.first), chunk.size);
    alignas(64) A sum[kChunk * kGroup];
    for (int64_t i = 0; i < place_.count; ++i) {
      keep_gated(number, chunk, i, b2);
      const A* delta = left_.delta(local(number)) + place_.first(i);
      product<kTiles, Columns<A>, A>(chunk.size, w1, nullptr, delta, left_.stride, s_.hidden, sum,
                                     kGroup);
      add_tiles(sum, chunk.size * kGroup, g(i) + chunk.first * kGroup);
      if (a_.gstates) add_state_cotangents(number, chunk, i);
      if (number + 1 < a_.last - a_.first) load_state(number + 1, i, chunk.first, chunk.size);
    }
  }

  void keep_gated(int64_t number, const Chunk& chunk, int64_t i, const A* b2) {
    const GateTiles<A, kTiles> gate(a_.weights, block(number), place_.first(i), place_.size(i));
    A* gated = left_.gated(local(number)) + chunk.first * left_.stride + place_.first(i);
    for (int t = 0; t < kTiles; ++t) {
      Tile<A> dot{};
      for (int64_t r = 0; r < chunk.size; ++r) {
        const Tile<A> v = Stored<A>::load(g(i) + (chunk.first + r) * kGroup + t * kLanes);
        dot += b2[r] * v;
        Stored<A>::store(gated + r * left_.stride + t * kLanes, gate.v[t] * v);
      }
      Stored<A>::store(sums(i, hidden_chunks() + chunk.number) + t * kLanes, dot);
    }
  }

  void add_state_cotangents(int64_t number, const Chunk& chunk, int64_t i) {
    alignas(64) A given[kChunk * kGroup];
    load_samples(in<T>(a_.gstates, at(local(number), i, chunk.first)), s_.width, place_.size(i),
                 chunk.size, given, kGroup, kGroup);
    add_tiles(given, chunk.size * kGroup, g(i) + chunk.first * kGroup);
  }

  static void add_tiles(const A* from, int64_t count, A* to) {
    for (int64_t k = 0; k < count; k += kLanes)
      Stored<A>::store(to + k, Stored<A>::load(to + k) + Stored<A>::load(from + k));
  }

  // Adds to the gate's gradient what chunks [first, last) left: those of the step before this one.
  void add_gate_gradient(int64_t number, int64_t first, int64_t last) {
    if (!a_.ggate) return;
    for (int64_t i = 0; i < place_.count; ++i)
      for (int64_t lane = 0; lane < place_.size(i); lane += kLanes) {
        A* to = in<A>(a_.ggate, block(number) * s_.batch + place_.first(i) + lane);
        const int64_t n = least(kLanes, place_.size(i) - lane);
        Tile<A> total = first ? fastres::FASTRES_ISA::load(to, n) : Tile<A>{};
        for (int64_t c = first; c < last; ++c) total += Stored<A>::load(sums(i, c) + lane);
        store(to, total, n);
      }
  }

  void finish() {
    add_gate_gradient(a_.last - a_.first - 1, hidden_chunks(), sums_chunks());
    for (int64_t i = 0; i < place_.count; ++i)
      store_samples(g(i), kGroup, place_.size(i), s_.width, in<A>(a_.g, at(0, i, 0)), s_.width);
  }

  const BackwardArgs& a_;
  void (*const derive_)(A*, const A*, int64_t, const GateTiles<A, kTiles>&, A*, int64_t, A*);
  const Shape& s_;
  const Groups<kTiles> place_;
  const Left<A> left_;
  A *const x_, *const g_, *const sums_;  // [groups, D, kGroup] twice, the chunks' sums
  Widened<T> w1_, w2_;
};

// 128 samples: 32 columns of them and 8 rows of cotangents stay in the nearest cache.
constexpr int64_t kBatchBlock = 128;

// The rows of a chunk of one weight gradient and of its bias's: the sum over samples of
// left (x) right, of one block or of several.
//   w2: left = gated [D, batch], right = hidden [batch, H];  w1: left = delta [H, batch], right = x
template <class A> class WeightRows {
 public:
  // weights: [rows, cols], bias: [rows], of the chunk; `fresh`: nothing is there yet.
  WeightRows(int64_t batch, int64_t rows, int64_t cols, A* weights, A* bias, bool fresh)
      : batch_(batch), rows_(rows), cols_(cols), weights_(weights), bias_(bias), fresh_(fresh) {}

  // Adds one block. left: [rows, stride]; right: [batch, cols].
  template <class Right> void add(const A* left, int64_t stride, const Right* right) {
    for (int64_t b = 0; b < batch_; b += kBatchBlock, fresh_ = false) {
      const int64_t samples = least(kBatchBlock, batch_ - b);
      for (int64_t c = 0; c < cols_; c += kCols)
        add_columns(left + b, stride, right + b * cols_, samples, c);
      for (int64_t r = 0; r < rows_; ++r)
        bias_[r] = (fresh_ ? 0 : bias_[r]) + row_sum(left + r * stride + b, samples);
    }
  }

 private:
  static constexpr int kTiles = kWide<A>;
  static constexpr int64_t kCols = kTiles * kLanes;

  template <class Right>
  void add_columns(const A* left, int64_t stride, const Right* right, int64_t samples,
                   int64_t c) const {
    alignas(64) A block[kBatchBlock * kCols], sum[kChunk * kCols];
    const int64_t cols = least(kCols, cols_ - c);
    for (int64_t b = 0; b < samples; ++b)
      for (int64_t i = 0; i < kCols; i += kLanes)
        Stored<A>::store(
            block + b * kCols + i,
            i < cols ? load(right + b * cols_ + c + i, least(kLanes, cols - i)) : Tile<A>{});
    product<kTiles, Rows<A>, A>(rows_, {left, stride}, nullptr, block, kCols, samples, sum, kCols);
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t i = 0; i < cols; i += kLanes) {
        A* place = weights_ + r * cols_ + c + i;
        const int64_t n = least(kLanes, cols - i);
        const Tile<A> more = Stored<A>::load(sum + r * kCols + i);
        store(place, fresh_ ? more : load(place, n) + more, n);
      }
  }

  static A row_sum(const A* row, int64_t samples) {
    Tile<A> sum{};
    for (int64_t b = 0; b < samples; b += kLanes) sum += load(row + b, least(kLanes, samples - b));
    return sum.sum();
  }

  const int64_t batch_, rows_, cols_;
  A *const weights_, *const bias_;
  bool fresh_;
};

// Adds up a chunk of rows of blocks [first, last) to `weights`, `bias`, stored as Out.
template <class T, class Out, class Add>
void sum_rows(const Shape& s, int64_t rows, int64_t cols, Out* weights, Out* bias, bool fresh,
              const Add& add) {
  using A = typename Stored<T>::A;
  if constexpr (std::is_same_v<Out, A>) {
    WeightRows<A> sum(s.batch, rows, cols, weights, bias, fresh);
    add(sum);
  } else {
    std::vector<A> buffer(rows * (cols + 1));
    WeightRows<A> sum(s.batch, rows, cols, buffer.data() + rows, buffer.data(), fresh);
    add(sum);
    move(buffer.data() + rows, weights, rows * cols);
    move(buffer.data(), bias, rows);
  }
}

template <class T> void weight_task(const BackwardArgs& a, int64_t task) {
  using A = typename Stored<T>::A;
  const Shape& s = a.shape;
  const int64_t chunks2 = ceil_div(s.width, kChunk), chunks = chunks2 + ceil_div(s.hidden, kChunk);
  const int64_t block = task / chunks, number = task % chunks;
  const bool second = number < chunks2;  // of w2, else of w1
  const int64_t rows = second ? s.width : s.hidden, cols = second ? s.hidden : s.width;
  const Chunk chunk(second ? number : number - chunks2, rows);
  const Left<A> left(s, a.scratch);
  const auto add = [&](WeightRows<A>& sum, int64_t l) {
    const int64_t at = chunk.first * left.stride;
    if (second) sum.add(left.gated(l) + at, left.stride, left.hidden(l));
    else sum.add(left.delta(l) + at, left.stride, in<T>(a.states, l * s.batch * s.width));
  };
  void *const weights = second ? a.gw2 : a.gw1, *const bias = second ? a.gb2 : a.gb1;
  const auto run = [&](auto out, int64_t set, bool fresh, const auto& all) {
    using Out = decltype(out);
    const int64_t row = set * rows + chunk.first;
    sum_rows<T>(s, chunk.size, cols, in<Out>(weights, row * cols), in<Out>(bias, row), fresh, all);
  };
  if (s.shared)
    run(A(), 0, !a.add, [&](WeightRows<A>& sum) {
      for (int64_t l = 0; l < a.last - a.first; ++l) add(sum, l);
    });
  else run(T(), a.first + block, true, [&](WeightRows<A>& sum) { add(sum, block); });
}

}  // namespace fastres::mlp_stack::FASTRES_ISA
