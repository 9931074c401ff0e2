// From a call of a Group-Mix op to kernel launches. `Executor` as in run.h: the CUDA runtime, the host
// emulator of the tests, or the planner's recorder.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>

#include "group_mix_kernels.h"
#include "group_mix_plan.h"

namespace lkconv::cuda {

// A contiguous parameter of any floating type.
struct ParameterView {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

struct AggregateCall {
  TokenSizes sizes;
  DType dtype;
  const void* qkv = nullptr;
  void *mixed = nullptr, *local = nullptr;
  // inputs of some ops, outputs of others
  void *premix = nullptr, *prelocal = nullptr, *mean = nullptr, *var = nullptr, *sums = nullptr;
  ParameterView depthwise[4], pointwise[4], norm_weight[4], norm_bias[4], norm_mean[4], norm_var[4];
  ParameterView layer_norm[2];
  double eps = 0, layer_norm_eps = 0, count = 1;
  const void *grad_mixed = nullptr, *grad_local = nullptr;
  int64_t local_stride = 0;
  void *grad_qkv = nullptr, *grads = nullptr;
};

struct AttentionCall {
  TokenSizes sizes;
  DType dtype;
  const void *mixed = nullptr, *local = nullptr, *grad_out = nullptr;
  void *out = nullptr, *log_sum = nullptr, *context = nullptr, *grad_mixed = nullptr, *grads = nullptr;
  ParameterView weight[3], bias[3];
  double scale = 1;
};

inline DType wide_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// Elements from a base that may be null (the planner's recorder has no memory).
inline void* element(void* base, int64_t i, DType dtype) {
  return base ? static_cast<char*>(base) + i * dtype_size(dtype) : nullptr;
}
inline const void* element(const void* base, int64_t i, DType dtype) {
  return element(const_cast<void*>(base), i, dtype);
}

// Whether `count` neighbouring elements can be moved at once, all addresses being `channels` apart.
inline bool moves_together(int count, DType dtype, int64_t channels,
                           std::initializer_list<const void*> data) {
  bool aligned = channels % count == 0;
  for (const void* p : data)
    aligned = aligned && reinterpret_cast<uintptr_t>(p) % size_t(count * dtype_size(dtype)) == 0;
  return aligned;
}

inline void check_sizes(const TokenSizes& s) {
  const std::string reason = group_mix_limits(s);
  if (!reason.empty()) throw std::runtime_error("lkconv: " + reason);
}

// Parameters in the accumulation type. Those that have it already are used in place, unless they must lie
// side by side.
template <class Executor>
class PackedParameters {
 public:
  PackedParameters(Executor& e, DType dtype) : e_(e), wide_(wide_type(dtype)) {}

  void add(const ParameterView& from, int64_t count, const void** where) {
    if (from.dtype == wide_)
      *where = from.data;
    else
      copy(from, count, where);
  }
  // N arrays of `count`, one after the other.
  template <size_t N>
  void add_rows(const ParameterView (&from)[N], int64_t count, const void** where) {
    copy(from[0], count, where);
    for (size_t i = 1; i < N; ++i) copy(from[i], count, nullptr);
  }
  void run() {
    if (p_.count == 0) return;
    char* memory = static_cast<char*>(e_.workspace(size_ * dtype_size(wide_)));
    p_.out = memory;
    for (int i = 0; i < p_.count; ++i)
      if (where_[i]) *where_[i] = element(static_cast<const void*>(memory), p_.jobs[i].to, wide_);
    e_.launch("group_mix_pack_parameters", pack_parameters_kernel(wide_),
              {int64_t(p_.count) * kPackBlocks, kTokenThreads, 0}, p_);
  }

 private:
  void copy(const ParameterView& from, int64_t count, const void** where) {
    if (p_.count == kMostJobs) throw std::runtime_error("lkconv: too many parameters");
    p_.jobs[p_.count] = {from.data, int(from.dtype), int(count), int(size_)};
    where_[p_.count++] = where;
    size_ += count;
  }
  Executor& e_;
  DType wide_;
  PackParametersParams p_{};
  const void** where_[kMostJobs] = {};
  int64_t size_ = 0;
};

// Sums over splits, all in one launch.
template <class Executor>
class Reductions {
 public:
  Reductions(Executor& e, DType dtype) : e_(e), wide_(wide_type(dtype)) {}
  // A workspace of (splits, count) whose sum goes to `out`.
  void* add(int64_t splits, int64_t count, void* out, bool wide = false) {
    if (p_.count == kMostJobs) throw std::runtime_error("lkconv: too many sums");
    void* partial = e_.workspace(std::max<int64_t>(1, splits * count) * dtype_size(wide_));
    p_.jobs[p_.count++] = {partial, out, int(splits), int(count), wide, int(blocks_)};
    blocks_ += ceil_div(count, kLanes);
    return partial;
  }
  void run() {
    e_.launch("group_mix_reduce_sums", reduce_sums_kernel(wide_), {blocks_, kTokenThreads, kTokenThreads * 8},
              p_);
  }

 private:
  Executor& e_;
  DType wide_;
  ReduceSumsParams p_{};
  int64_t blocks_ = 0;
};

// ---- aggregation ----

// The aggregation's parameters as kernels take them; `norms` are the folded BatchNorms.
struct AggregateWeights {
  const void *depthwise[4], *pointwise[4], *layer_norm[2];
  const void* norms = nullptr;
};

template <class Executor>
AggregateWeights prepare(Executor& e, const AggregateCall& c, bool mixing, bool norms) {
  const int64_t d = c.sizes.segment;
  const DType wide = wide_type(c.dtype);
  AggregateWeights w{};
  PackedParameters<Executor> pack(e, c.dtype);
  const int64_t taps[4] = {d * 9, d * 25, d * 49, 3 * d * 9};
  for (int i = 0; mixing && i < 4; ++i) {
    pack.add(c.depthwise[i], taps[i], &w.depthwise[i]);
    pack.add(c.pointwise[i], (i == 3 ? 3 : 1) * d * d, &w.pointwise[i]);
    if (i < 2) pack.add(c.layer_norm[i], d, &w.layer_norm[i]);
  }
  FoldNormsParams f{};
  if (norms) {
    pack.add_rows(c.norm_weight, d, &f.weight);
    pack.add_rows(c.norm_bias, d, &f.bias);
    pack.add_rows(c.norm_mean, d, &f.mean);
    pack.add_rows(c.norm_var, d, &f.var);
  }
  pack.run();
  if (!norms) return w;
  f.sums = static_cast<const double*>(c.grads ? c.sums : nullptr);
  f.channels = int(4 * d), f.eps = c.eps, f.count = c.count;
  f.out = e.workspace(kNormRows * 4 * d * dtype_size(wide));
  w.norms = f.out;
  e.launch("group_mix_fold_norms", fold_norms_kernel(wide),
           {ceil_div(4 * d, kTokenThreads), kTokenThreads, 0}, f);
  return w;
}

template <class Executor>
AggregateParams launch_aggregate(Executor& e, const AggregateCall& c, const AggregateWeights& w, int kind,
                                 bool moments) {
  const int64_t d = c.sizes.segment;
  const DType wide = wide_type(c.dtype);
  AggregateParams p{};
  const LaunchShape shape = plan_aggregate(p, c.sizes, kind, moments, c.dtype, e.machine());
  p.qkv = c.qkv, p.mixed = c.mixed, p.premix = c.premix, p.prelocal = c.prelocal, p.local = c.local;
  p.write_u = moments;
  p.pairs = moves_together(2, c.dtype, d, {c.qkv});
  p.quads = moves_together(4, c.dtype, d, {c.mixed, c.premix});
  if (p.keep_moments) p.moments = e.workspace(shape.blocks * 3 * d * dtype_size(wide));
  p.depthwise = w.depthwise[kind - 1], p.pointwise = w.pointwise[kind - 1];
  p.scale = element(w.norms, (kScale * 4 + kind) * d, wide);
  p.shift = element(w.norms, (kShift * 4 + kind) * d, wide);
  p.norm_weight = w.layer_norm[0], p.norm_bias = w.layer_norm[1], p.norm_eps = c.layer_norm_eps;
  e.launch("group_mix_aggregate", aggregate_kernel(c.dtype, kind == kLocalKind ? 3 : 2 * kind + 1), shape, p);
  return p;
}

template <class Executor>
void launch_normalize(Executor& e, const AggregateCall& c, const AggregateWeights& w, int64_t channels) {
  NormalizeParams p{};
  p.qkv = c.qkv, p.premix = c.premix, p.mixed = c.mixed, p.norms = w.norms;
  p.part_tokens = c.sizes.batch * c.sizes.tokens(), p.tokens = 3 * p.part_tokens;
  p.segment = int(c.sizes.segment), p.channels = int(channels);
  p.tokens_per_block = int(std::max<int64_t>(1, 8 * kTokenThreads / channels));
  e.launch("group_mix_normalize", normalize_kernel(c.dtype),
           {ceil_div(p.tokens, p.tokens_per_block), kTokenThreads, 0}, p);
}

// Fixed statistics: mixed and local in one pass over qkv.
template <class Executor>
void run_aggregate(Executor& e, const AggregateCall& c) {
  if (c.sizes.batch * c.sizes.tokens() == 0) return;
  check_sizes(c.sizes);
  const AggregateWeights w = prepare(e, c, true, true);
  for (int kind = 1; kind <= kLocalKind; ++kind) launch_aggregate(e, c, w, kind, false);
  launch_normalize(e, c, w, c.sizes.segment);
}

template <class Executor>
const void* launch_segment_moments(Executor& e, const AggregateCall& c, int kind, int* splits) {
  SegmentMomentsParams p{};
  p.qkv = c.qkv, p.premix = c.premix, p.kind = kind, p.segment = int(c.sizes.segment);
  p.part_tokens = c.sizes.batch * c.sizes.tokens(), p.tokens = 3 * p.part_tokens;
  p.chunks = int(ceil_div(p.segment, kLanes));
  const Shares s = share_tokens(p.tokens, p.chunks, e.machine());
  p.splits = *splits = s.splits, p.tokens_per_split = s.tokens;
  const DType wide = wide_type(c.dtype);
  p.moments = e.workspace(int64_t(s.splits) * 3 * p.segment * dtype_size(wide));
  e.launch("group_mix_segment_moments", segment_moments_kernel(c.dtype),
           {int64_t(p.chunks) * s.splits, kTokenThreads, 3 * kTokenThreads * dtype_size(wide)}, p);
  return p.moments;
}

// Training, first pass: U, local and the statistics of U.
template <class Executor>
void run_mix(Executor& e, const AggregateCall& c) {
  ReduceMomentsParams r{};
  r.mean = c.mean, r.var = c.var, r.segment = int(c.sizes.segment);
  r.chunks = int(ceil_div(r.segment, kLanes));
  if (c.sizes.batch * c.sizes.tokens() > 0) {
    check_sizes(c.sizes);
    const AggregateWeights w = prepare(e, c, true, false);
    launch_aggregate(e, c, w, kLocalKind, true);
    for (int kind = 0; kind < kLocalKind; ++kind) {
      AggregateParams p{};
      if (kind > 0) p = launch_aggregate(e, c, w, kind, true);
      r.moments[kind] = p.moments, r.splits[kind] = p.tiles.splits;
      if (!p.keep_moments) r.moments[kind] = launch_segment_moments(e, c, kind, &r.splits[kind]);
    }
  }
  if (r.segment == 0) return;
  e.launch("group_mix_reduce_moments", reduce_moments_kernel(wide_type(c.dtype)),
           {4 * int64_t(r.chunks), kTokenThreads, 2 * kTokenThreads * 8}, r);
}

// Training, second pass: mixed.
template <class Executor>
void run_normalize(Executor& e, const AggregateCall& c) {
  if (c.sizes.batch * c.sizes.tokens() == 0) return;
  launch_normalize(e, c, prepare(e, c, false, true), 4 * c.sizes.segment);
}

// Sums of dA and dA U^ over all tokens.
template <class Executor>
void run_backward_reduce(Executor& e, const AggregateCall& c) {
  const int64_t d = c.sizes.segment;
  if (d == 0) return;
  const DType wide = wide_type(c.dtype);
  BackwardReduceParams p{};
  p.grad_mixed = c.grad_mixed, p.qkv = c.qkv, p.premix = c.premix, p.segment = int(d);
  p.part_tokens = c.sizes.batch * c.sizes.tokens(), p.tokens = 3 * p.part_tokens;
  p.chunks = int(ceil_div(4 * d, kLanes));
  const Shares s = share_tokens(p.tokens, p.chunks, e.machine());
  p.splits = s.splits, p.tokens_per_split = s.tokens;
  Reductions<Executor> sums(e, c.dtype);
  p.partial = sums.add(s.splits, 8 * d, c.sums, true);
  if (p.tokens > 0) {
    p.norms = prepare(e, c, false, true).norms;
    e.launch("group_mix_backward_reduce", backward_reduce_kernel(c.dtype),
             {int64_t(p.chunks) * s.splits, kTokenThreads, 2 * kTokenThreads * dtype_size(wide)}, p);
  }
  sums.run();
}

// Where each gradient lies in the flat output: depthwise 4, pointwise 4, LayerNorm's two.
struct GradientOffsets {
  int64_t depthwise[4], pointwise[4], layer_norm;
  explicit GradientOffsets(int64_t d) {
    int64_t at = 0;
    const int64_t taps[4] = {d * 9, d * 25, d * 49, 3 * d * 9};
    for (int i = 0; i < 4; ++i) depthwise[i] = at, at += taps[i];
    for (int i = 0; i < 4; ++i) pointwise[i] = at, at += (i == 3 ? 3 : 1) * d * d;
    layer_norm = at;
  }
};

// Tensors between the kernels of one kind, each of 3 B N d elements; the next kind writes over them.
struct BackwardSpace {
  void *grad_u, *grad_t, *mixed_t;
};

// One kind's gradients: dU and dT, then dZ, T and the depthwise weights, then the pointwise weights from dU
// and T.
template <class Executor>
void run_kind_backward(Executor& e, const AggregateCall& c, const AggregateWeights& w, int kind,
                       const BackwardSpace& space, Reductions<Executor>& sums) {
  const int64_t d = c.sizes.segment, n = c.sizes.tokens();
  const DType wide = wide_type(c.dtype);
  const GradientOffsets offsets(d);
  const bool local = kind == kLocalKind;
  MixBackwardParams m{};
  const LaunchShape mix = plan_mix_backward(m, c.sizes, kind, c.dtype, e.machine());
  m.grad_mixed = c.grad_mixed, m.premix = c.premix, m.norms = w.norms;
  m.grad_local = c.grad_local, m.prelocal = c.prelocal, m.local_stride = c.local_stride;
  m.layer_norm[0] = w.layer_norm[0], m.layer_norm[1] = w.layer_norm[1], m.norm_eps = c.layer_norm_eps;
  m.pointwise = w.pointwise[kind - 1];
  m.quads = moves_together(4, c.dtype, d, {space.grad_t});
  m.grad_u = space.grad_u, m.grad_t = space.grad_t;
  if (local) m.partial = sums.add(mix.blocks, 2 * d, element(c.grads, offsets.layer_norm, wide));
  e.launch("group_mix_mix_backward", mix_backward_kernel(c.dtype), mix, m);

  const int window = local ? 3 : 2 * kind + 1, groups = local ? 3 : 1;
  DepthwiseBackwardParams t{};
  const LaunchShape depthwise =
      plan_depthwise_backward(t, c.sizes, m.tokens / n, m.inner, groups, window, c.dtype, e.machine());
  t.grad = m.grad_t, t.grad_stride = m.inner;
  t.input = element(c.qkv, kind * d, c.dtype), t.input_stride = 15 * d;
  t.grad_input = element(c.grad_qkv, kind * d, c.dtype), t.grad_input_stride = 15 * d;
  t.part_stride = t.group_stride = 5 * d;
  t.product = space.mixed_t, t.product_stride = m.inner;
  t.weight = w.depthwise[kind - 1];
  t.pairs = moves_together(2, c.dtype, d, {c.qkv, m.grad_t});
  t.partial_weight = sums.add(t.tiles.splits, int64_t(m.inner) * window * window,
                              element(c.grads, offsets.depthwise[kind - 1], wide));
  e.launch("group_mix_depthwise_backward", depthwise_backward_kernel(c.dtype, window), depthwise, t);

  TokenProductParams q{};
  q.x = m.grad_u, q.x_stride = d, q.y = t.product, q.y_stride = m.inner;
  q.tokens = m.tokens, q.rows = int(d), q.columns = m.inner, q.heads = 1;
  const LaunchShape product = plan_token_product(q, 1, c.dtype, e.machine());
  q.partial = sums.add(q.splits, d * m.inner, element(c.grads, offsets.pointwise[kind - 1], wide));
  e.launch("group_mix_token_product", token_product_kernel(c.dtype), product, q);
}

// All gradients but those of the BatchNorms' parameters.
template <class Executor>
void run_backward(Executor& e, const AggregateCall& c) {
  const int64_t d = c.sizes.segment;
  if (d == 0) return;
  if (c.sizes.batch * c.sizes.tokens() == 0) {
    Reductions<Executor> zeros(e, c.dtype);
    zeros.add(0, GradientOffsets(d).layer_norm + 2 * d, c.grads);
    return zeros.run();
  }
  check_sizes(c.sizes);
  const AggregateWeights w = prepare(e, c, true, true);
  SegmentBackwardParams s{};
  s.grad_mixed = c.grad_mixed, s.qkv = c.qkv, s.norms = w.norms, s.grad_qkv = c.grad_qkv;
  s.part_tokens = c.sizes.batch * c.sizes.tokens(), s.tokens = 3 * s.part_tokens, s.segment = int(d);
  s.tokens_per_block = int(std::max<int64_t>(1, 8 * kTokenThreads / d));
  e.launch("group_mix_segment_backward", segment_backward_kernel(c.dtype),
           {ceil_div(s.tokens, s.tokens_per_block), kTokenThreads, 0}, s);
  const int64_t bytes = s.tokens * d * dtype_size(c.dtype);
  const BackwardSpace space{e.workspace(bytes), e.workspace(bytes), e.workspace(bytes)};
  Reductions<Executor> sums(e, c.dtype);
  for (int kind = 1; kind <= kLocalKind; ++kind) run_kind_backward(e, c, w, kind, space, sums);
  sums.run();
}

// ---- attention ----

// The position encoding's parameters, window by window.
struct PositionWeights {
  const void *weight[3], *bias[3];
};
inline constexpr int kPositionHeads[3] = {2, 3, 3}, kPositionWindows[3] = {3, 5, 7};

template <class Executor>
PositionWeights prepare(Executor& e, const AttentionCall& c) {
  PositionWeights w{};
  PackedParameters<Executor> pack(e, c.dtype);
  for (int i = 0; i < 3; ++i) {
    const int64_t channels = kPositionHeads[i] * c.sizes.segment / 2;
    pack.add(c.weight[i], channels * kPositionWindows[i] * kPositionWindows[i], &w.weight[i]);
    pack.add(c.bias[i], channels, &w.bias[i]);
  }
  pack.run();
  return w;
}

template <class Executor>
void launch_context(Executor& e, const AttentionCall& c) {
  const int64_t d = c.sizes.segment, n = c.sizes.tokens(), head = d / 2, image = n * 4 * d;
  const DType wide = wide_type(c.dtype);
  const int64_t size = dtype_size(wide);
  ColumnMaxParams m{};
  m.keys = element(c.mixed, c.sizes.batch * image, c.dtype);
  m.tokens = n, m.channels = int(4 * d), m.chunks = int(ceil_div(4 * d, kLanes));
  const Shares s = share_tokens(n, c.sizes.batch * m.chunks, e.machine());
  m.splits = s.splits, m.tokens_per_split = s.tokens;
  m.partial = e.workspace(c.sizes.batch * s.splits * 4 * d * size);
  e.launch("group_mix_column_max", column_max_kernel(c.dtype),
           {c.sizes.batch * s.splits * m.chunks, kTokenThreads, kTokenThreads * size}, m);

  TokenProductParams p{};
  p.x = m.keys, p.y = element(c.mixed, 2 * c.sizes.batch * image, c.dtype);
  p.x_stride = p.y_stride = 4 * d, p.x_image = p.y_image = image, p.x_head = p.y_head = int(head);
  p.heads = 8, p.tokens = n, p.rows = p.columns = int(head);
  p.maxima = m.partial, p.max_splits = s.splits, p.max_channels = int(4 * d);
  const LaunchShape shape = plan_token_product(p, 8 * c.sizes.batch, c.dtype, e.machine());
  p.partial = e.workspace(8 * c.sizes.batch * p.splits * head * head * size);
  p.partial_sum = e.workspace(8 * c.sizes.batch * p.splits * head * size);
  e.launch("group_mix_token_product", token_product_kernel(c.dtype), shape, p);

  const ContextParams g{p.partial, p.partial_sum, m.partial, c.log_sum,
                        c.context, int(head),     p.splits,  s.splits};
  e.launch("group_mix_combine_context", combine_context_kernel(wide), {8 * c.sizes.batch, kTokenThreads, 0},
           g);
}

template <class Executor>
void run_attention(Executor& e, const AttentionCall& c) {
  if (c.sizes.batch * c.sizes.tokens() * c.sizes.segment == 0) return;
  check_sizes(c.sizes);
  const PositionWeights w = prepare(e, c);
  launch_context(e, c);
  for (int i = 0; i < 3; ++i) {
    AttentionParams p{};
    const LaunchShape shape = plan_attention(p, c.sizes, kPositionWindows[i], c.dtype, e.machine());
    p.mixed = c.mixed, p.local = c.local, p.context = c.context, p.out = c.out;
    p.weight = w.weight[i], p.bias = w.bias[i], p.scale = c.scale;
    p.pairs = moves_together(2, c.dtype, c.sizes.segment / 2, {c.mixed});
    e.launch("group_mix_attention_forward", attention_forward_kernel(c.dtype, kPositionWindows[i]), shape, p);
  }
}

// dG and the row sums of dG G.
template <class Executor>
void launch_grad_context(Executor& e, const AttentionCall& c, AttentionBackwardParams& b) {
  const int64_t d = c.sizes.segment, n = c.sizes.tokens(), head = d / 2;
  const DType wide = wide_type(c.dtype);
  TokenProductParams p{};
  p.x = c.mixed, p.y = c.grad_out;
  p.x_stride = 4 * d, p.y_stride = 5 * d, p.x_image = n * 4 * d, p.y_image = n * 5 * d;
  p.x_head = p.y_head = int(head), p.heads = 8, p.tokens = n, p.rows = p.columns = int(head);
  const LaunchShape shape = plan_token_product(p, 8 * c.sizes.batch, c.dtype, e.machine());
  p.partial = e.workspace(8 * c.sizes.batch * p.splits * head * head * dtype_size(wide));
  e.launch("group_mix_token_product", token_product_kernel(c.dtype), shape, p);
  GradContextParams g{p.partial, c.context, nullptr, nullptr, c.scale, int(head), p.splits};
  g.grad_context = e.workspace(8 * c.sizes.batch * head * head * dtype_size(wide));
  g.row_sum = e.workspace(8 * c.sizes.batch * head * dtype_size(wide));
  e.launch("group_mix_combine_grad_context", combine_grad_context_kernel(wide),
           {8 * c.sizes.batch, kTokenThreads, 0}, g);
  b.grad_context = g.grad_context, b.row_sum = g.row_sum;
}

// dO * E into q's gradient, the position encoding's own into v's, and those of its parameters.
template <class Executor>
void launch_position_backward(Executor& e, const AttentionCall& c, const PositionWeights& w,
                              Reductions<Executor>& sums) {
  const int64_t d = c.sizes.segment, all = c.sizes.batch * c.sizes.tokens() * 4 * d;
  const DType wide = wide_type(c.dtype);
  int64_t first = 0, weight_at = 0, bias_at = 0;
  for (int i = 0; i < 3; ++i)
    bias_at += kPositionHeads[i] * d / 2 * kPositionWindows[i] * kPositionWindows[i];
  for (int i = 0; i < 3; ++i) {
    const int64_t channels = kPositionHeads[i] * d / 2, taps = kPositionWindows[i] * kPositionWindows[i];
    DepthwiseBackwardParams p{};
    const LaunchShape shape = plan_depthwise_backward(p, c.sizes, c.sizes.batch, int(channels), 1,
                                                      kPositionWindows[i], c.dtype, e.machine());
    p.grad = element(c.grad_out, first, c.dtype), p.grad_stride = 5 * d;
    p.factor = element(c.mixed, first, c.dtype), p.factor_stride = 4 * d;
    p.input = element(c.mixed, 2 * all + first, c.dtype), p.input_stride = 4 * d;
    p.grad_input = element(c.grad_mixed, 2 * all + first, c.dtype), p.grad_input_stride = 4 * d;
    p.product = element(c.grad_mixed, first, c.dtype), p.product_stride = 4 * d;
    p.weight = w.weight[i], p.bias = w.bias[i];
    p.pairs = moves_together(2, c.dtype, d / 2, {c.mixed, c.grad_out});
    p.partial_weight = sums.add(p.tiles.splits, channels * taps, element(c.grads, weight_at, wide));
    p.partial_bias = sums.add(p.tiles.splits, channels, element(c.grads, bias_at + first, wide));
    e.launch("group_mix_depthwise_backward", depthwise_backward_kernel(c.dtype, kPositionWindows[i]), shape,
             p);
    first += channels, weight_at += channels * taps;
  }
}

template <class Executor>
void run_attention_backward(Executor& e, const AttentionCall& c) {
  const int64_t d = c.sizes.segment;
  Reductions<Executor> sums(e, c.dtype);
  if (d == 0) return;
  if (c.sizes.batch * c.sizes.tokens() == 0) {
    sums.add(0, d / 2 * (2 * 9 + 3 * 25 + 3 * 49 + 8), c.grads);
    return sums.run();
  }
  check_sizes(c.sizes);
  const PositionWeights w = prepare(e, c);
  launch_position_backward(e, c, w, sums);
  sums.run();
  AttentionBackwardParams p{};
  launch_grad_context(e, c, p);
  const LaunchShape shape = plan_attention_backward(p, c.sizes, c.dtype, e.machine());
  p.grad_out = c.grad_out, p.mixed = c.mixed, p.context = c.context, p.log_sum = c.log_sum;
  p.grad_mixed = c.grad_mixed, p.scale = c.scale;
  e.launch("group_mix_attention_backward", attention_backward_kernel(c.dtype), shape, p);
}

}  // namespace lkconv::cuda
