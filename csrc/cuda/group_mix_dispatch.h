// Picks a kernel's instantiation.
#pragma once

#include <string>
#include <type_traits>

#include "device.cuh"
#include "group_mix_kernels.h"

namespace lkconv::cuda {

inline constexpr DType kTensorTypes[] = {DType::f64, DType::f32, DType::f16, DType::bf16};
inline constexpr DType kWideTypes[] = {DType::f64, DType::f32};
inline constexpr int kWindows[] = {3, 5, 7};

// choose(a value of the type that `dtype` names)
template <class Choose>
auto by_dtype(DType dtype, Choose choose) {
  switch (dtype) {
    case DType::f64:
      return choose(double());
    case DType::f32:
      return choose(float());
    case DType::f16:
      return choose(Half());
    case DType::bf16:
      return choose(BFloat());
  }
  return decltype(choose(float()))(nullptr);
}

template <class Choose>
auto by_wide(DType dtype, Choose choose) {
  return dtype == DType::f64 ? choose(double()) : choose(float());
}

// choose(the window's size as a constant)
template <class Choose>
auto by_window(int window, Choose choose) {
  return window == 3   ? choose(std::integral_constant<int, 3>())
         : window == 5 ? choose(std::integral_constant<int, 5>())
                       : choose(std::integral_constant<int, 7>());
}

inline const char* dtype_text(DType dtype) {
  const char* const names[] = {"float64", "float32", "float16", "bfloat16"};
  return names[int(dtype)];
}

template <class K>
void append_kernel(std::vector<KernelName>& names, const std::string& name, DType dtype, K kernel,
                   int window = 0) {
  const std::string more = window ? ", " + std::to_string(window) : "";
  names.push_back({name + "<" + dtype_text(dtype) + more + ">", reinterpret_cast<const void*>(kernel)});
}

}  // namespace lkconv::cuda
