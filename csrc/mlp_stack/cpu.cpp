// mlp_stack on the CPU: picks the kernel for the dtype and the number of samples.
#include "cpu_few_down.h"
#include "cpu_forward.h"
#include "cpu_pairs_down.h"
#include "cpu_pairs_up.h"

namespace fastres::mlp_stack::FASTRES_ISA {
namespace {

// Runs a Pass (Forward, Chain) with as many tiles side by side as the batch fills.
template <template <class, int> class Pass, class Args, class How>
void run(const Args& a, int64_t row, int64_t rows, void* buffer, int members, const How& how) {
  visit_stored(a.shape.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kTiles = kWide<typename Stored<T>::A>;
    if (kTiles == 2 && a.shape.batch > kLanes)
      Pass<T, kTiles>(a, row, rows, buffer, members).run(how);
    else Pass<T, 1>(a, row, rows, buffer, members).run(how);
  });
}

void run_forward(const Args& a, int64_t row, int64_t rows, void* buffer, Member* member) {
  const int64_t batch = a.shape.batch;
  const int members = member ? member->wanted : 1;
#if defined(FASTRES_PAIRS)
  if (in_pairs(a.shape)) {
    if (rows > kLanes) return ForwardInPairs<2>(a, row, rows, buffer, members).run(member);
    return ForwardInPairs<1>(a, row, rows, buffer, members).run(member);
  }
#endif
  if (!are_few(a.shape)) return run<Forward>(a, row, rows, buffer, members, member);
  visit_stored(a.shape.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr bool kSeveral = kWide<typename Stored<T>::A> > 1;  // groups find registers
    if (batch == 1) Few<T, 1, 1>(a, row, rows, buffer, members).run(member);
    else if (rows > 2 * kFour)
      Few<T, kFour, kSeveral ? 4 : 1>(a, row, rows, buffer, members).run(member);
    else if (rows > kFour)
      Few<T, kFour, kSeveral ? 2 : 1>(a, row, rows, buffer, members).run(member);
    else Few<T, kFour, 1>(a, row, rows, buffer, members).run(member);
  });
}

void run_chain(const BackwardArgs& a, int64_t row, int64_t rows, void* buffer, Member* member) {
  const int members = member ? member->wanted : 1;
#if defined(FASTRES_PAIRS)
  if (in_pairs_down(a.shape)) return ChainInPairs(a, row, rows, buffer, members).run(member);
#endif
  if (!are_few_down(a.shape)) return run<Chain>(a, row, rows, buffer, members, member);
  visit_stored(a.shape.dtype,
               [&](auto t) { FewChain<decltype(t)>(a, buffer, members).run(member); });
}

template <class T, class Sum, class From>
void run_tasks(const BackwardArgs& a, const From& left, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) weight_task<T, Sum>(a, left, rows, task);
}

}  // namespace

void forward(const Args& a, int64_t row, int64_t rows, void* buffer) {
  run_forward(a, row, rows, buffer, nullptr);
}
void forward_together(const Args& a, void* buffer, Team& team, int wanted) {
  Member member(team, wanted);
  run_forward(a, 0, a.shape.batch, buffer, &member);
}

void chain(const BackwardArgs& a, int64_t row, int64_t rows, void* buffer) {
  run_chain(a, row, rows, buffer, static_cast<Member*>(nullptr));
}
void chain_in_turn(const BackwardArgs& a, int64_t row, int64_t rows, void* buffer,
                   const Turn& turn) {
  run<Chain>(a, row, rows, buffer, 1, turn);
}
void chain_together(const BackwardArgs& a, void* buffer, Team& team, int wanted) {
  Member member(team, wanted);
  run_chain(a, 0, a.shape.batch, buffer, &member);
}

void weights(const BackwardArgs& a, int64_t rows, int64_t begin, int64_t end) {
#if defined(FASTRES_PAIRS)
  if (in_pairs_down(a.shape)) {
    const AmxTiles registers;
    const Left<BFloat16> left(a.shape, a.scratch, true);
    return run_tasks<BFloat16, WeightRowsInPairs>(a, left, rows, begin, end);
  }
#endif
  visit_stored(a.shape.dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Stored<T>::A;
    if (are_few_down(a.shape))
      run_tasks<T, FewWeightRows<A>>(a, FewLeft<A>(a.shape, a.scratch), rows, begin, end);
    else run_tasks<T, WeightRows<A>>(a, Left<A>(a.shape, a.scratch, true), rows, begin, end);
  });
}

}  // namespace fastres::mlp_stack::FASTRES_ISA
