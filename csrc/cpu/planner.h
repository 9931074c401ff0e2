// Chooses an algorithm and its tiles: a pure function of sizes, dtype and machine.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "machine.h"
#include "problem.h"

namespace lkconv::cpu {

constexpr int64_t kMaxScratchBytes = 16 << 20;  // per thread

// One algorithm as the planner saw it: a plan with its estimated cost, or the reason it cannot run.
struct Candidate {
  Plan plan;
  bool possible = false;
  std::string reason;
};

struct Switches {
  bool fft = true;                // LKCONV_FFT=0 turns the FFT off
  bool aten = true;               // LKCONV_ATEN=0: never hand a call to PyTorch's own convolution
  std::optional<Algorithm> only;  // LKCONV_ALGORITHM: wherever it can run, no other
};
const Switches& switches_from_environment();
const char* algorithm_name(Algorithm a);

// Every algorithm in order of preference, the chosen one first. `reduce` is the number of input planes per
// output plane (1 but for backward_input with a channel multiplier).
std::vector<Candidate> plan_depthwise_conv2d(Pass pass, const Geometry& g, int64_t reduce, DType dtype,
                                             const Machine& machine, const Switches& switches);

// Only the chosen plan, without composing reasons.
Plan choose_depthwise_conv2d(Pass pass, const Geometry& g, int64_t reduce, DType dtype,
                             const Machine& machine, const Switches& switches);

// Cycles of direct summation alone, of an input that is in scratch already, without moving tensors.
double cycles_of_sums(Pass pass, const Geometry& g, DType dtype, const Machine& machine);
// Cycles of moving every pixel of the input or the output of `g` once between a tensor and scratch.
double cycles_of_moving(const Geometry& g, const Machine& machine);

}  // namespace lkconv::cpu
