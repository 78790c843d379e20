// mlp_stack_paths on the CPU: picks the kernels for the dtype.
#include "cpu_lengths.h"

namespace fastres::mlp_stack_paths::FASTRES_ISA {
namespace {

template <class Body> void with_element(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat64) body(double());
  else body(float());
}

}  // namespace

void derivatives(const Args& a, int64_t first, int64_t last, void* buffer) {
  with_element(a.shape.dtype, [&](auto element) {
    using A = decltype(element);
    int64_t group = first;
    for (; group + kWide<A> <= last; group += kWide<A>)
      derive_groups<A, kWide<A>>(a, group, kWide<A>, buffer);
    for (; group < last; ++group) derive_groups<A, 1>(a, group, 1, buffer);
  });
}

void lengths(const Args& a, int64_t sample, int64_t samples, void* buffer) {
  with_element(a.shape.dtype,
               [&](auto element) { Lengths<decltype(element)>(a, sample, samples, buffer).run(); });
}

}  // namespace fastres::mlp_stack_paths::FASTRES_ISA
