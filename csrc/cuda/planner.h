// Chooses an algorithm and its tiles: pure functions of sizes, dtype, layout and machine.
#pragma once

#include <string>
#include <vector>

#include "../problem.h"
#include "params.h"

namespace lkconv::cuda {

enum class Algorithm : int8_t { direct, toeplitz };
const char* algorithm_name(Algorithm a);

// What the planner may know of the GPU.
struct Machine {
  int64_t sms = 132;
  int64_t shared_per_block = 232448;  // bytes, opted in
  int64_t shared_per_sm = 233472;
};

// What it may know of a tensor's memory.
struct Layout {
  bool rows_contiguous = true;  // neighbouring columns are neighbours in memory
  bool channels_fast = false;   // neighbouring channels are, and columns are not
  int vector_bytes = 16;        // every row starts at a multiple of this: 16, 8, 4 or the element's size
};
Layout layout_of(const TensorView& view, int64_t batch, int64_t channels, int64_t height, int64_t width);

struct Switches {
  bool tf32 = false;     // float32 may be rounded to tf32
  bool direct = true;    // tests force an algorithm by forbidding the other
  bool toeplitz = true;  // LKCONV_TOEPLITZ=0 turns it off
};

// Common to both passes: how a kernel is launched.
struct LaunchShape {
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
};

struct ForwardPlan {
  Algorithm algorithm = Algorithm::direct;
  LaunchShape launch;
  double cycles = 0;             // estimate for the whole GPU
  double issued_flops = 0;       // multiply-adds run, times two, off-band zeros included
  int width_class = 0;           // direct
  int m_tiles = 0, n_tiles = 0;  // toeplitz
  bool pack_input = false, pack_output = false;
  DirectForwardParams direct{};
  ToeplitzForwardParams toeplitz{};
};

struct WeightPlan {
  Algorithm algorithm = Algorithm::direct;
  LaunchShape launch;
  double cycles = 0, issued_flops = 0;
  bool unit = false;  // direct: stride and dilation along the row are 1
  int diagonals = 0;  // toeplitz
  bool pack_input = false, pack_grad = false;
  int64_t slots = 1;  // partial weights to be added
  DirectWeightParams direct{};
  ToeplitzWeightParams toeplitz{};
};

// One algorithm as the planner saw it: a plan, or the reason it cannot run.
template <class Plan>
struct Candidate {
  Plan plan;
  bool possible = false;
  std::string reason;
};

// Every algorithm, the chosen one first.
std::vector<Candidate<ForwardPlan>> plan_forward(const ForwardProblem& f, DType dtype, const Layout& input,
                                                 const Layout& output, const Switches& switches,
                                                 const Machine& machine);
std::vector<Candidate<WeightPlan>> plan_weight(const WeightProblem& w, DType dtype, const Layout& input,
                                               const Layout& grad_output, const Switches& switches,
                                               const Machine& machine);

// Strides and dilations that have no effect (one output, one tap) become 1, so that fewer cases are special.
void normalise(Geometry& g);
// Why the sizes cannot be indexed by the kernels, or "".
std::string size_limits(const Geometry& g);

}  // namespace lkconv::cuda
