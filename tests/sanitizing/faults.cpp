// faults: calls of residual_add's kernel that are wrong, by which a sanitizer shows that it looks.
#include "../../csrc/common/numpy.h"
#include "../../csrc/residual_add/cpu.h"

#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace {

using namespace fastres::residual_add;

// One row of `cols` float32 in memory for `room` of them.
struct Call {
  std::unique_ptr<float[]> x, f, y;
  std::vector<float> sums = std::vector<float>(3);
  Args args;
  Call(int64_t room, int64_t cols)
      : x(new float[room]()),
        f(new float[room]()),
        y(new float[room]),
        args{x.get(), f.get(), nullptr, y.get(), sums.data(),
             nullptr, 0,       1,       cols,    fastres::Dtype::kFloat32,
             false} {}
  void run() const { forward_for_this_cpu()(args, nullptr, 0, 1); }
};

void past_the_end() { Call(40, 48).run(); }

void misaligned() {
  char gate[8] = {};
  Call call(16, 16);
  call.args.gate = gate + 1;
  call.run();
}

void race() {
  Call one(4096, 4096), other(4096, 4096);
  other.args.y = one.args.y;
  std::thread thread([&] { other.run(); });
  one.run();
  thread.join();
}

const fastres::numpy::Entry entry([](py::module_& m) {
  m.def("past_the_end", &past_the_end);
  m.def("misaligned", &misaligned);
  m.def("race", &race);
});

}  // namespace
