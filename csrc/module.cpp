// module: the Python module fastres._C. Loading it registers the operators; it says what was built
// and what this CPU can do, and offers every op's CPU kernel on NumPy arrays.
#include "common/isa.h"
#include "common/numpy.h"

namespace {

#define FASTRES_TEXT_(...) #__VA_ARGS__
#define FASTRES_TEXT(...) FASTRES_TEXT_(__VA_ARGS__)

py::dict build_info() {
  py::list built;
  for (int i = 0; i < fastres::kIsasBuilt; ++i) built.append(fastres::kIsaNames[i]);
  py::dict info;
  info["compiler"] = FASTRES_COMPILER;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["isas_built"] = built;
  info["isa_in_use"] = fastres::kIsaNames[static_cast<int>(fastres::isa())];
  info["cuda_archs"] = FASTRES_TEXT(FASTRES_CUDA_ARCHS);
  info["torch_abi_target"] = FASTRES_TEXT(TORCH_TARGET_VERSION);
  info["built_with_torch"] = FASTRES_TEXT(FASTRES_BUILT_WITH_TORCH);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "fastres._C: the operators' CPU kernels";
  m.def("build_info", &build_info, "What was built, and what this CPU uses");
  for (const auto& define : fastres::numpy::Entry::all()) define(m);
}
