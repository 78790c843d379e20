// fibers: one block of CUDA threads on one CPU thread, each thread a fiber with its own stack.
//
// The blocks of a grid run one after the other. A thread runs until it waits for others, at a
// barrier or in a warp operation, or ends. Results, barriers and addresses are checked this way;
// speed, the memory model and races between blocks are not. An error ends the launch: it throws.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_CPU_ASAN(...) __VA_ARGS__
#else
#define CUDA_ON_CPU_ASAN(...)
#endif

#if !defined(__x86_64__)
#error "cuda_on_cpu switches stacks on x86-64 only"
#endif

// Saves the registers that a call preserves and the stack pointer, and loads another fiber's.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(.pushsection .text.cuda_on_cpu_switch,"axG",@progbits,cuda_on_cpu_switch,comdat
.weak cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi); movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret
.popsection)");

namespace cuda_on_cpu {

struct Options {
  uint64_t seed = 0;  // 0: blocks and threads in the order of their indices; else in random orders
  int64_t shared_bytes = 227 << 10;  // of dynamic shared memory, at most: those of an H200
};
inline Options options;

// A place in the kernel's source.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  std::string text() const { return std::string(" [") + file + ":" + std::to_string(line) + "]"; }
};

struct Context {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;   // the address sanitizer's
  const void* stack = nullptr;  // [size] bytes
  size_t size = 0;
};

constexpr size_t kStackBytes = 256 * 1024;  // 28 KiB are used at most under the address sanitizer
constexpr unsigned kMostThreads = 1024, kWarp = 32;

struct Copy {  // to shared memory, under way; `from` null: of zeros
  void* to;
  const void* from;
  unsigned bytes, group;
};

struct Fiber {
  Fiber();
  ~Fiber();
  Context context;
  std::vector<Copy> copies;
  unsigned groups = 0;  // of copies, so far
  bool waiting = false, exited = false;
  const char* what = nullptr;  // what it waits at, where, with which lanes (0: the whole block)
  Site at{};
  unsigned mask = 0;
  void* argument = nullptr;
  unsigned arrived = 0;  // how many wait in the warp that begins with this thread
};

struct Region {  // of shared memory
  char* data;
  size_t bytes;
};

// NaN as bfloat16 and as float16; two and four of it NaN as float32 and float64.
constexpr uint16_t kPoison = 0x7ff5;

inline void poison(void* data, size_t bytes) {
  for (size_t i = 0; i + 1 < bytes; i += 2) std::memcpy(static_cast<char*>(data) + i, &kPoison, 2);
}

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t(128)); }
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Region> shared;
  std::unique_ptr<char[], AlignedDelete> dynamic;  // shared memory of the launch's size
  size_t dynamic_bytes = 0;
  unsigned threads = 0, current = 0, exited = 0, arrived = 0;
  unsigned order[kMostThreads], rank[kMostThreads];  // who goes first; its inverse
  uint64_t ready[kMostThreads / 64] = {};            // by rank: who can run
  Context host;
  const std::function<void()>* kernel = nullptr;
  std::string name;
  uint64_t random = 1, count = 0;  // count: of all blocks so far
  std::string error;
};
inline Block block;

struct Index {
  unsigned x = 0, y = 0, z = 0;
  std::string text() const {
    return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
  }
};
inline Index thread_index, block_index, block_size, grid_size;

inline Fiber& self() { return *block.fibers[block.current]; }
inline unsigned lane() { return block.current % kWarp; }

inline Index index_of(unsigned thread) {
  return {thread % block_size.x, thread / block_size.x % block_size.y,
          thread / block_size.x / block_size.y};
}

inline void switch_to(Context& from, Context& to) {
  CUDA_ON_CPU_ASAN(__sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);)
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
  CUDA_ON_CPU_ASAN(Context unused; Context& last = &from == &block.host ? unused : block.host;
                   __sanitizer_finish_switch_fiber(from.fake_stack, &last.stack, &last.size);)
}

// Ends the launch; the threads of the block are left where they stand.
[[noreturn]] inline void fail(const char* what, const char* why, Site at) {
  block.error = "thread " + index_of(block.current).text() + ": " + what + why + at.text();
  switch_to(self().context, block.host);
  std::abort();
}

inline unsigned random_below(uint64_t n) {
  uint64_t& r = block.random;
  r ^= r << 13, r ^= r >> 7, r ^= r << 17;
  return unsigned(r % n);
}

inline void make_ready(unsigned thread) {
  const unsigned rank = block.rank[thread];
  block.ready[rank / 64] |= uint64_t(1) << rank % 64;
}

// Of the threads that can run, the first in `order` does: some get as far ahead of the others as
// barriers let them. With a seed each barrier draws a new order, of single threads or whole warps.
inline void draw_order() {
  const unsigned unit = options.seed && random_below(2) ? kWarp : 1;
  std::vector<unsigned> units((block.threads + unit - 1) / unit);
  std::iota(units.begin(), units.end(), 0u);
  for (size_t i = options.seed ? units.size() : 0; i > 1; --i)
    std::swap(units[i - 1], units[random_below(i)]);
  unsigned rank = 0;
  for (unsigned u : units)
    for (unsigned t = u * unit; t < (u + 1) * unit && t < block.threads; ++t)
      block.order[rank] = t, block.rank[t] = rank++;
}

// The threads that one meeting waits for: `size` of them from `first`, of which `mask` takes part.
struct Party {
  unsigned first, size, mask;  // mask 0: all
  bool has(unsigned i) const { return !mask || mask >> i & 1; }
  Fiber& fiber(unsigned i) const { return *block.fibers[first + i]; }
  bool complete(Site at) const {
    for (unsigned i = 0; i < size; ++i) {
      const Fiber& f = fiber(i);
      if (has(i) && !(f.waiting && f.mask == mask && f.at.line == at.line && f.at.file == at.file))
        return false;
    }
    return true;
  }
};

// Arguments of the lanes of a warp that meet, null where a lane takes no part.
using Lanes = void* const*;  // [32]

// What every barrier and warp operation stands on. The last thread to arrive runs `finish` over the
// arguments of all and releases them. mask 0 is the whole block. Threads that wait at different
// places of the source never meet: a divergent barrier ends as a deadlock, which run_block reports.
inline void meet(const char* what, unsigned mask, void* argument, void (*finish)(Lanes), Site at) {
  Fiber& me = self();
  const bool warp = mask != 0;
  if (warp && !(mask >> lane() & 1)) fail(what, ": lane not in its own mask", at);
  Party party{warp ? block.current & ~(kWarp - 1) : 0, block.threads, mask};
  if (warp) party.size = std::min(kWarp, block.threads - party.first);
  if (party.size < kWarp) party.mask = mask &= (1u << party.size) - 1;
  me.waiting = true, me.what = what, me.at = at, me.mask = mask, me.argument = argument;
  unsigned& arrived = warp ? party.fiber(0).arrived : block.arrived;
  const unsigned expected = warp ? unsigned(__builtin_popcount(mask)) : block.threads;
  if (++arrived < expected || !party.complete(at)) return switch_to(me.context, block.host);
  void* arguments[kWarp] = {};
  for (unsigned i = 0; finish && i < party.size; ++i)
    if (party.has(i)) arguments[i] = party.fiber(i).argument;
  if (finish) finish(arguments);
  if (!warp && options.seed) draw_order();
  for (unsigned i = 0; i < party.size; ++i) {
    if (!party.has(i)) continue;
    party.fiber(i).waiting = false, --arrived;
    if (options.seed || &party.fiber(i) != &me) make_ready(party.first + i);
  }
  if (options.seed) switch_to(me.context, block.host);
}

[[noreturn]] inline void fiber_main() {
  CUDA_ON_CPU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &block.host.stack, &block.host.size);)
  for (Fiber& me = self();; switch_to(me.context, block.host)) {
    (*block.kernel)();
    me.exited = true, ++block.exited;
  }
}

inline Fiber::Fiber() {
  void* base = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED || mprotect(base, 4096, PROT_NONE))
    throw std::bad_alloc();  // a guard page
  context.stack = base, context.size = kStackBytes;
  void** top = reinterpret_cast<void**>(static_cast<char*>(base) + kStackBytes);
  top[-2] = reinterpret_cast<void*>(&fiber_main);  // where the first switch returns to
  context.stack_pointer = top - 8;                 // below it six registers, above it 0: no caller
}
inline Fiber::~Fiber() {
  CUDA_ON_CPU_ASAN(__asan_unpoison_memory_region(context.stack, context.size);)
  munmap(const_cast<void*>(context.stack), context.size);
}

// Where the threads of a block that never ends are.
inline std::string deadlock() {
  std::map<std::string, std::pair<unsigned, unsigned>> groups;  // state -> first thread, how many
  for (unsigned t = 0; t < block.threads; ++t) {
    const Fiber& f = *block.fibers[t];
    char mask[32] = "";
    if (f.mask) std::snprintf(mask, sizeof mask, " (mask %08x)", f.mask);
    const std::string state =
        f.exited ? "exited" : std::string("at ") + f.what + mask + f.at.text();
    ++groups.insert({state, {t, 0}}).first->second.second;
  }
  std::string text = "deadlock";
  for (const auto& [state, who] : groups)
    text += "\n    " + std::to_string(who.second) + " threads " + state + ", first " +
            index_of(who.first).text();
  return text;
}

inline void run_block() {
  ++block.count, block.exited = block.arrived = 0, block.shared.clear();
  if (block.dynamic_bytes) block.shared.push_back({block.dynamic.get(), block.dynamic_bytes});
  for (const Region& region : block.shared) poison(region.data, region.bytes);
  draw_order();
  for (unsigned t = 0; t < block.threads; ++t) {
    Fiber& f = *block.fibers[t];
    f.waiting = f.exited = false, f.arrived = 0;
    f.copies.clear(), f.groups = 0;
    make_ready(t);
  }
  for (unsigned word = 0; word < kMostThreads / 64 && block.error.empty();) {
    if (!block.ready[word]) {
      ++word;
      continue;
    }
    block.current = block.order[word * 64 + unsigned(__builtin_ctzll(block.ready[word]))];
    block.ready[word] &= block.ready[word] - 1;
    thread_index = index_of(block.current);
    switch_to(block.host, self().context);
    word = 0;
  }
  if (block.error.empty() && block.exited == block.threads) return;
  const std::string error = block.error.empty() ? deadlock() : std::exchange(block.error, "");
  block.fibers.clear();  // their stacks are in the middle of the kernel
  std::fill(std::begin(block.ready), std::end(block.ready), 0);
  throw std::runtime_error(block.name + ": block " + block_index.text() + ": " + error);
}

// Runs kernel() once for each thread of each block of the grid.
inline void run_grid(const char* name, Index grid, Index threads,
                     const std::function<void()>& kernel, size_t shared_bytes = 0) {
  const uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (!count || count > kMostThreads || !blocks || grid.x >> 31 || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > size_t(options.shared_bytes))
    throw std::runtime_error(std::string(name) + ": invalid launch configuration");
  block.dynamic.reset(shared_bytes ? new (std::align_val_t(128)) char[shared_bytes]
                                   : nullptr);  // nothing beyond it
  block.dynamic_bytes = shared_bytes;
  grid_size = grid, block_size = threads;
  block.name = name, block.kernel = &kernel, block.threads = unsigned(count);
  block.random = options.seed * 0x9e3779b97f4a7c15u | 1;
  while (block.fibers.size() < count) block.fibers.push_back(std::make_unique<Fiber>());
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t(0));
  for (uint64_t i = options.seed ? blocks : 0; i > 1; --i)
    std::swap(order[i - 1], order[random_below(i)]);
  for (uint64_t b : order) {
    block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                   unsigned(b / grid.x / grid.y)};
    run_block();
  }
}

}  // namespace cuda_on_cpu
