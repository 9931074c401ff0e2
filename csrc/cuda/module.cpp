// The pybind11 module lkconv._C_cuda: the CUDA planner and what was compiled, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "../allocation_error.h"
#include "depthwise_conv2d.h"
#include "group_mix_run.h"
#include "run.h"

namespace py = pybind11;

namespace lkconv::cuda {
namespace {

DType parse_dtype(const std::string& name) {
  if (name == "float64") return DType::f64;
  if (name == "float32") return DType::f32;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  throw std::invalid_argument("unknown dtype " + name);
}

py::tuple numbers(const std::vector<int64_t>& values) {
  py::tuple t(values.size());
  for (size_t i = 0; i < values.size(); ++i) t[i] = values[i];
  return t;
}

py::dict common(const LaunchShape& l, Algorithm algorithm, bool possible, const std::string& reason,
                double cycles, double flops) {
  py::dict d;
  d["algorithm"] = algorithm_name(algorithm);
  d["possible"] = possible;
  d["reason"] = reason;
  d["blocks"] = l.blocks;
  d["threads"] = l.threads;
  d["shared_bytes"] = l.shared_bytes;
  d["cycles"] = cycles;
  d["flops"] = flops;
  return d;
}

py::dict to_dict(const Candidate<ForwardPlan>& c) {
  const ForwardPlan& p = c.plan;
  py::dict d = common(p.launch, p.algorithm, c.possible, c.reason, p.cycles, p.issued_flops);
  const bool direct = p.algorithm == Algorithm::direct;
  d["tile"] = numbers(
      direct ? std::vector<int64_t>{p.direct.tile_channels, 1, p.direct.tile_h, p.direct.tile_w}
             : std::vector<int64_t>{1, p.toeplitz.tile_images, p.toeplitz.tile_h, p.n_tiles * kTileCols});
  d["kernel"] =
      numbers(direct ? std::vector<int64_t>{p.width_class} : std::vector<int64_t>{p.m_tiles, p.n_tiles});
  d["image_major"] = !direct && p.toeplitz.image_major != 0;
  d["packs"] = int(p.pack_input) + int(p.pack_output);
  d["tiles_per_block"] = direct ? p.direct.images_per_block : p.toeplitz.tiles_per_block;
  d["splits"] = 1;
  d["workspace_slots"] = 0;
  return d;
}

py::dict to_dict(const Candidate<WeightPlan>& c) {
  const WeightPlan& p = c.plan;
  py::dict d = common(p.launch, p.algorithm, c.possible, c.reason, p.cycles, p.issued_flops);
  const bool direct = p.algorithm == Algorithm::direct;
  d["tile"] =
      numbers(direct ? std::vector<int64_t>{p.direct.tile_channels, p.direct.tile_images, p.direct.tile_h,
                                            p.direct.tile_w}
                     : std::vector<int64_t>{1, p.toeplitz.tile_images, p.toeplitz.tile_h, p.toeplitz.tile_w});
  d["kernel"] = numbers(direct ? std::vector<int64_t>{p.unit} : std::vector<int64_t>{p.diagonals});
  d["image_major"] = false;
  d["packs"] = int(p.pack_input) + int(p.pack_grad);
  d["tiles_per_block"] = direct ? p.direct.tiles_per_split : p.toeplitz.tiles_per_split;
  d["splits"] = direct ? p.direct.splits : p.toeplitz.splits;
  d["workspace_slots"] = p.slots;
  return d;
}

// Notes launches and workspaces instead of making them.
struct Recorder {
  Machine description;
  py::list launches;
  int64_t workspace_bytes = 0;

  Machine machine() const { return description; }
  void* workspace(int64_t bytes) {
    workspace_bytes += bytes;
    return nullptr;
  }
  template <class P>
  void launch(const char* name, Kernel<P>, const LaunchShape& s, const P&) {
    py::dict d;
    d["name"] = name;
    d["blocks"] = s.blocks;
    d["threads"] = s.threads;
    d["shared_bytes"] = s.shared_bytes;
    launches.append(d);
  }
};

// How one pass of one convolution is planned. backward_input has a problem for each stride phase.
struct PassCall {
  DType dtype;
  Switches switches;
  Machine machine;
};

// A tensor without memory.
TensorView view_of(DType dtype, int64_t c, int64_t h, int64_t w, bool channels_last) {
  if (channels_last) return {nullptr, dtype, c * h * w, 1, w * c, c};
  return {nullptr, dtype, c * h * w, h * w, w, 1};
}

std::vector<Candidate<ForwardPlan>> candidates(const PassCall& call, ForwardProblem f) {
  normalise(f);
  const int64_t planes = f.channels / f.channel_div * f.channel_mul;
  return plan_forward(f, call.dtype, layout_of(f.input, f.batch, planes, f.height, f.width),
                      layout_of(f.output, f.batch, f.channels, f.out_height, f.out_width), call.switches,
                      call.machine);
}

std::vector<Candidate<WeightPlan>> candidates(const PassCall& call, WeightProblem w) {
  normalise(w);
  return plan_weight(
      w, call.dtype, layout_of(w.input, w.batch, w.channels / w.channel_div, w.height, w.width),
      layout_of(w.grad_output, w.batch, w.channels, w.out_height, w.out_width), call.switches, call.machine);
}

void run(Recorder& r, const PassCall& call, const ForwardProblem& f) { run_forward(r, f, call.switches); }
void run(Recorder& r, const PassCall& call, const WeightProblem& w) { run_weight(r, w, call.switches); }

// Adds what the whole call takes, all problems together, and the plan of each.
template <class Problem>
void add_totals(py::dict& d, const PassCall& call, const std::vector<Problem>& problems) {
  Recorder recorder{call.machine, py::list(), 0};
  py::list chosen_plans;
  double flops = 0, cycles = 0;
  for (const Problem& p : problems) {
    if (p.out_height <= 0 || p.out_width <= 0) continue;  // a stride phase without pixels
    const auto chosen = candidates(call, p).front();
    if (!chosen.possible) {
      d["possible"] = false, d["reason"] = chosen.reason;
      return;
    }
    flops += chosen.plan.issued_flops, cycles += chosen.plan.cycles;
    run(recorder, call, p);
    chosen_plans.append(to_dict(chosen));
  }
  d["problems"] = chosen_plans;
  d["flops"] = flops;
  d["cycles"] = cycles;
  d["launches"] = recorder.launches;
  d["scratch_bytes"] = recorder.workspace_bytes;
}

// The candidates of the first problem, each with the totals of a call that takes its algorithm.
template <class Problem>
std::vector<py::dict> plan_pass(const PassCall& call, const std::vector<Problem>& problems) {
  std::vector<py::dict> out;
  Problem first = problems.front();
  normalise(first);
  const std::string limits = size_limits(first);
  for (auto& c : candidates(call, first)) {
    if (!limits.empty()) c.possible = false, c.reason = limits;
    py::dict d = to_dict(c);
    PassCall same = call;
    if (!out.empty())
      (c.plan.algorithm == Algorithm::direct ? same.switches.toeplitz : same.switches.direct) = false;
    if (c.possible) add_totals(d, same, problems);
    out.push_back(d);
  }
  return out;
}

std::vector<py::dict> plan(const std::string& pass, std::array<int64_t, 4> size, int64_t out_channels,
                           std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
                           std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation,
                           const std::string& dtype_name, bool channels_last, bool tf32, int64_t sms,
                           int64_t shared_per_block, int64_t shared_per_sm) {
  const DType dtype = parse_dtype(dtype_name);
  ConvParams p{};
  p.batch = size[0], p.channels = size[1], p.height = size[2], p.width = size[3];
  p.multiplier = p.channels ? out_channels / p.channels : 1;
  p.kernel_h = kernel[0], p.kernel_w = kernel[1], p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1], p.dil_h = dilation[0], p.dil_w = dilation[1];
  p.out_height = (p.height + 2 * p.pad_h - p.dil_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.pad_w - p.dil_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  if (p.batch < 1 || p.channels < 1 || p.height < 1 || p.width < 1 || p.out_height < 1 || p.out_width < 1)
    throw std::invalid_argument("nothing to plan: the input or the output has no elements");
  PassCall call{dtype, switches_from_environment(), {sms, shared_per_block, shared_per_sm}};
  call.switches.tf32 = tf32;
  const TensorView input = view_of(dtype, p.channels, p.height, p.width, channels_last),
                   output = view_of(dtype, p.out_channels(), p.out_height, p.out_width, channels_last),
                   weight = view_of(dtype, 1, p.kernel_h, p.kernel_w, false);
  if (pass == "backward_weight") {
    WeightProblem w = weight_problem(p);
    w.input = input, w.grad_output = output, w.grad_weight = weight;
    return plan_pass(call, std::vector<WeightProblem>{w});
  }
  if (pass == "backward_input") return plan_pass(call, backward_input_phases(p, output, weight, input));
  if (pass != "forward") throw std::invalid_argument("unknown pass " + pass);
  ForwardProblem f = forward_problem(p);
  f.input = input, f.weight = weight, f.output = output, f.bias = {nullptr, dtype, 0, 0, 0, 0};
  return plan_pass(call, std::vector<ForwardProblem>{f});
}

std::vector<py::dict> resources() {
  std::vector<py::dict> out;
  for (const KernelResources& k : kernel_resources()) {
    py::dict d;
    d["name"] = k.name;
    d["registers"] = k.registers;
    d["spilled_bytes"] = k.spilled_bytes;
    d["static_shared_bytes"] = k.static_shared_bytes;
    d["max_threads"] = k.max_threads;
    d["binary_version"] = k.binary_version;
    d["ptx_version"] = k.ptx_version;
    out.push_back(d);
  }
  return out;
}

void run_group_mix(Recorder& r, const std::string& op, const TokenSizes& s, DType dtype) {
  AggregateCall a;
  AttentionCall c;
  a.sizes = c.sizes = s, a.dtype = c.dtype = dtype;
  if (op == "group_mix_aggregate") return run_aggregate(r, a);
  if (op == "group_mix_mix") return run_mix(r, a);
  if (op == "group_mix_normalize") return run_normalize(r, a);
  if (op == "group_mix_backward_reduce") return run_backward_reduce(r, a);
  if (op == "group_mix_backward") return run_backward(r, a);
  if (op == "group_mix_attention") return run_attention(r, c);
  if (op == "group_mix_attention_backward") return run_attention_backward(r, c);
  throw std::invalid_argument("unknown op " + op);
}

py::dict plan_group_mix(const std::string& op, std::array<int64_t, 4> size, const std::string& dtype_name,
                        int64_t sms, int64_t shared_per_block, int64_t shared_per_sm) {
  Recorder r{{sms, shared_per_block, shared_per_sm}, py::list(), 0};
  run_group_mix(r, op, {size[0], size[1], size[2], size[3]}, parse_dtype(dtype_name));
  py::dict d;
  d["launches"] = r.launches;
  d["workspace_bytes"] = r.workspace_bytes;
  return d;
}

py::dict machine() {
  const Machine m = current_machine();
  py::dict d;
  d["sms"] = m.sms;
  d["shared_per_block"] = m.shared_per_block;
  d["shared_per_sm"] = m.shared_per_sm;
  return d;
}

// torch.backends.cudnn.conv.fp32_precision is what decides whether torch's own convolutions use tf32.
bool torch_allows_tf32() {
  const py::gil_scoped_acquire gil;
  const py::object conv = py::module_::import("torch").attr("backends").attr("cudnn").attr("conv");
  return conv.attr("fp32_precision").cast<std::string>() == "tf32";
}

}  // namespace
}  // namespace lkconv::cuda

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of lkconv: planner and introspection.";
  lkconv::cuda::set_tf32_query(lkconv::cuda::torch_allows_tf32);
  m.def(
      "plan", &lkconv::cuda::plan, py::arg("pass_name"), py::arg("size"), py::arg("out_channels"),
      py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("dtype"),
      py::arg("channels_last") = false, py::arg("tf32") = false, py::arg("sms") = 132,
      py::arg("shared_per_block") = 232448, py::arg("shared_per_sm") = 233472,
      "Candidates of the CUDA planner for one convolution, the chosen one first. tile is (channels, images, "
      "rows, columns); flops, cycles, launches and scratch_bytes are those of the whole call and missing "
      "where the algorithm cannot run, and so are problems: the plan of each stride phase of backward_input, "
      "or of the only problem. The machine defaults to an H100.");
  m.def("plan_group_mix", &lkconv::cuda::plan_group_mix, py::arg("op"), py::arg("size"), py::arg("dtype"),
        py::arg("sms") = 132, py::arg("shared_per_block") = 232448, py::arg("shared_per_sm") = 233472,
        "Launches of one Group-Mix op on tokens of size (B, H, W, d), with float32 parameters (float64 "
        "tensors: "
        "converted), and the bytes of its workspaces.");
  m.def("machine", &lkconv::cuda::machine,
        "The current GPU as plan() wants it: sms, shared_per_block, shared_per_sm.");
  m.def("kernels", &lkconv::cuda::kernel_names, "Names of the compiled kernels.");
  m.def("resources", &lkconv::cuda::resources, "Registers and memory of every kernel on the current GPU.");
  m.def("architectures", &lkconv::cuda::compiled_architectures,
        "GPU architectures this module holds machine code for, as sm_NN, and PTX for, as compute_NN.");
  m.def("allows_tf32", &lkconv::cuda::torch_allows_tf32,
        "Whether torch's switches allow tf32 in convolutions now.");
  m.def("toolkit", &lkconv::cuda::toolkit_version, "Version of the CUDA compiler.");
}
