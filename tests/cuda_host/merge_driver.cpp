// Runs the CUDA kernels that fold branch kernels on the CPU. Each line of standard input names a problem file
// and a file for the results; each answer is one line of JSON. A problem file holds 64-bit integers and the
// bytes of tensors, as tests/test_cuda_host_merge.py writes them:
//   backward order seed wide channels kernel_h kernel_w, kernel, bias, branches, per branch (kernel_h
//   kernel_w offset_h offset_w step_h step_w, weight, scale), biases, per bias (vector)
// A tensor is dtype (-1: absent), bytes, offset in elements, number of strides, strides, then its memory. The
// results are those of the op, in its order, without gaps.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <vector>

#include "cuda/merge_run.h"
#include "cuda_shim.h"

namespace lkconv::cuda {
namespace {

using Bytes = std::unique_ptr<unsigned char[]>;

// Memory of exactly as many bytes as asked for, full of NaN.
Bytes poisoned(int64_t bytes) {
  Bytes memory = std::make_unique<unsigned char[]>(size_t(bytes));
  std::memset(memory.get(), 0xff, size_t(bytes));
  return memory;
}

struct Executor {
  shim::Schedule schedule;
  std::vector<Bytes> memory;
  int launches = 0;

  void* workspace(int64_t bytes) {
    memory.push_back(poisoned(bytes));
    return memory.back().get();
  }

  template <class P>
  void launch(const char*, Kernel<P> kernel, const LaunchShape& s, const P& params) {
    ++launches;
    shim::run_grid({unsigned(s.blocks), 1, 1}, {unsigned(s.threads), 1, 1}, size_t(s.shared_bytes), schedule,
                   [&] { kernel(params); });
  }
};

class Problem {
 public:
  explicit Problem(const std::string& path) : file_(path, std::ios::binary) {
    backward = number();
    order = number(), seed = uint64_t(number());
    m.wide = number();
    m.channels = number(), m.kernel_h = number(), m.kernel_w = number();
    m.kernel = plane(), m.bias = vector();
    for (int64_t b = number(); b > 0; --b) {
      MergeBranch branch{};
      for (int64_t* to : {&branch.kernel_h, &branch.kernel_w, &branch.offset_h, &branch.offset_w,
                          &branch.step_h, &branch.step_w})
        *to = number();
      branch.weight = plane(), branch.scale = vector();
      branches_.push_back(branch);
    }
    for (int64_t j = number(); j > 0; --j) biases_.push_back(vector());
    m.branches = branches_.data(), m.branch_count = int64_t(branches_.size());
    m.biases = biases_.data(), m.bias_count = int64_t(biases_.size());
  }

  // Outputs take the place of the fold's results, or of what the adjoint writes.
  void allocate() {
    if (!backward) {
      m.kernel.data = output(m.channels * m.taps(), m.kernel.dtype);
      m.bias.data = output(m.channels, m.bias.dtype), m.bias.stride = 1;
      return;
    }
    for (MergeBranch& b : branches_)
      b.grad_weight = output(m.channels * b.kernel_h * b.kernel_w, b.weight.dtype);
    for (MergeBranch& b : branches_)
      if (b.scale.data) b.grad_scale = {output(m.channels, b.scale.dtype), b.scale.dtype, 1};
    for (ChannelVector& bias : biases_) bias = {output(m.channels, bias.dtype), bias.dtype, 1};
  }

  void write(const std::string& path) const {
    std::ofstream file(path, std::ios::binary);
    for (size_t i = 0; i < outputs_.size(); ++i)
      file.write(reinterpret_cast<const char*>(outputs_[i].get()), sizes_[i]);
  }

  MergeProblem m{};
  int64_t backward, order;
  uint64_t seed;

 private:
  int64_t number() {
    int64_t n = 0;
    if (!file_.read(reinterpret_cast<char*>(&n), sizeof n)) throw std::runtime_error("short problem file");
    return n;
  }

  TensorView plane() {
    const int64_t dtype = number();
    if (dtype < 0) return {};
    const int64_t bytes = number(), offset = number();
    int64_t strides[4] = {};
    for (int64_t i = 0, n = number(); i < n; ++i) strides[i] = number();
    memory_.push_back(poisoned(bytes));
    file_.read(reinterpret_cast<char*>(memory_.back().get()), bytes);
    return {memory_.back().get() + offset * dtype_size(DType(dtype)),
            DType(dtype),
            0,
            strides[0],
            strides[1],
            strides[2]};
  }

  ChannelVector vector() {
    const TensorView v = plane();
    return {v.data, v.dtype, v.stride_c};
  }

  void* output(int64_t count, DType dtype) {
    sizes_.push_back(count * dtype_size(dtype));
    outputs_.push_back(poisoned(sizes_.back()));
    return outputs_.back().get();
  }

  std::ifstream file_;
  std::vector<MergeBranch> branches_;
  std::vector<ChannelVector> biases_;
  std::vector<Bytes> memory_, outputs_;
  std::vector<int64_t> sizes_;
};

int run_file(const std::string& problem, const std::string& results) {
  Problem p(problem);
  p.allocate();
  Executor e;
  e.schedule = {shim::Order(p.order), p.seed};
  run_merge(e, p.m, p.backward != 0);
  p.write(results);
  return e.launches;
}

}  // namespace
}  // namespace lkconv::cuda

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::stringstream s(line);
    std::string problem, results;
    s >> problem >> results;
    try {
      std::cout << "{\"launches\": " << lkconv::cuda::run_file(problem, results) << "}" << std::endl;
    } catch (const std::exception& error) {
      std::cout << "{\"error\": \"" << error.what() << "\"}" << std::endl;
      return 1;  // fibers of the failed launch still hold their stacks: do not go on
    }
  }
}
