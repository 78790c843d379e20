// cuda_rows: the rows of a sample while it goes down the blocks, and their exponents: a row is held
// as 2^exponent times the true one.
#pragma once
#include "cuda_product.h"

namespace fastres::mlp_stack_paths {

__device__ __forceinline__ float scaled(float v, int power) { return ::ldexpf(v, power); }
__device__ __forceinline__ double scaled(double v, int power) { return ::ldexp(v, power); }
__device__ __forceinline__ int order(float v) { return ::ilogbf(v); }
__device__ __forceinline__ int order(double v) { return ::ilogb(v); }

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
  FASTRES_HD int given(int row) const { return row + 1 + (row > longest); }  // row of results
};

// The rows of a sample, in shared or global memory.
template <class T> struct Rows {
  const Places places;
  const int64_t stride;
  T* const data;      // [count, stride], zeros beyond D
  T* const sizes;     // [count], the largest magnitudes as held
  int* const powers;  // [2, count], the exponents; of even and odd numbers of blocks done

  __device__ __forceinline__ Rows(const Shape& s, char* memory)
      : places(s),
        stride(stride_of<T>(s.width)),
        data(reinterpret_cast<T*>(memory)),
        sizes(data + places.count() * stride),
        powers(reinterpret_cast<int*>(sizes + places.count())) {}
  FASTRES_HD static int64_t bytes(const Shape& s) {
    const int64_t count = Places(s).count();
    return ceil_div(count * ((stride_of<T>(s.width) + 1) * int64_t(sizeof(T)) + 2 * 4), 16) * 16;
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
    const int power = is_far(size, 0) ? -order(size) : 0;
    for (int place = warp; place < places.count(); place += warps) {
      const bool given = place < 2;
      for (int64_t col = lane; col < stride; col += 32)
        at(place)[col] = given && col < width ? scaled(cotangent[col], power) : T(0);
      if (lane > 0) continue;
      sizes[place] = given ? scaled(size, power) : T(0);
      powers[place] = powers[places.count() + place] = given ? power : 0;
    }
  }

  // Chooses the exponents with which the next block adds, from the ones with which `done` blocks
  // were; a warp of each 32 rows.
  __device__ __forceinline__ void choose_powers(int64_t done) const {
    const int lane = threadIdx.x % 32, count = places.added_to(done);
    for (int first = int(threadIdx.x) / 32 * 32; first < count; first += blockDim.x) {
      const int change = first + lane < count ? choose_power(first + lane, done) : 0;
      const unsigned changed = __ballot_sync(~0u, change != 0);
      for (int i = 0; i < 32 && changed >> i; ++i) {
        const int power = __shfl_sync(~0u, change, i);
        T* const row = at(places.target(first + i));
        for (int64_t col = lane; power && col < stride; col += 32)
          row[col] = scaled(row[col], power);
      }
    }
  }

  // R + G_K as held with the exponents of R, once these are chosen.
  __device__ __forceinline__ void join_tail(int64_t done) const {
    const int* power = powers_of(done + 1);
    const int last = places.longest + 1, joined = last + 1, tail = last + 2;
    const T factor = power_of_two<T>(power[tail] - power[last]);
    for (int64_t col = threadIdx.x; col < stride; col += blockDim.x)
      at(joined)[col] = at(tail)[col] + factor * at(last)[col];
  }

 private:
  __device__ __forceinline__ static bool is_finite(T size) { return size - size == 0; }
  __device__ __forceinline__ static bool is_far(T size, int power) {
    if (size == 0 || !is_finite(size)) return false;
    const int distance = order(size) + power;
    return distance > kFarthest || distance < -kFarthest;
  }
  // Returns by how much the row is to be scaled.
  __device__ __forceinline__ int choose_power(int number, int64_t done) const {
    const int* now = powers_of(done);
    int* next = powers_of(done + 1);
    const int target = places.target(number), source = places.source(number);
    const int from = number > places.longest ? places.longest + 1 : source;  // of R: G_K
    const T size = sizes[target], of_source = sizes[from];
    int power = now[target];
    if (is_finite(size) && is_finite(of_source)) {
      const bool own = size != 0 && (of_source == 0 ||
                                     order(size) - now[target] >= order(of_source) - now[from]);
      const T larger = own ? size : of_source;
      const int of_larger = now[own ? target : from];
      if (is_far(larger, power - of_larger)) power = of_larger - order(larger);
    }
    next[target] = power;
    if (number > places.longest) next[source] = power;
    return size == 0 ? 0 : power - now[target];
  }
};

}  // namespace fastres::mlp_stack_paths
