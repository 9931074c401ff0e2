// Defines what allocation.h declares. Included once in each extension module, by its module.cpp: the other
// sources do without pybind11.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "allocation.h"

namespace py = pybind11;

namespace lkconv {
namespace {

using torch::headeronly::ScalarType;

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "uint8";  // workspaces are counted in bytes
  }
}

// A Python exception on its way through torch's dispatcher. torch lets pybind11's own exceptions pass, and
// pybind11 calls set_error() where the exception reaches Python; code that knows neither sees the message.
class PythonError : public py::builtin_exception {
 public:
  explicit PythonError(const py::object& error)
      : py::builtin_exception(std::string(py::str(error))),
        error_(error.inc_ref().ptr(), [](PyObject* object) {
          const py::gil_scoped_acquire gil;
          Py_DECREF(object);
        }) {}

  void set_error() const override {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error_.get())), error_.get());
  }

 private:
  std::shared_ptr<PyObject> error_;
};

}  // namespace

void throw_error_of_empty(const std::vector<int64_t>& sizes, ScalarType dtype,
                          const torch::stable::Tensor& like) {
  const py::gil_scoped_acquire gil;
  try {
    const py::module_ torch = py::module_::import("torch");
    const std::string device = like.is_cuda() ? "cuda:" + std::to_string(like.get_device_index()) : "cpu";
    torch.attr("empty")(sizes, py::arg("dtype") = torch.attr(dtype_name(dtype)), py::arg("device") = device);
  } catch (const py::error_already_set& error) {
    throw PythonError(error.value());
  }
}

}  // namespace lkconv
