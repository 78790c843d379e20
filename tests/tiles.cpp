// Tiles for ctypes: their functions, the activations of stacks, and 16-bit elements, on arrays of
// whole tiles.
#include "../csrc/common/activation.h"
#include "../csrc/common/tile_math.h"

namespace {

using namespace fastres;

template <class A, class F> void each(const A* in, A* out, int64_t count, const F& f) {
  using namespace fastres::FASTRES_ISA;
  for (int64_t i = 0; i < count; i += kLanes) Stored<A>::store(out + i, f(Stored<A>::load(in + i)));
}

template <class A> void function(int which, const A* in, A* out, int64_t count) {
  using M = Math<FASTRES_ISA::Tile<A>>;
  if (which == 0) each(in, out, count, M::exp);
  if (which == 1) each(in, out, count, M::tanh);
  if (which == 2) each(in, out, count, M::erf);
}

template <class A>
void activation(int which, const A* in, A* value_out, A* derivative_out, int64_t count) {
  pick_activation(static_cast<Activation>(which), [&](auto picked) {
    constexpr auto kActivation = decltype(picked)::value;
    each(in, value_out, count, [](const auto& t) { return value<kActivation>(t); });
    each(in, derivative_out, count, [](const auto& t) { return derivative<kActivation>(t); });
    return 0;
  });
}

template <class From, class To> void convert(const void* given, void* out, int64_t count) {
  using namespace fastres::FASTRES_ISA;
  for (int64_t i = 0; i < count; i += kLanes)
    Stored<To>::store(in<To>(out, i), Stored<From>::load(in<From>(given, i)));
}

}  // namespace

extern "C" {
void function32(int which, const float* in, float* out, int64_t count) {
  function(which, in, out, count);
}
void function64(int which, const double* in, double* out, int64_t count) {
  function(which, in, out, count);
}
void activation32(int which, const float* in, float* value, float* derivative, int64_t count) {
  activation(which, in, value, derivative, count);
}
void activation64(int which, const double* in, double* value, double* derivative, int64_t count) {
  activation(which, in, value, derivative, count);
}
void widen(int is_bfloat16, const void* in, float* out, int64_t count) {
  using namespace fastres::FASTRES_ISA;
  (is_bfloat16 ? convert<BFloat16, float> : convert<Float16, float>)(in, out, count);
}
void narrow(int is_bfloat16, const float* in, void* out, int64_t count) {
  using namespace fastres::FASTRES_ISA;
  (is_bfloat16 ? convert<float, BFloat16> : convert<float, Float16>)(in, out, count);
}
}
