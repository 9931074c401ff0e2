// Tiles, spans and costs of direct summation whose lanes are channels.
#pragma once

#include "planner.h"

namespace lkconv::cpu {

// The cheapest way to read the tensors of a problem: in windows, in place, or from copies.
Plan direct_plan(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m);
// The plan that copies the input to windows of floats, or of doubles.
Plan direct_plan_with_windows(Pass pass, const Geometry& g, int64_t reduce, DType dtype, const Machine& m);

}  // namespace lkconv::cpu
