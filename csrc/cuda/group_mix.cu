// The CUDA implementations of the Group-Mix ops. Arguments were validated in Python; the checks here guard
// memory safety alone.
#include <initializer_list>
#include <tuple>

#include "../op_arguments.h"
#include "group_mix_run.h"
#include "stream_executor.h"

namespace lkconv::cuda {
namespace {

constexpr int64_t kMostSegment = 496;

// (batch, H, W, d) of tokens whose last dimension has `multiple` segments.
TokenSizes sizes_of(const Tensor& tokens, int64_t height, int64_t width, int64_t multiple, int64_t dim) {
  STD_TORCH_CHECK(tokens.dim() == dim && tokens.is_cuda() && height >= 0 && width >= 0,
                  "lkconv: the tokens must be a ", dim, "-D CUDA tensor");
  const int64_t c = tokens.size(dim - 1);
  STD_TORCH_CHECK(tokens.size(dim - 2) == height * width && c % multiple == 0 && c / multiple % 2 == 0 &&
                      c / multiple <= kMostSegment,
                  "lkconv: the tokens' shape does not fit the image size or the segments");
  return {tokens.size(dim - 3), height, width, c / multiple};
}

// The tensors of one call: on the device of the first one, contiguous, alive until the launches are queued.
class Arguments {
 public:
  explicit Arguments(const Tensor& first) : device_(first.get_device_index()) {}

  void check(const Tensor& t, std::initializer_list<int64_t> sizes, DType dtype, const char* name) const {
    bool same = here(t) && t.dim() == int64_t(sizes.size()) && dtype_of(t) == dtype;
    for (int64_t i = 0; same && i < int64_t(sizes.size()); ++i) same = t.size(i) == sizes.begin()[i];
    STD_TORCH_CHECK(same, "lkconv: ", name, " has the wrong shape, dtype or device");
  }
  const void* tokens(const Tensor& t, std::initializer_list<int64_t> sizes, DType dtype, const char* name) {
    check(t, sizes, dtype, name);
    kept_.push_back(contiguous_tensor(t));
    return kept_.back().const_data_ptr();
  }
  // One tensor (3, B, N, 4d), or those of q, k and v, (B, N, 4d), which the kernels want side by side.
  const void* parts(const Tensors& of, const TokenSizes& s, DType dtype, const char* name) {
    const int64_t batch = s.batch, n = s.tokens(), channels = 4 * s.segment;
    if (of.size() == 1) return tokens(of[0], {3, batch, n, channels}, dtype, name);
    STD_TORCH_CHECK(of.size() == 3, "lkconv: ", name, " has ", of.size(), " tensors, expected 1 or 3");
    for (const Tensor& part : of) check(part, {batch, n, channels}, dtype, name);
    Tensor all = empty_contiguous({3, batch, n, channels}, of[0].scalar_type(), of[0]);
    for (int64_t i = 0; i < 3; ++i) {
      Tensor to = torch::stable::select(all, 0, i);
      torch::stable::copy_(to, of[size_t(i)]);
    }
    kept_.push_back(all);
    return all.const_data_ptr();
  }
  ParameterView parameter(const Tensor& t, int64_t count) {
    STD_TORCH_CHECK(here(t) && t.numel() == count, "lkconv: a parameter must have ", count,
                    " elements on the tokens' device, got ", t.numel());
    kept_.push_back(contiguous_tensor(t));
    return {kept_.back().const_data_ptr(), dtype_of(t)};
  }
  template <size_t N>
  void parameters(ParameterView (&to)[N], const Tensors& from, const int64_t (&counts)[N]) {
    STD_TORCH_CHECK(from.size() == N, "lkconv: expected ", N, " tensors, got ", from.size());
    for (size_t i = 0; i < N; ++i) to[i] = parameter(from[i], counts[i]);
  }
  // The rows of a (4, d) tensor.
  void rows(ParameterView (&to)[4], const Tensor& from, int64_t d) {
    const ParameterView all = parameter(from, 4 * d);
    for (int i = 0; i < 4; ++i) to[i] = {element(all.data, i * d, all.dtype), all.dtype};
  }
  // grad_local may be a slice of a wider tensor, as long as a token's channels are contiguous.
  Tensor dense_tokens(const Tensor& t) {
    const bool dense = t.stride(2) == 1 && t.stride(0) == t.size(1) * t.stride(1) && t.stride(1) >= t.size(2);
    kept_.push_back(dense ? t : contiguous_tensor(t));
    return kept_.back();
  }
  bool here(const Tensor& t) const { return t.is_cuda() && t.get_device_index() == device_; }

 private:
  int32_t device_;
  Tensors kept_;
};

AggregateCall aggregate_call(Arguments& a, const TokenSizes& s, const Tensor& qkv) {
  AggregateCall c;
  c.sizes = s, c.dtype = dtype_of(qkv);
  c.qkv = a.tokens(qkv, {s.batch, s.tokens(), 15 * s.segment}, c.dtype, "qkv");
  return c;
}

void add_mixing(Arguments& a, AggregateCall& c, const Tensors& depthwise, const Tensors& pointwise,
                const Tensor& layer_norm_weight, const Tensor& layer_norm_bias, double eps) {
  const int64_t d = c.sizes.segment;
  a.parameters(c.depthwise, depthwise, {d * 9, d * 25, d * 49, 3 * d * 9});
  a.parameters(c.pointwise, pointwise, {d * d, d * d, d * d, 3 * d * d});
  c.layer_norm[0] = a.parameter(layer_norm_weight, d), c.layer_norm[1] = a.parameter(layer_norm_bias, d);
  c.layer_norm_eps = eps;
}

void add_norms(Arguments& a, AggregateCall& c, const Tensors& weight, const Tensors& bias, double eps) {
  const int64_t d = c.sizes.segment;
  a.parameters(c.norm_weight, weight, {d, d, d, d});
  a.parameters(c.norm_bias, bias, {d, d, d, d});
  c.eps = eps;
}

std::tuple<Tensor, Tensor> op_aggregate(const Tensor& qkv, int64_t height, int64_t width,
                                        const Tensors& depthwise, const Tensors& pointwise,
                                        const Tensors& norm_weight, const Tensors& norm_bias,
                                        const Tensors& norm_mean, const Tensors& norm_var,
                                        const Tensor& layer_norm_weight, const Tensor& layer_norm_bias,
                                        double eps, double layer_norm_eps) {
  const TokenSizes s = sizes_of(qkv, height, width, 15, 3);
  StreamExecutor e(qkv);
  Arguments a(qkv);
  const int64_t d = s.segment;
  AggregateCall c = aggregate_call(a, s, qkv);
  add_mixing(a, c, depthwise, pointwise, layer_norm_weight, layer_norm_bias, layer_norm_eps);
  add_norms(a, c, norm_weight, norm_bias, eps);
  a.parameters(c.norm_mean, norm_mean, {d, d, d, d});
  a.parameters(c.norm_var, norm_var, {d, d, d, d});
  Tensor mixed = empty_contiguous({3, s.batch, s.tokens(), 4 * d}, qkv.scalar_type(), qkv);
  Tensor local = empty_contiguous({s.batch, s.tokens(), d}, qkv.scalar_type(), qkv);
  c.mixed = mixed.mutable_data_ptr(), c.local = local.mutable_data_ptr();
  run_aggregate(e, c);
  return {mixed, local};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> op_mix(const Tensor& qkv, int64_t height, int64_t width,
                                                          const Tensors& depthwise, const Tensors& pointwise,
                                                          const Tensor& layer_norm_weight,
                                                          const Tensor& layer_norm_bias,
                                                          double layer_norm_eps) {
  const TokenSizes s = sizes_of(qkv, height, width, 15, 3);
  StreamExecutor e(qkv);
  Arguments a(qkv);
  const int64_t d = s.segment;
  AggregateCall c = aggregate_call(a, s, qkv);
  add_mixing(a, c, depthwise, pointwise, layer_norm_weight, layer_norm_bias, layer_norm_eps);
  Tensor premix = empty_contiguous({3, s.batch, s.tokens(), 3 * d}, qkv.scalar_type(), qkv);
  Tensor prelocal = empty_contiguous({s.batch, s.tokens(), d}, qkv.scalar_type(), qkv);
  Tensor local = empty_contiguous({s.batch, s.tokens(), d}, qkv.scalar_type(), qkv);
  Tensor mean = empty_contiguous({4, d}, accumulation_type(qkv), qkv),
         var = empty_contiguous({4, d}, accumulation_type(qkv), qkv);
  c.premix = premix.mutable_data_ptr(), c.prelocal = prelocal.mutable_data_ptr();
  c.local = local.mutable_data_ptr();
  c.mean = mean.mutable_data_ptr(), c.var = var.mutable_data_ptr();
  run_mix(e, c);
  return {premix, prelocal, local, mean, var};
}

// What the ops that start from premix share.
AggregateCall normalized_call(Arguments& a, const TokenSizes& s, const Tensor& qkv, const Tensor& premix,
                              const Tensors& norm_weight, const Tensors& norm_bias, const Tensor& mean,
                              const Tensor& var, double eps) {
  AggregateCall c = aggregate_call(a, s, qkv);
  c.premix = const_cast<void*>(a.tokens(premix, {3, s.batch, s.tokens(), 3 * s.segment}, c.dtype, "premix"));
  add_norms(a, c, norm_weight, norm_bias, eps);
  a.rows(c.norm_mean, mean, s.segment), a.rows(c.norm_var, var, s.segment);
  return c;
}

Tensor op_normalize(const Tensor& qkv, const Tensor& premix, const Tensors& norm_weight,
                    const Tensors& norm_bias, const Tensor& mean, const Tensor& var, double eps) {
  const TokenSizes s = sizes_of(qkv, 1, qkv.size(1), 15, 3);
  StreamExecutor e(qkv);
  Arguments a(qkv);
  AggregateCall c = normalized_call(a, s, qkv, premix, norm_weight, norm_bias, mean, var, eps);
  Tensor mixed = empty_contiguous({3, s.batch, s.tokens(), 4 * s.segment}, qkv.scalar_type(), qkv);
  c.mixed = mixed.mutable_data_ptr();
  run_normalize(e, c);
  return mixed;
}

Tensor op_backward_reduce(const Tensors& grad_mixed, const Tensor& qkv, const Tensor& premix,
                          const Tensors& norm_weight, const Tensors& norm_bias, const Tensor& mean,
                          const Tensor& var, double eps) {
  const TokenSizes s = sizes_of(qkv, 1, qkv.size(1), 15, 3);
  StreamExecutor e(qkv);
  Arguments a(qkv);
  AggregateCall c = normalized_call(a, s, qkv, premix, norm_weight, norm_bias, mean, var, eps);
  c.grad_mixed = a.parts(grad_mixed, s, c.dtype, "grad_mixed");
  Tensor sums = empty_contiguous({2, 4, s.segment}, ScalarType::Double, qkv);
  c.sums = sums.mutable_data_ptr();
  run_backward_reduce(e, c);
  return sums;
}

std::tuple<Tensor, Tensor> op_backward(const Tensors& grad_mixed, const Tensor& grad_local, const Tensor& qkv,
                                       const Tensor& premix, const Tensor& prelocal, int64_t height,
                                       int64_t width, const Tensors& depthwise, const Tensors& pointwise,
                                       const Tensors& norm_weight, const Tensors& norm_bias,
                                       const Tensor& mean, const Tensor& var, const Tensor& layer_norm_weight,
                                       const Tensor& layer_norm_bias, double eps, double layer_norm_eps,
                                       const std::optional<Tensor>& sums, double count) {
  const TokenSizes s = sizes_of(qkv, height, width, 15, 3);
  StreamExecutor e(qkv);
  Arguments a(qkv);
  const int64_t d = s.segment, n = s.tokens();
  AggregateCall c = normalized_call(a, s, qkv, premix, norm_weight, norm_bias, mean, var, eps);
  add_mixing(a, c, depthwise, pointwise, layer_norm_weight, layer_norm_bias, layer_norm_eps);
  c.prelocal = const_cast<void*>(a.tokens(prelocal, {s.batch, n, d}, c.dtype, "prelocal"));
  c.grad_mixed = a.parts(grad_mixed, s, c.dtype, "grad_mixed");
  STD_TORCH_CHECK(a.here(grad_local) && grad_local.dim() == 3 && grad_local.size(0) == s.batch &&
                      grad_local.size(1) == n && grad_local.size(2) == d && dtype_of(grad_local) == c.dtype,
                  "lkconv: grad_local has the wrong shape, dtype or device");
  const Tensor local = a.dense_tokens(grad_local);
  c.grad_local = local.const_data_ptr(), c.local_stride = local.stride(1);
  if (sums) c.sums = const_cast<void*>(a.tokens(*sums, {2, 4, d}, DType::f64, "sums"));
  c.count = count;
  Tensor grad_qkv = empty_contiguous({s.batch, n, 15 * d}, qkv.scalar_type(), qkv);
  Tensor grads = empty_contiguous({d * (9 + 25 + 49 + 27) + 6 * d * d + 2 * d}, accumulation_type(qkv), qkv);
  c.grad_qkv = grad_qkv.mutable_data_ptr(), c.grads = grads.mutable_data_ptr();
  run_backward(e, c);
  return {grad_qkv, grads};
}

AttentionCall attention_call(Arguments& a, const TokenSizes& s, const Tensor& mixed, const Tensors& weight,
                             const Tensors& bias, double scale) {
  AttentionCall c;
  c.sizes = s, c.dtype = dtype_of(mixed), c.scale = scale;
  STD_TORCH_CHECK(mixed.size(0) == 3, "lkconv: mixed must be (3, B, N, 4d)");
  c.mixed = a.tokens(mixed, {3, s.batch, s.tokens(), 4 * s.segment}, c.dtype, "mixed");
  const int64_t head = s.segment / 2;
  a.parameters(c.weight, weight, {2 * head * 9, 3 * head * 25, 3 * head * 49});
  a.parameters(c.bias, bias, {2 * head, 3 * head, 3 * head});
  return c;
}

std::tuple<Tensor, Tensor, Tensor> op_attention(const Tensor& mixed, const Tensor& local, int64_t height,
                                                int64_t width, const Tensors& weight, const Tensors& bias,
                                                double scale) {
  const TokenSizes s = sizes_of(mixed, height, width, 4, 4);
  StreamExecutor e(mixed);
  Arguments a(mixed);
  const int64_t d = s.segment, n = s.tokens();
  AttentionCall c = attention_call(a, s, mixed, weight, bias, scale);
  c.local = a.tokens(local, {s.batch, n, d}, c.dtype, "local");
  Tensor out = empty_contiguous({s.batch, n, 5 * d}, mixed.scalar_type(), mixed);
  Tensor log_sum = empty_contiguous({s.batch, 4 * d}, accumulation_type(mixed), mixed);
  Tensor context = empty_contiguous({s.batch, 8, d / 2, d / 2}, accumulation_type(mixed), mixed);
  c.out = out.mutable_data_ptr(), c.log_sum = log_sum.mutable_data_ptr();
  c.context = context.mutable_data_ptr();
  run_attention(e, c);
  return {out, log_sum, context};
}

std::tuple<Tensor, Tensor> op_attention_backward(const Tensor& grad_out, const Tensor& mixed,
                                                 const Tensor& log_sum, const Tensor& context, int64_t height,
                                                 int64_t width, const Tensors& weight, const Tensors& bias,
                                                 double scale) {
  const TokenSizes s = sizes_of(mixed, height, width, 4, 4);
  StreamExecutor e(mixed);
  Arguments a(mixed);
  const int64_t d = s.segment, n = s.tokens(), head = d / 2;
  AttentionCall c = attention_call(a, s, mixed, weight, bias, scale);
  c.grad_out = a.tokens(grad_out, {s.batch, n, 5 * d}, c.dtype, "grad_out");
  c.log_sum = const_cast<void*>(a.tokens(log_sum, {s.batch, 4 * d}, wide_type(c.dtype), "log_sum"));
  c.context = const_cast<void*>(a.tokens(context, {s.batch, 8, head, head}, wide_type(c.dtype), "context"));
  Tensor grad_mixed = empty_contiguous({3, s.batch, n, 4 * d}, mixed.scalar_type(), mixed);
  Tensor grads = empty_contiguous({head * (2 * 9 + 3 * 25 + 3 * 49 + 8)}, accumulation_type(mixed), mixed);
  c.grad_mixed = grad_mixed.mutable_data_ptr(), c.grads = grads.mutable_data_ptr();
  run_attention_backward(e, c);
  return {grad_mixed, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CUDA, m) {
  m.impl("group_mix_aggregate", TORCH_BOX(&op_aggregate));
  m.impl("group_mix_mix", TORCH_BOX(&op_mix));
  m.impl("group_mix_normalize", TORCH_BOX(&op_normalize));
  m.impl("group_mix_backward_reduce", TORCH_BOX(&op_backward_reduce));
  m.impl("group_mix_backward", TORCH_BOX(&op_backward));
  m.impl("group_mix_attention", TORCH_BOX(&op_attention));
  m.impl("group_mix_attention_backward", TORCH_BOX(&op_attention_backward));
}

}  // namespace lkconv::cuda
