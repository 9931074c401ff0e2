// What the pybind11 module needs of the CUDA launchers.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "planner.h"

namespace lkconv::cuda {

// Whether float32 convolutions may use tf32 now. The module asks torch's own switch; false until it is set.
void set_tf32_query(std::function<bool()> query);

Switches switches_from_environment();
// Those of the environment, and whether a convolution of this dtype may use tf32 now.
Switches switches_for(DType dtype);

struct KernelResources {
  std::string name;
  int registers, spilled_bytes, static_shared_bytes, max_threads, binary_version, ptx_version;
};
// Needs a GPU: resources as the driver loaded the kernels on the current device.
std::vector<KernelResources> kernel_resources();
std::vector<std::string> kernel_names();
Machine current_machine();
std::vector<std::string> compiled_architectures();
std::string toolkit_version();

}  // namespace lkconv::cuda
