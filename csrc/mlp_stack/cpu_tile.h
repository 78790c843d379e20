// cpu_tile: a tile of samples on its way through the blocks, and the order of the steps.
#pragma once
#include <vector>

#include "../common/activation.h"
#include "../common/member.h"
#include "../common/tile_product.h"
#include "cpu.h"

namespace fastres::mlp_stack::FASTRES_ISA {

using namespace fastres::FASTRES_ISA;

// Elements from a weight to the one to be fetched into the second cache meanwhile: the same of the
// next block, 1 or -1 away, where a member's share of it is at most 128 KiB; else, and where all
// blocks have the same weights, the one after 64 KiB.
template <class T> int64_t elements_ahead(const Shape& s, int members, int direction) {
  const int64_t matrix = s.width * s.hidden;
  const bool fits = matrix * sizeof(T) <= members * (128u << 10);
  return fits && !s.shared ? direction * matrix : (64 << 10) / sizeof(T);
}

// A member's weights in the accumulate type: where they are, or widened to a buffer of its own.
template <class T> class Widened {
  using A = typename Stored<T>::A;
  static constexpr bool kInPlace = std::is_same_v<T, A>;

 public:
  // `most` columns; direction: of the next block, 1 or -1.
  Widened(int64_t most, const Shape& s, int members, int direction = 1)
      : ahead_(elements_ahead<T>(s, members, direction)), buffer_(kInPlace ? 0 : kChunk * most) {}

  Rows<T> in_place(const T* from, int64_t cols) const { return {from, cols, ahead_}; }
  // `rows` rows of `cols` elements; and the same by columns of a matrix, as its transpose.
  Rows<A> rows(const T* from, int64_t rows, int64_t cols) {
    if constexpr (kInPlace) return in_place(from, cols);
    else return {widen(from, cols, rows, cols, buffer_.data(), ahead_), cols};
  }
  Columns<A> columns(const T* from, int64_t stride, int64_t rows, int64_t cols) {
    if constexpr (kInPlace) return {from, stride, ahead_};
    else return {widen(from, stride, rows, cols, buffer_.data()), cols};
  }
  // Fetches for the next block what `columns` reads in this one.
  void fetch(const T* from, int64_t stride, int64_t rows, int64_t cols) const {
    for (int64_t r = 0; r < rows; ++r) fetch_row(from + r * stride + ahead_, cols);
  }
  const A* bias(const T* from, int64_t size) {
    if constexpr (kInPlace) return from;
    else return widen(from, 0, 1, size, bias_);
  }

 private:
  static void fetch_row(const T* from, int64_t cols) {
    for (int64_t c = 0; c < cols; c += 64 / sizeof(T)) __builtin_prefetch(from + c, 0, 2);
  }
  static const A* widen(const T* from, int64_t stride, int64_t rows, int64_t cols, A* to,
                        int64_t ahead = 0) {
    for (int64_t r = 0; r < rows; ++r, from += stride) {
      if (ahead) fetch_row(from + ahead, cols);
      move(from, to + r * cols, cols);
    }
    return to;
  }
  const int64_t ahead_;
  std::vector<A> buffer_;
  A bias_[kInPlace ? 1 : kChunk];
};

// Where a tile's samples stand: `rows` of them from sample `row`, in groups side by side.
template <int kTiles> struct Groups {
  static constexpr int64_t kLanesOfGroup = kTiles * kLanes;
  int64_t row, rows, count;
  Groups(int64_t row, int64_t rows) : row(row), rows(rows), count(ceil_div(rows, kLanesOfGroup)) {}
  int64_t lanes() const { return count * kLanesOfGroup; }
  int64_t first(int64_t group) const { return row + group * kLanesOfGroup; }
  int64_t size(int64_t group) const {  // samples in the group
    return least(kLanesOfGroup, rows - group * kLanesOfGroup);
  }
};

// The three sums of an add, over 16 samples or over 16 features.
template <class A> struct SumTiles {
  Tile<A> skip_sq{}, branch_sq{}, dot{};
  FASTRES_HD void add(const Tile<A>& x, const Tile<A>& p) {
    skip_sq += x * x;
    branch_sq += p * p;
    dot += x * p;
  }
};

// The rows of a matrix that one chunk of work does.
struct Chunk {
  int64_t number, first, size;
  Chunk(int64_t number, int64_t rows)
      : number(number), first(number * kChunk), size(least(kChunk, rows - first)) {}
};

// Runs begin(); then for every block first(block, chunk) for n1 chunks and second(block, chunk) for
// n2; then end(). Every step sees all that the step before it wrote. With a team the chunks of a
// step are shared out.
template <class Begin, class First, class Second, class End>
void in_order(Member* member, int64_t blocks, int64_t n1, int64_t n2, const Begin& begin,
              const First& first, const Second& second, const End& end) {
  if (member && !member->join()) return;
  if (!member || member->first()) begin();
  if (member) member->meet();
  for (int64_t block = 0; block < blocks; ++block) {
    share(member, n1, [&](int64_t chunk) { first(block, chunk); });
    share(member, n2, [&](int64_t chunk) { second(block, chunk); });
  }
  if (!member || member->first()) end();
}

// The set of weights of block a.first + `block`.
inline int64_t set_of(const Args& a, int64_t block) { return a.shape.shared ? 0 : a.first + block; }

// The blocks of the arguments on the way down, by their number, and the chunks of a block.
struct Descent {
  const BackwardArgs& a;
  const Shape& s;
  const int64_t blocks;
  explicit Descent(const BackwardArgs& a) : a(a), s(a.shape), blocks(a.last - a.first) {}

  int64_t hidden_chunks() const { return ceil_div(s.hidden, kChunk); }
  int64_t width_chunks() const { return ceil_div(s.width, kChunk); }
  int64_t sums_chunks() const { return hidden_chunks() + width_chunks(); }
  int64_t local(int64_t number) const { return blocks - 1 - number; }
  int64_t block(int64_t number) const { return a.last - 1 - number; }
  int64_t set(int64_t number) const { return s.shared ? 0 : block(number); }
  void has_left(int64_t count) const {
    if (a.done) a.done->store(count, std::memory_order_release);
  }
};

// Upwards: load(); then for every block hidden(block, chunk) and branch(block, chunk) for the
// chunks of H and of D, and stream.store_sums(block); then stream.finish().
template <class S, class Load, class Hidden, class Branch>
void upwards(Member* member, const Args& a, S& stream, const Load& load, const Hidden& hidden,
             const Branch& branch) {
  const Shape& s = a.shape;
  in_order(
      member, a.last - a.first, ceil_div(s.hidden, kChunk), ceil_div(s.width, kChunk), load,
      [&](int64_t block, int64_t chunk) {
        if (chunk == 0 && block > 0) stream.store_sums(block - 1);
        hidden(block, Chunk(chunk, s.hidden));
      },
      [&](int64_t block, int64_t chunk) { branch(block, Chunk(chunk, s.width)); },
      [&] { stream.finish(); });
}

}  // namespace fastres::mlp_stack::FASTRES_ISA
