// The pybind11 module lkconv._C: op schemas (declared here, once) and introspection for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "allocation_error.h"
#include "cpu/depthwise_conv2d.h"
#include "cpu/normalised_branches.h"

namespace py = pybind11;

STABLE_TORCH_LIBRARY(lkconv, m) {
  m.def(
      "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation) -> Tensor");
  m.def(
      "depthwise_conv2d_backward_input(Tensor grad_output, Tensor weight, SymInt[] input_size, SymInt[] "
      "stride, "
      "SymInt[] padding, SymInt[] dilation) -> Tensor");
  m.def(
      "depthwise_conv2d_backward_weight(Tensor grad_output, Tensor input, SymInt[] kernel_size, SymInt[] "
      "stride, "
      "SymInt[] padding, SymInt[] dilation) -> Tensor");
  // Stride 1 and "same" padding on slices of the channels, one per weight; without a weight it is copied.
  m.def(
      "segmented_depthwise_conv2d(Tensor input, Tensor?[] weights, Tensor?[] biases, SymInt[] splits) -> "
      "Tensor");
  // (kernel (C*m, 1, *kernel_size), bias (C*m,)): the sum of all branches, tap u of branch b at offset + u
  // step. `offset` and `step` have two elements per weight; `scales` is empty or has one (C*m,) per weight.
  m.def(
      "merge_depthwise_kernels(Tensor[] weights, Tensor[] scales, Tensor[] biases, SymInt[] kernel_size, "
      "SymInt[] offset, SymInt[] step, ScalarType dtype) -> (Tensor, Tensor)");
  // Its adjoint: gradients of weights, scales and biases. Of `biases` only the dtypes matter.
  m.def(
      "merge_depthwise_kernels_backward(Tensor grad_weight, Tensor grad_bias, Tensor[] weights, Tensor[] "
      "scales, Tensor[] biases, SymInt[] offset, SymInt[] step) -> (Tensor[], Tensor[], Tensor[])");
  // shift[c] + sum_b scales[b, c] inputs[b], in one pass over all of them.
  m.def("scaled_channel_sum(Tensor[] inputs, Tensor scales, Tensor shift) -> Tensor");
  // Branches y_b of a sum: one for each weight, the input itself (`identity`), and tensors given. Outputs of
  // the first kind are kept in a form of their own; (outputs, means (B, C), biased variances (B, C)).
  m.def(
      "normalised_branches(Tensor input, Tensor[] weights, Tensor[] given, SymInt[] padding, SymInt[] "
      "dilation, "
      "bool identity) -> (Tensor, Tensor, Tensor)");
  // sum_b scales_b y_b + shift.
  m.def(
      "normalised_branches_sum(Tensor input, Tensor outputs, Tensor[] given, bool identity, Tensor scales, "
      "Tensor shift) -> Tensor");
  // (sum of grad_output (C,), sums of grad_output (y_b - means_b) (B, C)).
  m.def(
      "normalised_branches_dots(Tensor grad_output, Tensor input, Tensor outputs, Tensor[] given, bool "
      "identity, "
      "Tensor means) -> (Tensor, Tensor)");
  // Gradients of input, weights and tensors given, for scales_b grad_output + slopes_b y_b + constants_b at
  // y_b.
  m.def(
      "normalised_branches_backward(Tensor grad_output, Tensor input, Tensor outputs, Tensor[] weights, "
      "Tensor[] "
      "given, SymInt[] padding, SymInt[] dilation, bool identity, Tensor scales, Tensor slopes, Tensor "
      "constants) "
      "-> (Tensor, Tensor[], Tensor[])");
}

namespace lkconv {
namespace {

using cpu::Candidate;
using cpu::Isa;

template <class E, size_t N>
E parse(const std::string& name, const char* what, const std::pair<const char*, E> (&table)[N]) {
  for (const auto& [key, value] : table)
    if (name == key) return value;
  throw std::invalid_argument("unknown " + std::string(what) + " " + name);
}

Isa parse_isa(const std::string& name) {
  return parse<Isa>(
      name, "isa",
      {{"baseline", Isa::baseline}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}, {"amx", Isa::amx}});
}

cpu::Algorithm parse_algorithm(const std::string& name) {
  using cpu::Algorithm;
  return parse<Algorithm>(name, "algorithm",
                          {{"direct", Algorithm::direct},
                           {"planar", Algorithm::planar},
                           {"fft", Algorithm::fft},
                           {"toeplitz", Algorithm::toeplitz},
                           {"aten", Algorithm::aten}});
}

DType parse_dtype(const std::string& name) {
  return parse<DType>(
      name, "dtype",
      {{"float64", DType::f64}, {"float32", DType::f32}, {"float16", DType::f16}, {"bfloat16", DType::bf16}});
}

using Pair = std::array<int64_t, 2>;

ConvParams conv_params(const std::array<int64_t, 4>& size, int64_t out_channels, const Pair& kernel,
                       const Pair& stride, const Pair& padding, const Pair& dilation) {
  ConvParams p{};
  p.batch = size[0], p.channels = size[1], p.height = size[2], p.width = size[3];
  p.multiplier = p.channels ? out_channels / p.channels : 1;
  p.kernel_h = kernel[0], p.kernel_w = kernel[1], p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1], p.dil_h = dilation[0], p.dil_w = dilation[1];
  p.out_height = (p.height + 2 * p.pad_h - p.dil_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.pad_w - p.dil_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  return p;
}

// The planner's switches as the environment set them, by the names of plan's arguments.
py::dict switches() {
  const cpu::Switches& s = cpu::switches_from_environment();
  py::dict d;
  d["fft"] = s.fft;
  d["aten"] = s.aten;
  d["only"] = s.only ? cpu::algorithm_name(*s.only) : "";
  return d;
}

py::dict to_dict(const Candidate& c) {
  const cpu::Plan& p = c.plan;
  py::dict d;
  d["algorithm"] = cpu::algorithm_name(p.algorithm);
  d["possible"] = c.possible;
  d["reason"] = c.reason;
  d["isa"] = cpu::isa_name(p.isa);
  d["lanes"] = p.lanes;
  d["tile"] = py::make_tuple(p.tile_h, p.tile_w);
  d["in_place"] = p.in_place && p.gather == cpu::Gather::none;
  constexpr const char* copied[] = {"", "pixels", "planes"};
  d["copied"] = copied[int(p.gather)];
  d["span"] = p.span;
  d["together"] = p.together;
  d["blocks"] = py::make_tuple(p.block, p.short_block);
  d["swept"] = p.swept;
  d["flat"] = p.flat;
  d["strip"] = p.strip;
  d["paired"] = p.paired;
  d["fft"] = py::make_tuple(p.fft_h, p.fft_w);
  d["splits"] = p.splits;
  d["scratch_bytes"] = p.scratch_bytes;
  d["flops"] = p.flops;
  d["cycles"] = p.cycles;
  return d;
}

// The CPU planner as a pure function. `size` is (N, C, H, W) of the input, `out_channels` the weight's.
std::vector<py::dict> plan(const std::string& pass_name, std::array<int64_t, 4> size, int64_t out_channels,
                           std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
                           std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation,
                           const std::string& dtype_name, const std::string& isa, int64_t threads, bool fft,
                           bool aten, const std::string& only, bool channels_last, bool dense,
                           std::optional<bool> bf16_pairs) {
  const Pass pass = parse<Pass>(pass_name, "pass",
                                {{"forward", Pass::forward},
                                 {"backward_input", Pass::backward_input},
                                 {"backward_weight", Pass::backward_weight}});
  const DType dtype = parse_dtype(dtype_name);
  const ConvParams p = conv_params(size, out_channels, kernel, stride, padding, dilation);
  cpu::Geometry g = cpu::forward_problem(p);
  int64_t reduce = 1;
  if (pass == Pass::backward_input) {
    const TensorView none{nullptr, dtype, 0, 0, 0, 0};
    const auto phases = cpu::backward_input_phases(p, none, none, none);
    g = phases.at(0);
    reduce = phases.at(0).reduce;
  }
  g.adjacent = channels_last && p.multiplier == 1;
  g.dense = dense;
  g.rows = !channels_last || g.channels == 1;
  const bool exchanged = pass != Pass::backward_weight && cpu::is_tall_strip(g);
  if (exchanged) exchange_axes(g);
  cpu::Machine machine = cpu::machine_for(parse_isa(isa), threads);
  if (bf16_pairs) machine.bf16_pairs = *bf16_pairs && machine.isa == cpu::Isa::avx512;
  cpu::Switches switches{.fft = fft, .aten = aten};
  if (!only.empty()) switches.only = parse_algorithm(only);
  std::vector<py::dict> out;
  for (const Candidate& c : cpu::plan_depthwise_conv2d(pass, g, reduce, dtype, machine, switches)) {
    py::dict d = to_dict(c);
    d["exchanged"] = exchanged;
    if (exchanged) d["tile"] = py::make_tuple(c.plan.tile_w, c.plan.tile_h);
    out.push_back(d);
  }
  return out;
}

// Whether a branch of a normalised sum, of stride 1, is convolved where its input is in scratch already.
bool cheaper_in_place(std::array<int64_t, 4> size, std::array<int64_t, 2> kernel,
                      std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation,
                      const std::string& dtype, bool channels_last, const std::string& isa, int64_t threads) {
  return cpu::cheaper_in_place(conv_params(size, size[1], kernel, {1, 1}, padding, dilation),
                               parse_dtype(dtype), channels_last, cpu::machine_for(parse_isa(isa), threads));
}

}  // namespace
}  // namespace lkconv

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of lkconv: op schemas, CPU kernels and introspection.";
  m.def(
      "detected_isa", [] { return lkconv::cpu::isa_name(lkconv::cpu::detected_isa()); },
      "The best instruction set of this processor that this build has kernels for.");
  m.def(
      "active_isa", [] { return lkconv::cpu::isa_name(lkconv::cpu::active_isa()); },
      "detected_isa, capped by LKCONV_MAX_CPU_ISA.");
  m.def("processor_vendor", &lkconv::cpu::processor_vendor,
        "The name by which an x86 processor tells its maker, such as AuthenticAMD; empty on others.");
  m.def("whole_512_bits", &lkconv::cpu::whole_512_bits_of, py::arg("vendor"), py::arg("signature"),
        py::arg("amx"), "Whether a processor runs 512-bit multiply-adds at the rate of 256-bit ones.");
  m.def("compiled_isas", [] {
    std::vector<std::string> names;
    for (lkconv::cpu::Isa i : {lkconv::cpu::Isa::baseline, lkconv::cpu::Isa::avx2, lkconv::cpu::Isa::avx512,
                               lkconv::cpu::Isa::amx})
      if (lkconv::cpu::kernels_for(i)) names.emplace_back(lkconv::cpu::isa_name(i));
    return names;
  });
  m.def("compiler", [] { return std::string(__VERSION__); });
  m.def("switches", &lkconv::switches,
        "The planner's switches that LKCONV_FFT, LKCONV_ATEN and LKCONV_ALGORITHM set: arguments of plan.");
  m.def("cheaper_in_place", &lkconv::cheaper_in_place, py::arg("size"), py::arg("kernel_size"),
        py::arg("padding"), py::arg("dilation"), py::arg("dtype"), py::arg("channels_last"), py::arg("isa"),
        py::arg("threads"),
        "Whether a branch of a normalised sum is convolved where its input is in scratch already.");
  m.def("plan", &lkconv::plan, py::arg("pass_name"), py::arg("size"), py::arg("out_channels"),
        py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("dtype"),
        py::arg("isa"), py::arg("threads"), py::arg("fft") = true, py::arg("aten") = true,
        py::arg("only") = "", py::arg("channels_last") = false, py::arg("dense") = true,
        py::arg("bf16_pairs") = py::none(),
        "Candidates of the CPU planner for one convolution, the chosen one first. `bf16_pairs`: whether the "
        "processor multiplies pairs of bfloat16; None: whether this one does.");
}
