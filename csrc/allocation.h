// New tensors. The stable ABI reports a failed allocation as a std::runtime_error, before torch 2.13 without
// torch's message; here it becomes the error that torch raises in Python, such as torch.OutOfMemoryError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <exception>
#include <optional>
#include <vector>

namespace lkconv {

// Throws the error that torch.empty(sizes, dtype, device of `like`) raises in Python; returns if it raises
// none. Takes the GIL.
void throw_error_of_empty(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype,
                          const torch::stable::Tensor& like);

// The result of `allocate`, which makes one tensor of these sizes. What fails is asked for once more through
// Python, whose error is kept; memory that was freed meanwhile serves the last attempt.
template <class Allocate>
torch::stable::Tensor allocated(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype,
                                const torch::stable::Tensor& like, Allocate allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    throw_error_of_empty(sizes, dtype, like);
  }
  return allocate();
}

inline torch::stable::Tensor empty_tensor(const std::vector<int64_t>& sizes,
                                          torch::headeronly::ScalarType dtype,
                                          const torch::stable::Tensor& like,
                                          std::optional<torch::headeronly::MemoryFormat> format) {
  return allocated(sizes, dtype, like, [&] {
    const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
    return torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, format);
  });
}

inline torch::stable::Tensor contiguous_tensor(const torch::stable::Tensor& t) {
  if (t.is_contiguous()) return t;
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return allocated(sizes, t.scalar_type(), t, [&] { return torch::stable::contiguous(t); });
}

}  // namespace lkconv
