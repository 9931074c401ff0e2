#include "planner.h"

#include <cstdint>

#include "planner_common.h"

namespace lkconv::cuda {
namespace {

constexpr int64_t kMaxExtent = int64_t(1) << 29;  // of any one axis: tile arithmetic is 32-bit

template <class Plan>
std::vector<Candidate<Plan>> in_order(Candidate<Plan> direct, Candidate<Plan> toeplitz, const Switches& s) {
  direct.plan.algorithm = Algorithm::direct, toeplitz.plan.algorithm = Algorithm::toeplitz;
  if (!s.direct && toeplitz.possible) direct.possible = false, direct.reason = "switched off";
  // Where both wait for memory, the direct kernel's shorter prologue wins.
  const bool toeplitz_first =
      toeplitz.possible && (!direct.possible || 1.1 * toeplitz.plan.cycles < direct.plan.cycles);
  if (toeplitz_first) {
    if (direct.possible) direct.reason = "estimated to be slower";
    return {toeplitz, direct};
  }
  if (toeplitz.possible) toeplitz.reason = "estimated to be slower";
  return {direct, toeplitz};
}

}  // namespace

const char* algorithm_name(Algorithm a) { return a == Algorithm::direct ? "direct" : "toeplitz"; }

Layout layout_of(const TensorView& view, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  Layout l;
  l.rows_contiguous = view.stride_w == 1 || width <= 1;
  l.channels_fast = !l.rows_contiguous && view.stride_c == 1 && channels > 1;
  const int64_t size = dtype_size(view.dtype);
  int64_t bits = 16 | int64_t(reinterpret_cast<uintptr_t>(view.data));
  if (batch > 1) bits |= view.stride_n * size;
  if (channels > 1) bits |= view.stride_c * size;
  if (height > 1) bits |= view.stride_h * size;
  l.vector_bytes = int(std::max(size, bits & -bits));
  return l;
}

void normalise(Geometry& g) {
  if (g.kernel_h <= 1) g.dil_h = 1;
  if (g.kernel_w <= 1) g.dil_w = 1;
  if (g.out_height <= 1) g.stride_h = 1;
  if (g.out_width <= 1) g.stride_w = 1;
}

std::string size_limits(const Geometry& g) {
  const int64_t extents[] = {g.batch,
                             g.channels,
                             g.height,
                             g.width,
                             g.out_height * g.stride_h,
                             g.out_width * g.stride_w,
                             g.kernel_h * g.dil_h,
                             g.kernel_w * g.dil_w,
                             std::abs(g.pad_h),
                             std::abs(g.pad_w)};
  for (const int64_t e : extents)
    if (e > kMaxExtent) return "an extent of " + std::to_string(e) + " is beyond 2^29";
  return "";
}

std::string toeplitz_declines(const Geometry& g, DType dtype, const Switches& s) {
  if (!s.toeplitz) return "LKCONV_TOEPLITZ=0";
  if (dtype == DType::f64) return "no matrix unit takes float64 operands of this shape";
  if (dtype == DType::f32 && !s.tf32)
    return "float32 must not be rounded to tf32 (torch.backends.cudnn.allow_tf32)";
  if (g.stride_w != 1) return "the stride along the row is not 1";
  if (g.kernel_h == 0 || g.kernel_w == 0) return "no tap reaches the output";
  return "";
}

std::vector<Candidate<ForwardPlan>> plan_forward(const ForwardProblem& f, DType dtype, const Layout& input,
                                                 const Layout& output, const Switches& s, const Machine& m) {
  return in_order(plan_direct_forward(f, dtype, input, output, m),
                  plan_toeplitz_forward(f, dtype, input, output, s, m), s);
}

std::vector<Candidate<WeightPlan>> plan_weight(const WeightProblem& w, DType dtype, const Layout& input,
                                               const Layout& grad_output, const Switches& s,
                                               const Machine& m) {
  return in_order(plan_direct_weight(w, dtype, input, grad_output, m),
                  plan_toeplitz_weight(w, dtype, input, grad_output, s, m), s);
}

}  // namespace lkconv::cuda
