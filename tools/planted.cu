// planted: one error for each tool of compute-sanitizer, so that a tool that finds nothing is noticed.
#include <cstring>

namespace fastres {  // the tools watch kernels of this name only

__global__ void memcheck(float* out /* [64] */) { out[4096 + threadIdx.x] = 1.0f; }

__global__ void racecheck(float* out /* [64] */) {
  __shared__ float shared[64];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[63 - threadIdx.x];  // no barrier: the other warp may not have written
}

__global__ void initcheck(float* out /* [64] */) { out[threadIdx.x] += 1.0f; }  // never written before

__global__ void synccheck(float* out /* [64] */) {
  if (threadIdx.x < 40) {
    out[threadIdx.x] = 1.0f;
    __syncthreads();  // not reached by all threads of the block
    out[threadIdx.x] += out[39 - threadIdx.x];
  }
}

}  // namespace fastres

int main(int count, char** arguments) {
  float* out = nullptr;
  if (count != 2 || cudaMalloc(&out, 64 * sizeof(float)) != cudaSuccess) return 2;
  const auto is = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  if (is("memcheck")) fastres::memcheck<<<1, 64>>>(out);
  if (is("racecheck")) fastres::racecheck<<<1, 64>>>(out);
  if (is("initcheck")) fastres::initcheck<<<1, 64>>>(out);
  if (is("synccheck")) fastres::synccheck<<<1, 64>>>(out);
  cudaDeviceSynchronize();
  return 0;  // the tool alone decides how this ends
}
