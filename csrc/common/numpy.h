// numpy: an op's CPU kernel on NumPy arrays, zero copy; and the list by which module.cpp finds
// every op's entry.
#pragma once
// torch 2.11 takes its copy of pybind11, which sees nothing of torch, for one of torch's own
// headers, and refuses it where TORCH_TARGET_VERSION is defined.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <functional>
#include <string>
#include <vector>

#include "dtype.h"

namespace py = pybind11;

namespace fastres::numpy {

// A static Entry in an op.cpp adds that op's functions to the module.
struct Entry {
  using Define = std::function<void(py::module_&)>;
  explicit Entry(Define define) { all().push_back(std::move(define)); }
  static std::vector<Define>& all() {
    static std::vector<Define> entries;
    return entries;
  }
};

inline std::string text_of(const py::object& value) { return py::str(value); }

inline std::string message(const char* op, const char* argument, const std::string& rule,
                           const py::object& got) {
  return std::string(op) + ": " + argument + " must " + rule + ", got " + text_of(got);
}

inline py::array as_array(const char* op, const char* argument, const py::object& given) {
  if (!py::isinstance<py::array>(given))
    throw py::type_error(message(op, argument, "be a NumPy array", py::type::of(given)));
  return py::reinterpret_borrow<py::array>(given);
}

// The array is float64, float32 or float16, C-contiguous, of 2 or more dimensions.
inline Dtype check_array(const char* op, const char* argument, const py::array& a) {
  const char kind = a.dtype().kind();
  const auto size = a.itemsize();
  if (kind != 'f' || (size != 8 && size != 4 && size != 2) || a.dtype().byteorder() == '>')
    throw py::type_error(message(op, argument, "be float64, float32 or float16", a.dtype()));
  if (a.ndim() < 2)
    throw py::value_error(message(op, argument, "have 2 or more dimensions", py::int_(a.ndim())));
  if (!(a.flags() & py::array::c_style))
    throw py::value_error(message(op, argument, "be C-contiguous", a.attr("strides")));
  return size == 8 ? Dtype::kFloat64 : size == 4 ? Dtype::kFloat32 : Dtype::kFloat16;
}

inline void check_like(const char* op, const char* argument, const py::array& a,
                       const py::array& like) {
  if (!a.dtype().is(like.dtype()) && !a.dtype().equal(like.dtype()))
    throw py::type_error(message(op, argument, "have dtype " + text_of(like.dtype()), a.dtype()));
  if (!a.attr("shape").equal(like.attr("shape")))
    throw py::value_error(
        message(op, argument, "have shape " + text_of(like.attr("shape")), a.attr("shape")));
  check_array(op, argument, a);
}

inline py::dtype accumulate_type(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? py::dtype::of<double>() : py::dtype::of<float>();
}

inline void check_vector(const char* op, const char* argument, const py::array& a, int64_t size,
                         const py::dtype& type) {
  if (!a.dtype().equal(type))
    throw py::type_error(message(op, argument, "have dtype " + text_of(type), a.dtype()));
  if (a.ndim() != 1 || a.shape(0) != size)
    throw py::value_error(
        message(op, argument, "have shape (" + std::to_string(size) + ",)", a.attr("shape")));
  if (!(a.flags() & py::array::c_style))
    throw py::value_error(message(op, argument, "be C-contiguous", a.attr("strides")));
}

inline py::array empty_like(const py::array& a) {
  return py::array(a.dtype(), std::vector<py::ssize_t>(a.shape(), a.shape() + a.ndim()));
}

}  // namespace fastres::numpy
