// Runs the Group-Mix ops through the CUDA kernels on the CPU. Each line of standard input is one case of
// key=value words; each answer is one line of JSON. Tensors go through files: their elements one tensor after
// the other.
//   op=evaluate|train|attention dtype=f64|f32|f16|bf16 parameters=... size=B,H,W,d input=PATH output=PATH
//   order=forward|reverse|random sms=... shared=... seed=... scale=... eps=... (both norms)
// evaluate and train read qkv, grad_mixed, grad_out (B, N, 5d; its last d channels are the gradient of
// local), depthwise 4, pointwise 4, norm weight 4, bias 4, mean 4, var 4, LayerNorm's weight and bias, and
// write mixed, local, mean, var, sums, grad_qkv, grads. attention reads mixed, local, grad_out, weights 3,
// biases 3 and writes out, grad_mixed, grads.
#include <cstdio>
#include <fstream>
#include <iostream>

#include "cuda/group_mix_run.h"
#include "executor.h"

namespace lkconv::cuda {
namespace {

using Memory = std::unique_ptr<unsigned char[]>;

// Hands out the input's tensors, each in memory of exactly its size.
class Input {
 public:
  explicit Input(const std::string& path) : file_(path, std::ios::binary) {}
  const void* next(int64_t count, DType dtype) {
    const size_t bytes = size_t(count * dtype_size(dtype));
    kept_.push_back(std::make_unique<unsigned char[]>(bytes));
    file_.read(reinterpret_cast<char*>(kept_.back().get()), std::streamsize(bytes));
    if (!file_) throw std::runtime_error("the input file is too short");
    return kept_.back().get();
  }
  template <size_t N>
  void next(ParameterView (&views)[N], const int64_t (&counts)[N], DType dtype) {
    for (size_t i = 0; i < N; ++i) views[i] = {next(counts[i], dtype), dtype};
  }

 private:
  std::ifstream file_;
  std::vector<Memory> kept_;
};

// Outputs full of NaN, written to the file in the order they were asked for.
class Output {
 public:
  void* next(int64_t count, DType dtype) {
    const size_t bytes = size_t(count * dtype_size(dtype));
    kept_.emplace_back(std::make_unique<unsigned char[]>(bytes), bytes);
    std::memset(kept_.back().first.get(), 0xff, bytes);
    return kept_.back().first.get();
  }
  void write(const std::string& path) const {
    std::ofstream file(path, std::ios::binary);
    for (const auto& [memory, bytes] : kept_)
      file.write(reinterpret_cast<const char*>(memory.get()), std::streamsize(bytes));
  }

 private:
  std::vector<std::pair<Memory, size_t>> kept_;
};

void run_aggregation(Executor& e, Words& words, Input& in, Output& out, const TokenSizes& s, DType dtype,
                     DType parameters) {
  const int64_t d = s.segment, n = s.batch * s.tokens();
  const DType wide = wide_type(dtype);
  const int64_t taps[4] = {d * 9, d * 25, d * 49, 3 * d * 9}, square[4] = {d * d, d * d, d * d, 3 * d * d};
  const int64_t rows[4] = {d, d, d, d}, two[2] = {d, d};
  AggregateCall c;
  c.sizes = s, c.dtype = dtype, c.eps = c.layer_norm_eps = std::stod(words["eps"]);
  c.qkv = in.next(n * 15 * d, dtype), c.grad_mixed = in.next(3 * n * 4 * d, dtype);
  c.grad_local = element(in.next(n * 5 * d, dtype), 4 * d, dtype), c.local_stride = 5 * d;
  in.next(c.depthwise, taps, parameters), in.next(c.pointwise, square, parameters);
  in.next(c.norm_weight, rows, parameters), in.next(c.norm_bias, rows, parameters);
  in.next(c.norm_mean, rows, parameters), in.next(c.norm_var, rows, parameters);
  in.next(c.layer_norm, two, parameters);
  c.mixed = out.next(3 * n * 4 * d, dtype), c.local = out.next(n * d, dtype);
  c.mean = out.next(4 * d, wide), c.var = out.next(4 * d, wide), c.sums = out.next(8 * d, DType::f64);
  Output kept;
  const bool train = words["op"] == "train";
  if (!train) run_aggregate(e, c);
  AggregateCall m = c;  // the backward pass of fixed statistics computes U again
  m.premix = kept.next(3 * n * 3 * d, dtype), m.prelocal = kept.next(n * d, dtype);
  if (!train) m.local = kept.next(n * d, dtype);
  m.mixed = nullptr;
  run_mix(e, m);
  c.premix = m.premix, c.prelocal = m.prelocal;
  for (int i = 0; train && i < 4; ++i) {
    c.norm_mean[i] = {element(c.mean, i * d, wide), wide};
    c.norm_var[i] = {element(c.var, i * d, wide), wide};
  }
  if (train) run_normalize(e, c);
  run_backward_reduce(e, c);
  c.grad_qkv = out.next(n * 15 * d, dtype);
  c.grads = out.next(d * (9 + 25 + 49 + 27) + 6 * d * d + 2 * d, wide);
  c.count = double(3 * n);
  if (!train) c.sums = nullptr;
  run_backward(e, c);
}

void run_core(Executor& e, Words& words, Input& in, Output& out, const TokenSizes& s, DType dtype,
              DType parameters) {
  const int64_t d = s.segment, n = s.batch * s.tokens(), head = d / 2;
  const DType wide = wide_type(dtype);
  const int64_t taps[3] = {2 * head * 9, 3 * head * 25, 3 * head * 49},
                channels[3] = {2 * head, 3 * head, 3 * head};
  AttentionCall c;
  c.sizes = s, c.dtype = dtype, c.scale = std::stod(words["scale"]);
  c.mixed = in.next(3 * n * 4 * d, dtype), c.local = in.next(n * d, dtype),
  c.grad_out = in.next(n * 5 * d, dtype);
  in.next(c.weight, taps, parameters), in.next(c.bias, channels, parameters);
  Output kept;
  c.out = out.next(n * 5 * d, dtype);
  c.log_sum = kept.next(s.batch * 4 * d, wide), c.context = kept.next(s.batch * 8 * head * head, wide);
  run_attention(e, c);
  c.grad_mixed = out.next(3 * n * 4 * d, dtype);
  c.grads = out.next(head * (2 * 9 + 3 * 25 + 3 * 49 + 8), wide);
  run_attention_backward(e, c);
}

std::string run_case(Words& words) {
  const auto size = numbers(words["size"]);
  const TokenSizes s{size[0], size[1], size[2], size[3]};
  const DType dtype = dtype_named(words["dtype"]), parameters = dtype_named(words["parameters"]);
  Executor e(words);
  Input in(words["input"]);
  Output out;
  (words["op"] == "attention" ? run_core : run_aggregation)(e, words, in, out, s, dtype, parameters);
  out.write(words["output"]);
  return "{\"ok\": true, \"launched\": \"" + e.launched + "\"}";
}

}  // namespace
}  // namespace lkconv::cuda

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    lkconv::cuda::Words words = lkconv::cuda::words_of(line, {{"order", "forward"},
                                                              {"parameters", "f32"},
                                                              {"sms", "1"},
                                                              {"shared", "232448"},
                                                              {"seed", "1"},
                                                              {"scale", "0.5"},
                                                              {"eps", "1e-5"}});
    try {
      std::cout << lkconv::cuda::run_case(words) << std::endl;
    } catch (const std::exception& error) {
      std::cout << "{\"ok\": false, \"error\": \"" << error.what() << "\"}" << std::endl;
      return 1;  // fibers of the failed launch still hold their stacks: do not go on
    }
  }
}
