// cuda_rows: the rows of a sample while it goes down the blocks, and their exponents.
#pragma once
#include "cuda_product.h"
#include "exponents.h"

namespace fastres::mlp_stack_paths {

__device__ __forceinline__ float scaled(float v, int power) { return ::ldexpf(v, power); }
__device__ __forceinline__ double scaled(double v, int power) { return ::ldexp(v, power); }
__device__ __forceinline__ int log2_below(float v) { return ::ilogbf(v); }
__device__ __forceinline__ int log2_below(double v) { return ::ilogb(v); }
// The n with 2^(n - 1) <= v < 2^n of the largest magnitude of some numbers; kNothing: see Scale.
template <class T> __device__ __forceinline__ int order(T v) {
  return v > 0 && v - v == 0 ? log2_below(v) + 1 : kNothing;
}

// 2^power; beyond the range of T the largest one, so that 0 times it is 0.
template <class T> __device__ __forceinline__ T power_of_two(int power) {
  constexpr int kMost = sizeof(T) == 8 ? 1023 : 127;
  return scaled(T(1), power < kMost ? power : kMost);
}

// Where the rows are: g, G_0, ... G_K, and with a tail R + G_K and R. Rows are added to in this
// order: number 0 is g, k is G_k, K + 1 is R; so those not yet 0 come first.
struct Places {
  int longest;
  bool tail;
  FASTRES_HD explicit Places(const Shape& s) : longest(int(s.longest)), tail(s.has_tail()) {}
  FASTRES_HD int count() const { return longest + 2 + 2 * tail; }
  // How many are added to when so many blocks are done.
  FASTRES_HD int added_to(int64_t done) const {
    return 1 + int(done < longest ? done + 1 : longest) + (tail && done >= longest);
  }
  FASTRES_HD int source(int number) const { return number + (number > longest); }
  FASTRES_HD int target(int number) const { return number ? source(number) + 1 : 0; }
  FASTRES_HD int below(int number) const {  // whose numbers come to it: of R those of G_K
    return number > longest ? longest + 1 : source(number);
  }
  FASTRES_HD int given(int row) const { return row + 1 + (row > longest); }  // row of results
};

// The rows of a sample, in shared or global memory.
template <class T> struct Rows {
  const Places places;
  const int64_t stride;
  T* const data;      // [count, stride], zeros beyond D
  T* const sizes;     // [count], the largest magnitudes as held
  int* const powers;  // [2, count], exponents of the sums of even and odd numbers of blocks
  int* const held;    // [count], those by which the next block takes the rows

  __device__ __forceinline__ Rows(const Shape& s, char* memory)
      : places(s),
        stride(stride_of<T>(s.width)),
        data(reinterpret_cast<T*>(memory)),
        sizes(data + places.count() * stride),
        powers(reinterpret_cast<int*>(sizes + places.count())),
        held(powers + 2 * places.count()) {}
  FASTRES_HD static int64_t bytes(const Shape& s) {
    const int64_t count = Places(s).count();
    return ceil_div(count * ((stride_of<T>(s.width) + 1) * int64_t(sizeof(T)) + 3 * 4), 16) * 16;
  }
  __device__ __forceinline__ T* at(int place) const { return data + place * stride; }
  __device__ __forceinline__ int* powers_of(int64_t done) const {
    return powers + done % 2 * places.count();
  }

  // g and G_0 are the cotangent, all else 0.
  __device__ __forceinline__ void begin(const T* cotangent, int64_t width) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    T size = 0;
    for (int64_t col = lane; col < width; col += 32) size = ::fmax(size, ::fabs(cotangent[col]));
    for (int distance = 16; distance > 0; distance /= 2)
      size = ::fmax(size, __shfl_xor_sync(~0u, size, distance));
    const int power = fitting({0, order(size)}, {0, kNothing});
    for (int place = warp; place < places.count(); place += warps) {
      const bool given = place < 2;
      for (int64_t col = lane; col < stride; col += 32)
        at(place)[col] = given && col < width ? scaled(cotangent[col], power) : T(0);
      if (lane > 0) continue;
      sizes[place] = given ? scaled(size, power) : T(0);
      powers[place] = powers[places.count() + place] = held[place] = given ? power : 0;
    }
  }

  // Holds anew the rows that `done` blocks have made too large or too small, and chooses by which
  // exponents the next one adds; a warp of each 32 rows. True: rows of this thread wait, so far
  // below what comes to them that its product is to be measured first.
  __device__ __forceinline__ bool choose_powers(int64_t done) const {
    const int lane = threadIdx.x % 32, count = places.added_to(done);
    bool some_wait = false;
    for (int first = int(threadIdx.x) / 32 * 32; first < count; first += blockDim.x) {
      const int number = first + lane, place = places.target(number);
      int change = 0;
      if (number < count) {
        const Scale row = fitted(place, done), from = fitted(places.below(number), done);
        change = row.exponent - powers_of(done)[place];
        held[place] = row.exponent;
        if (number > places.longest) held[places.source(number)] = of_sum(row, from);
        powers_of(done + 1)[place] = fitting(row, from);
        some_wait |= is_beyond(from, row);
      }
      const unsigned changed = __ballot_sync(~0u, change != 0);
      for (int i = 0; i < 32 && changed >> i; ++i) {
        const int power = __shfl_sync(~0u, change, i);
        T* const row = at(places.target(first + i));
        for (int64_t col = lane; power && col < stride; col += 32)
          row[col] = scaled(row[col], power);
      }
    }
    return some_wait;
  }

  // Of the rows that wait. measure(row): by a warp, the largest element of the product of a row.
  template <class Measure>
  __device__ __forceinline__ void choose_powers_of_waiting(int64_t done,
                                                           const Measure& measure) const {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int number = warp; number < places.added_to(done); number += warps) {
      const int place = places.target(number), from = places.below(number);
      const Scale row = fitted(place, done);
      if (!is_beyond(fitted(from, done), row)) continue;
      const int power = of_sum(row, {held[from], order(measure(at(from)))});
      if (threadIdx.x % 32 == 0) powers_of(done + 1)[place] = power;
    }
    __syncthreads();
  }

  // R + G_K, once the exponents are chosen.
  __device__ __forceinline__ void join_tail() const {
    const int last = places.longest + 1, joined = last + 1, tail = last + 2;
    const T of_last = power_of_two<T>(held[joined] - held[last]);
    const T of_tail = power_of_two<T>(held[joined] - held[tail]);
    for (int64_t col = threadIdx.x; col < stride; col += blockDim.x)
      at(joined)[col] = of_tail * at(tail)[col] + of_last * at(last)[col];
  }

 private:
  // How a row is held once it is held anew.
  __device__ __forceinline__ Scale fitted(int place, int64_t done) const {
    const Scale row{powers_of(done)[place], order(sizes[place])};
    const int power = fitting(row, {0, kNothing});
    return {power, row.size == kNothing ? kNothing : row.size + power - row.exponent};
  }
};

}  // namespace fastres::mlp_stack_paths
