// gpu_mma: the products of small matrices by a warp's tensor cores (mma.sync), and how their
// factors get from shared memory into registers (ldmatrix).
//
// Of the lane, g = lane / 4 and t = lane % 4. The sum d is 16 x 8: d[0], d[1] are row g, columns 2t
// and 2t + 1; d[2], d[3] the same of row g + 8. A factor's register holds 4 bytes of k, two
// elements or one: of a[0..3], 16 rows, rows g, g + 8, g, g + 8, and of b[0..1], 8 columns, column
// g; bytes 4t ... of the first 16 bytes of k in a[0], a[1], b[0], of the second 16 in a[2], a[3],
// b[1].
#pragma once
#include <type_traits>

#include "gpu_pack.h"
#if !defined(__CUDACC__)
#include "cuda_mma.h"
#endif

namespace fastres::gpu {

#if defined(__CUDACC__)

// Four matrices of 8 rows of 16 bytes; lane i passes the address of row i % 8 of matrix i / 8, and
// gets in r[m] of matrix m bytes 4t ... of row g, or, turned, the 2-byte elements g of rows 2t and
// 2t + 1.
template <bool kTurned>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTurned)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The bits of v rounded to tf32, to the nearest.
__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

#define FASTRES_MMA(types)                                      \
  asm volatile("mma.sync.aligned." types                        \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "       \
               "{%0,%1,%2,%3};"                                 \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// d += a * b, with elements of type T; float: tf32.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (sizeof(T) == 4) FASTRES_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  else if constexpr (std::is_same<T, __half>::value)
    FASTRES_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else FASTRES_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
#undef FASTRES_MMA

#else

template <bool kTurned> void load_matrices(uint32_t (&r)[4], const void* row,
                                           cuda_on_cpu::Site at = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::load_matrices<kTurned>("load_matrices", r, row, at);
}
inline uint32_t to_tf32(float v) { return cuda_on_cpu::to_tf32(v); }
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  cuda_on_cpu::Site at = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::multiply_add<T>("multiply_add", d, a, b0, b1, at);
}

#endif

}  // namespace fastres::gpu
