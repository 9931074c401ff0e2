// Instantiates the Toeplitz kernels.
#include "kernels.h"
#include "toeplitz_weight.cuh"

namespace lkconv::cuda {
namespace {

template <class T>
Kernel<ToeplitzForwardParams> forward_of(int m_tiles, int n_tiles) {
  if (m_tiles == 1) return n_tiles == 2 ? toeplitz_forward<T, 1, 2> : toeplitz_forward<T, 1, 4>;
  return n_tiles == 2 ? toeplitz_forward<T, 4, 2> : toeplitz_forward<T, 4, 4>;
}

template <class T>
Kernel<ToeplitzWeightParams> weight_of(int diagonals) {
  return diagonals == 4 ? toeplitz_weight<T, 4, toeplitz_weight_rows(4)>
                        : toeplitz_weight<T, 7, toeplitz_weight_rows(7)>;
}

}  // namespace

Kernel<ToeplitzForwardParams> toeplitz_forward_kernel(DType dtype, int m_tiles, int n_tiles) {
  switch (dtype) {
    case DType::f32:
      return forward_of<float>(m_tiles, n_tiles);
    case DType::f16:
      return forward_of<Half>(m_tiles, n_tiles);
    case DType::bf16:
      return forward_of<BFloat>(m_tiles, n_tiles);
    default:
      return nullptr;
  }
}

Kernel<ToeplitzWeightParams> toeplitz_weight_kernel(DType dtype, int diagonals) {
  switch (dtype) {
    case DType::f32:
      return weight_of<float>(diagonals);
    case DType::f16:
      return weight_of<Half>(diagonals);
    case DType::bf16:
      return weight_of<BFloat>(diagonals);
    default:
      return nullptr;
  }
}

void append_toeplitz_kernels(std::vector<KernelName>& names) {
  const char* const types[] = {"", "tf32", "float16", "bfloat16"};
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const std::string type = std::string("<") + types[int(dtype)] + ", ";
    for (const int m : {1, 4})
      for (const int n : {2, 4})
        names.push_back({"toeplitz_forward" + type + std::to_string(m) + "x" + std::to_string(n) + ">",
                         reinterpret_cast<const void*>(toeplitz_forward_kernel(dtype, m, n))});
    for (const int d : {4, 7})
      names.push_back({"toeplitz_weight" + type + std::to_string(d) + ">",
                       reinterpret_cast<const void*>(toeplitz_weight_kernel(dtype, d))});
  }
}

}  // namespace lkconv::cuda
