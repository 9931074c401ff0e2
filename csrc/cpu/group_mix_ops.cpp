// Binds the Group-Mix kernels to torch tensors through the stable ABI. Arguments were validated in Python;
// the checks here guard memory safety alone.
#include <tuple>

#include "group_mix_launch.h"
#include "half.h"
#include "op_support.h"

namespace lkconv::cpu {
namespace {

Workers workers() {
  return {int64_t(torch::stable::get_num_threads()),
          [](int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
            if (tasks <= 1) return body(0, tasks);
            torch::stable::parallel_for(0, tasks, grain, [&](int64_t a, int64_t b) { body(a, b); });
          }};
}

Tensor checked(const Tensor& t, std::initializer_list<int64_t> sizes, DType dtype, const char* name) {
  bool same = t.is_cpu() && t.dim() == int64_t(sizes.size()) && dtype_of(t) == dtype;
  int64_t i = 0;
  for (int64_t s : sizes) same = same && t.size(i++) == s;
  STD_TORCH_CHECK(same, "lkconv: ", name, " has the wrong shape, dtype or device");
  return contiguous_tensor(t);
}

// A parameter of any floating dtype, as a contiguous array of the accumulation type.
template <class T>
class Parameter {
 public:
  Parameter(const Tensor& t, int64_t count) : tensor_(contiguous_tensor(t)) {
    STD_TORCH_CHECK(t.is_cpu() && t.numel() == count, "lkconv: a parameter has ", t.numel(),
                    " elements, expected ", count);
    const void* data = tensor_.const_data_ptr();
    switch (dtype_of(t)) {
      case DType::f64:
        convert(static_cast<const double*>(data), count, [](double v) { return T(v); });
        break;
      case DType::f32:
        convert(static_cast<const float*>(data), count, [](float v) { return T(v); });
        break;
      case DType::f16:
        convert(static_cast<const uint16_t*>(data), count, [](uint16_t v) { return T(half_to_float(v)); });
        break;
      case DType::bf16:
        convert(static_cast<const uint16_t*>(data), count, [](uint16_t v) { return T(bfloat_to_float(v)); });
        break;
    }
  }
  const T* get() const { return data_; }

 private:
  template <class S, class F>
  void convert(const S* from, int64_t count, F f) {
    if constexpr (std::is_same_v<S, T>) {
      data_ = from;
    } else {
      values_ = Buffer<T>(count);
      for (int64_t i = 0; i < count; ++i) values_[i] = f(from[i]);
      data_ = values_.get();
    }
  }
  Tensor tensor_;
  Buffer<T> values_;
  const T* data_ = nullptr;
};

// The parameters of one call; keeps converted copies alive.
template <class T>
class Parameters {
 public:
  const T* add(const Tensor& t, int64_t count) { return held_.emplace_back(t, count).get(); }
  template <size_t N>
  void add(const T* (&to)[N], const Tensors& tensors, const std::array<int64_t, N>& counts) {
    STD_TORCH_CHECK(tensors.size() == N, "lkconv: expected ", N, " tensors, got ", tensors.size());
    for (size_t i = 0; i < N; ++i) to[i] = add(tensors[i], counts[i]);
  }

 private:
  std::vector<Parameter<T>> held_;
};

TokenShape shape_of(const Tensor& tokens, int64_t height, int64_t width, int64_t multiple, int64_t dim) {
  const int64_t c = tokens.size(tokens.dim() - 1);
  STD_TORCH_CHECK(tokens.dim() == dim && tokens.is_cpu() && height >= 0 && width >= 0 &&
                      tokens.size(dim - 2) == height * width && c % multiple == 0 && c / multiple % 2 == 0 &&
                      c / multiple <= 496,
                  "lkconv: the tokens' shape does not fit the image size or the segments");
  return {tokens.size(dim - 3), height, width, c / multiple};
}

template <class T>
void add_mixing(AggregateWeights<T>& w, Parameters<T>& held, int64_t d, const Tensors& depthwise,
                const Tensors& pointwise, const Tensor& layer_norm_weight, const Tensor& layer_norm_bias,
                double layer_norm_eps) {
  held.add(w.depthwise, depthwise, {d * 9, d * 25, d * 49, 3 * d * 9});
  held.add(w.pointwise, pointwise, {d * d, d * d, d * d, 3 * d * d});
  w.layer_norm_weight = held.add(layer_norm_weight, d);
  w.layer_norm_bias = held.add(layer_norm_bias, d);
  w.layer_norm_eps = layer_norm_eps;
}

// mean and var are (4, d)
template <class T>
void add_norms(AggregateWeights<T>& w, Parameters<T>& held, int64_t d, const Tensors& weight,
               const Tensors& bias, const Tensor& mean, const Tensor& var, double eps) {
  held.add(w.norm_weight, weight, {d, d, d, d});
  held.add(w.norm_bias, bias, {d, d, d, d});
  const T *m = held.add(mean, kMixed * d), *v = held.add(var, kMixed * d);
  for (int64_t s = 0; s < kMixed; ++s) w.norm_mean[s] = m + s * d, w.norm_var[s] = v + s * d;
  w.eps = eps;
}

template <class T>
AggregateTensors<T> tensors_of(const TokenShape& shape, const Tensor& qkv) {
  AggregateTensors<T> t{};
  static_cast<TokenShape&>(t) = shape;
  t.dtype = dtype_of(qkv);
  t.qkv = qkv.const_data_ptr();
  return t;
}

template <class F>
auto with_accumulation(const Tensor& t, F&& f) {
  return t.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

std::tuple<Tensor, Tensor> op_aggregate(const Tensor& qkv, int64_t height, int64_t width,
                                        const Tensors& depthwise, const Tensors& pointwise,
                                        const Tensors& norm_weight, const Tensors& norm_bias,
                                        const Tensors& norm_mean, const Tensors& norm_var,
                                        const Tensor& layer_norm_weight, const Tensor& layer_norm_bias,
                                        double eps, double layer_norm_eps) {
  const TokenShape s = shape_of(qkv, height, width, kParts * kKinds, 3);
  const int64_t d = s.segment;
  const Tensor z = contiguous_tensor(qkv);
  Tensor mixed = empty_contiguous({kParts, s.batch, s.tokens(), kMixed * d}, qkv.scalar_type(), qkv);
  Tensor local = empty_contiguous({s.batch, s.tokens(), d}, qkv.scalar_type(), qkv);
  if (mixed.numel() == 0) return {mixed, local};
  with_accumulation(qkv, [&](auto zero) {
    using T = decltype(zero);
    AggregateWeights<T> w{};
    Parameters<T> held;
    add_mixing(w, held, d, depthwise, pointwise, layer_norm_weight, layer_norm_bias, layer_norm_eps);
    held.add(w.norm_weight, norm_weight, {d, d, d, d});
    held.add(w.norm_bias, norm_bias, {d, d, d, d});
    held.add(w.norm_mean, norm_mean, {d, d, d, d});
    held.add(w.norm_var, norm_var, {d, d, d, d});
    w.eps = eps;
    AggregateTensors<T> t = tensors_of<T>(s, z);
    t.mixed = mixed.mutable_data_ptr(), t.local = local.mutable_data_ptr();
    GroupMix<T>::aggregate(t, w, active_isa(), workers());
  });
  return {mixed, local};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> op_mix(const Tensor& qkv, int64_t height, int64_t width,
                                                          const Tensors& depthwise, const Tensors& pointwise,
                                                          const Tensor& layer_norm_weight,
                                                          const Tensor& layer_norm_bias,
                                                          double layer_norm_eps) {
  const TokenShape s = shape_of(qkv, height, width, kParts * kKinds, 3);
  const int64_t d = s.segment;
  const Tensor z = contiguous_tensor(qkv);
  Tensor premix = empty_contiguous({kParts, s.batch, s.tokens(), (kMixed - 1) * d}, qkv.scalar_type(), qkv);
  Tensor prelocal = empty_contiguous({s.batch, s.tokens(), d}, qkv.scalar_type(), qkv);
  Tensor local = empty_contiguous({s.batch, s.tokens(), d}, qkv.scalar_type(), qkv);
  Tensor mean = empty_contiguous({kMixed, d}, accumulation_type(qkv), qkv),
         var = empty_contiguous({kMixed, d}, accumulation_type(qkv), qkv);
  with_accumulation(qkv, [&](auto zero) {
    using T = decltype(zero);
    AggregateWeights<T> w{};
    Parameters<T> held;
    add_mixing(w, held, d, depthwise, pointwise, layer_norm_weight, layer_norm_bias, layer_norm_eps);
    AggregateTensors<T> t = tensors_of<T>(s, z);
    t.premix_out = premix.mutable_data_ptr(), t.prelocal_out = prelocal.mutable_data_ptr();
    t.local = local.mutable_data_ptr();
    GroupMix<T>::mix(t, w, static_cast<T*>(mean.mutable_data_ptr()), static_cast<T*>(var.mutable_data_ptr()),
                     active_isa(), workers());
  });
  return {premix, prelocal, local, mean, var};
}

Tensor op_normalize(const Tensor& qkv, const Tensor& premix, const Tensors& norm_weight,
                    const Tensors& norm_bias, const Tensor& mean, const Tensor& var, double eps) {
  const TokenShape s = shape_of(qkv, 1, qkv.size(1), kParts * kKinds, 3);
  const int64_t d = s.segment;
  const Tensor z = contiguous_tensor(qkv);
  const Tensor u = checked(premix, {kParts, s.batch, s.tokens(), (kMixed - 1) * d}, dtype_of(qkv), "premix");
  Tensor mixed = empty_contiguous({kParts, s.batch, s.tokens(), kMixed * d}, qkv.scalar_type(), qkv);
  if (mixed.numel() == 0) return mixed;
  with_accumulation(qkv, [&](auto zero) {
    using T = decltype(zero);
    AggregateWeights<T> w{};
    Parameters<T> held;
    add_norms(w, held, d, norm_weight, norm_bias, mean, var, eps);
    AggregateTensors<T> t = tensors_of<T>(s, z);
    t.premix = u.const_data_ptr(), t.mixed = mixed.mutable_data_ptr();
    GroupMix<T>::normalize(t, w, active_isa(), workers());
  });
  return mixed;
}

// The gradient of mixed, as one tensor (3, B, N, 4d) or as three (B, N, 4d).
Tensors checked_parts(const Tensors& grad_mixed, const TokenShape& s, DType dtype) {
  const int64_t channels = kMixed * s.segment;
  if (grad_mixed.size() == 1)
    return {checked(grad_mixed[0], {kParts, s.batch, s.tokens(), channels}, dtype, "grad_mixed")};
  STD_TORCH_CHECK(int64_t(grad_mixed.size()) == kParts, "lkconv: grad_mixed has ", grad_mixed.size(),
                  " tensors, expected 1 or 3");
  Tensors parts;
  for (const Tensor& g : grad_mixed)
    parts.push_back(checked(g, {s.batch, s.tokens(), channels}, dtype, "grad_mixed"));
  return parts;
}

template <class T>
void set_grad_mixed(AggregateTensors<T>& t, const Tensors& parts) {
  const int64_t part = t.batch * t.tokens() * kMixed * t.segment * dtype_size(t.dtype);
  for (int64_t i = 0; i < kParts; ++i)
    t.grad_mixed[i] = parts.size() == 1 ? static_cast<const char*>(parts[0].const_data_ptr()) + i * part
                                        : parts[size_t(i)].const_data_ptr();
}

Tensor op_backward_reduce(const Tensors& grad_mixed, const Tensor& qkv, const Tensor& premix,
                          const Tensors& norm_weight, const Tensors& norm_bias, const Tensor& mean,
                          const Tensor& var, double eps) {
  const TokenShape s = shape_of(qkv, 1, qkv.size(1), kParts * kKinds, 3);
  const int64_t d = s.segment;
  const Tensor z = contiguous_tensor(qkv);
  const Tensor u = checked(premix, {kParts, s.batch, s.tokens(), (kMixed - 1) * d}, dtype_of(qkv), "premix");
  const Tensors g = checked_parts(grad_mixed, s, dtype_of(qkv));
  Tensor sums = empty_contiguous({2, kMixed, d}, ScalarType::Double, qkv);
  with_accumulation(qkv, [&](auto zero) {
    using T = decltype(zero);
    AggregateWeights<T> w{};
    Parameters<T> held;
    add_norms(w, held, d, norm_weight, norm_bias, mean, var, eps);
    AggregateTensors<T> t = tensors_of<T>(s, z);
    t.premix = u.const_data_ptr(), set_grad_mixed(t, g);
    GroupMix<T>::backward_reduce(t, w, static_cast<double*>(sums.mutable_data_ptr()), active_isa(),
                                 workers());
  });
  return sums;
}

// grad_local may be a slice of a wider tensor, as long as a token's channels are contiguous.
Tensor dense_tokens(const Tensor& t) {
  const bool dense = t.stride(2) == 1 && t.stride(0) == t.size(1) * t.stride(1) && t.stride(1) >= t.size(2);
  return dense ? t : contiguous_tensor(t);
}

std::tuple<Tensor, Tensor> op_backward(const Tensors& grad_mixed, const Tensor& grad_local, const Tensor& qkv,
                                       const Tensor& premix, const Tensor& prelocal, int64_t height,
                                       int64_t width, const Tensors& depthwise, const Tensors& pointwise,
                                       const Tensors& norm_weight, const Tensors& norm_bias,
                                       const Tensor& mean, const Tensor& var, const Tensor& layer_norm_weight,
                                       const Tensor& layer_norm_bias, double eps, double layer_norm_eps,
                                       const std::optional<Tensor>& sums, double count) {
  const TokenShape s = shape_of(qkv, height, width, kParts * kKinds, 3);
  const int64_t d = s.segment, n = s.tokens();
  const DType dtype = dtype_of(qkv);
  const Tensor z = contiguous_tensor(qkv);
  const Tensor u = checked(premix, {kParts, s.batch, n, (kMixed - 1) * d}, dtype, "premix");
  const Tensor v = checked(prelocal, {s.batch, n, d}, dtype, "prelocal");
  const Tensors g = checked_parts(grad_mixed, s, dtype);
  STD_TORCH_CHECK(grad_local.dim() == 3 && grad_local.numel() == s.batch * n * d && grad_local.is_cpu() &&
                      grad_local.size(2) == d && grad_local.size(1) == n && dtype_of(grad_local) == dtype,
                  "lkconv: grad_local has the wrong shape, dtype or device");
  const Tensor gl = dense_tokens(grad_local);
  Tensor grad_qkv = empty_contiguous({s.batch, n, kParts * kKinds * d}, qkv.scalar_type(), qkv);
  Tensor grads = empty_contiguous({d * (9 + 25 + 49 + 27) + 6 * d * d + 2 * d}, accumulation_type(qkv), qkv);
  with_accumulation(qkv, [&](auto zero) {
    using T = decltype(zero);
    AggregateWeights<T> w{};
    Parameters<T> held;
    add_mixing(w, held, d, depthwise, pointwise, layer_norm_weight, layer_norm_bias, layer_norm_eps);
    add_norms(w, held, d, norm_weight, norm_bias, mean, var, eps);
    AggregateTensors<T> t = tensors_of<T>(s, z);
    t.premix = u.const_data_ptr(), t.prelocal = v.const_data_ptr(), set_grad_mixed(t, g);
    t.grad_local = gl.const_data_ptr(), t.local_stride = gl.stride(1),
    t.grad_qkv = grad_qkv.mutable_data_ptr();
    Parameters<double> total;
    const double* given = sums ? total.add(*sums, 2 * kMixed * d) : nullptr;
    GroupMix<T>::backward(t, w, given, count, static_cast<T*>(grads.mutable_data_ptr()), active_isa(),
                          workers());
  });
  return {grad_qkv, grads};
}

template <class T>
AttentionTensors<T> attention_tensors(const TokenShape& s, const Tensor& mixed, const Tensors& weight,
                                      const Tensors& bias, double scale, Parameters<T>& held) {
  AttentionTensors<T> t{};
  static_cast<TokenShape&>(t) = s;
  t.dtype = dtype_of(mixed), t.mixed = mixed.const_data_ptr(), t.scale = scale;
  const int64_t head = s.head();
  held.add(t.weight, weight, {2 * head * 9, 3 * head * 25, 3 * head * 49});
  held.add(t.bias, bias, {2 * head, 3 * head, 3 * head});
  return t;
}

std::tuple<Tensor, Tensor, Tensor> op_attention(const Tensor& mixed, const Tensor& local, int64_t height,
                                                int64_t width, const Tensors& weight, const Tensors& bias,
                                                double scale) {
  const TokenShape s = shape_of(mixed, height, width, kMixed, 4);
  const int64_t d = s.segment, n = s.tokens();
  const Tensor m = checked(mixed, {kParts, s.batch, n, kMixed * d}, dtype_of(mixed), "mixed");
  const Tensor l = checked(local, {s.batch, n, d}, dtype_of(mixed), "local");
  Tensor out = empty_contiguous({s.batch, n, kKinds * d}, mixed.scalar_type(), mixed);
  Tensor log_sum = empty_contiguous({s.batch, kMixed * d}, accumulation_type(mixed), mixed);
  Tensor context = empty_contiguous({s.batch, kHeads, s.head(), s.head()}, accumulation_type(mixed), mixed);
  if (out.numel() == 0) return {out, log_sum, context};
  with_accumulation(mixed, [&](auto zero) {
    using T = decltype(zero);
    Parameters<T> held;
    AttentionTensors<T> t = attention_tensors<T>(s, m, weight, bias, scale, held);
    t.local = l.const_data_ptr(), t.out = out.mutable_data_ptr();
    GroupMixCore<T>::forward(t, static_cast<T*>(log_sum.mutable_data_ptr()),
                             static_cast<T*>(context.mutable_data_ptr()), active_isa(), workers());
  });
  return {out, log_sum, context};
}

std::tuple<Tensor, Tensor> op_attention_backward(const Tensor& grad_out, const Tensor& mixed,
                                                 const Tensor& log_sum, const Tensor& context, int64_t height,
                                                 int64_t width, const Tensors& weight, const Tensors& bias,
                                                 double scale) {
  const TokenShape s = shape_of(mixed, height, width, kMixed, 4);
  const int64_t d = s.segment, n = s.tokens(), head = s.head();
  const DType wide = mixed.scalar_type() == ScalarType::Double ? DType::f64 : DType::f32;
  const Tensor m = checked(mixed, {kParts, s.batch, n, kMixed * d}, dtype_of(mixed), "mixed");
  const Tensor g = checked(grad_out, {s.batch, n, kKinds * d}, dtype_of(mixed), "grad_out");
  const Tensor sum = checked(log_sum, {s.batch, kMixed * d}, wide, "log_sum");
  const Tensor c = checked(context, {s.batch, kHeads, head, head}, wide, "context");
  Tensor grad_mixed = empty_contiguous({kParts, s.batch, n, kMixed * d}, mixed.scalar_type(), mixed);
  Tensor grads =
      empty_contiguous({head * (2 * 9 + 3 * 25 + 3 * 49 + kHeads)}, accumulation_type(mixed), mixed);
  with_accumulation(mixed, [&](auto zero) {
    using T = decltype(zero);
    Parameters<T> held;
    AttentionTensors<T> t = attention_tensors<T>(s, m, weight, bias, scale, held);
    t.grad_out = g.const_data_ptr(), t.grad_mixed = grad_mixed.mutable_data_ptr();
    GroupMixCore<T>::backward(t, static_cast<const T*>(sum.const_data_ptr()),
                              static_cast<const T*>(c.const_data_ptr()),
                              static_cast<T*>(grads.mutable_data_ptr()), active_isa(), workers());
  });
  return {grad_mixed, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lkconv, CPU, m) {
  m.impl("group_mix_aggregate", TORCH_BOX(&op_aggregate));
  m.impl("group_mix_mix", TORCH_BOX(&op_mix));
  m.impl("group_mix_normalize", TORCH_BOX(&op_normalize));
  m.impl("group_mix_backward_reduce", TORCH_BOX(&op_backward_reduce));
  m.impl("group_mix_backward", TORCH_BOX(&op_backward));
  m.impl("group_mix_attention", TORCH_BOX(&op_attention));
  m.impl("group_mix_attention_backward", TORCH_BOX(&op_attention_backward));
}

}  // namespace lkconv::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(lkconv, m) {
  // (mixed (3, B, N, 4d), local (B, N, d)) with fixed statistics
  m.def(
      "group_mix_aggregate(Tensor qkv, SymInt height, SymInt width, Tensor[] depthwise, Tensor[] pointwise, "
      "Tensor[] norm_weight, Tensor[] norm_bias, Tensor[] norm_mean, Tensor[] norm_var, Tensor "
      "layer_norm_weight, "
      "Tensor layer_norm_bias, float eps, float layer_norm_eps) -> (Tensor, Tensor)");
  // (premix (3, B, N, 3d), prelocal (B, N, d), local (B, N, d), mean (4, d), biased var (4, d))
  m.def(
      "group_mix_mix(Tensor qkv, SymInt height, SymInt width, Tensor[] depthwise, Tensor[] pointwise, "
      "Tensor layer_norm_weight, Tensor layer_norm_bias, float layer_norm_eps) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "group_mix_normalize(Tensor qkv, Tensor premix, Tensor[] norm_weight, Tensor[] norm_bias, Tensor mean, "
      "Tensor var, float eps) -> Tensor");
  // (2, 4, d), float64: sums of dA and of dA times the normalised U. grad_mixed is one tensor (3, B, N, 4d)
  // or three, of q, k and v
  m.def(
      "group_mix_backward_reduce(Tensor[] grad_mixed, Tensor qkv, Tensor premix, Tensor[] norm_weight, "
      "Tensor[] norm_bias, Tensor mean, Tensor var, float eps) -> Tensor");
  // (grad_qkv, gradients of depthwise, pointwise, layer_norm_weight and layer_norm_bias one after the other)
  m.def(
      "group_mix_backward(Tensor[] grad_mixed, Tensor grad_local, Tensor qkv, Tensor premix, Tensor "
      "prelocal, "
      "SymInt height, SymInt width, Tensor[] depthwise, Tensor[] pointwise, Tensor[] norm_weight, Tensor[] "
      "norm_bias, "
      "Tensor mean, Tensor var, Tensor layer_norm_weight, Tensor layer_norm_bias, float eps, float "
      "layer_norm_eps, "
      "Tensor? sums, float count) -> (Tensor, Tensor)");
  // (out (B, N, 5d), log_sum (B, 4d), context (B, 8, d/2, d/2))
  m.def(
      "group_mix_attention(Tensor mixed, Tensor local, SymInt height, SymInt width, Tensor[] "
      "position_weight, "
      "Tensor[] position_bias, float scale) -> (Tensor, Tensor, Tensor)");
  // (grad_mixed, gradients of position_weight and position_bias one after the other)
  m.def(
      "group_mix_attention_backward(Tensor grad_out, Tensor mixed, Tensor log_sum, Tensor context, SymInt "
      "height, "
      "SymInt width, Tensor[] position_weight, Tensor[] position_bias, float scale) -> (Tensor, Tensor)");
}
