// Instantiates the direct and packing kernels.
#include "direct_weight.cuh"
#include "kernels.h"
#include "pack.cuh"

namespace lkconv::cuda {
namespace {

template <class T>
Kernel<DirectForwardParams> forward_of(int width_class) {
  switch (width_class) {
    case kThreeStride2:
      return direct_forward<T, kThreeStride2>;
    case kStrided:
      return direct_forward<T, kStrided>;
    case kAnyWidth:
      return direct_forward<T, kAnyWidth>;
    case 3:
      return direct_forward<T, 3>;
    case 5:
      return direct_forward<T, 5>;
    case 7:
      return direct_forward<T, 7>;
    default:
      return nullptr;
  }
}

// float64 serves gradient checks: two kernels do.
template <>
Kernel<DirectForwardParams> forward_of<double>(int width_class) {
  return width_class == kStrided ? direct_forward<double, kStrided> : direct_forward<double, kAnyWidth>;
}

template <class T>
Kernel<DirectWeightParams> weight_of(bool unit) {
  return unit ? direct_weight<T, true> : direct_weight<T, false>;
}

const char* const kDTypes[] = {"float64", "float32", "float16", "bfloat16"};

}  // namespace

Kernel<DirectForwardParams> direct_forward_kernel(DType dtype, int width_class) {
  switch (dtype) {
    case DType::f64:
      return forward_of<double>(width_class);
    case DType::f32:
      return forward_of<float>(width_class);
    case DType::f16:
      return forward_of<Half>(width_class);
    case DType::bf16:
      return forward_of<BFloat>(width_class);
  }
  return nullptr;
}

Kernel<DirectWeightParams> direct_weight_kernel(DType dtype, bool unit) {
  switch (dtype) {
    case DType::f64:
      return weight_of<double>(unit);
    case DType::f32:
      return weight_of<float>(unit);
    case DType::f16:
      return weight_of<Half>(unit);
    case DType::bf16:
      return weight_of<BFloat>(unit);
  }
  return nullptr;
}

Kernel<ReduceSplitsParams> reduce_splits_kernel(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return reduce_splits<double>;
    case DType::f32:
      return reduce_splits<float>;
    case DType::f16:
      return reduce_splits<Half>;
    case DType::bf16:
      return reduce_splits<BFloat>;
  }
  return nullptr;
}

Kernel<PackParams> pack_kernel(DType dtype) {
  return dtype == DType::f64 ? pack<uint64_t> : dtype == DType::f32 ? pack<uint32_t> : pack<uint16_t>;
}

void append_direct_kernels(std::vector<KernelName>& names) {
  const auto add = [&](const std::string& name, auto kernel) {
    names.push_back({name, reinterpret_cast<const void*>(kernel)});
  };
  for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16}) {
    const std::string type = std::string("<") + kDTypes[int(dtype)];
    for (const int width : {int(kThreeStride2), int(kStrided), int(kAnyWidth), 3, 5, 7}) {
      if (dtype == DType::f64 && is_fixed(width)) continue;
      const std::string name = width == kThreeStride2 ? "3 stride 2"
                               : width == kStrided    ? "strided"
                               : width == kAnyWidth   ? "any"
                                                      : std::to_string(width);
      add("direct_forward" + type + ", " + name + ">", direct_forward_kernel(dtype, width));
    }
    for (const bool unit : {true, false})
      add("direct_weight" + type + (unit ? ", unit>" : ", strided>"), direct_weight_kernel(dtype, unit));
    add("reduce_splits" + type + ">", reduce_splits_kernel(dtype));
    if (dtype != DType::bf16) add("pack<" + std::to_string(8 * dtype_size(dtype)) + ">", pack_kernel(dtype));
  }
}

}  // namespace lkconv::cuda
