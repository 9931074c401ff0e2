// The fold of branch kernels and its adjoint (csrc/merge_problem.h), one channel after the other: the dense
// kernel of a channel stays in scratch, in the accumulation type, while every branch passes over it once.
// Rows of undilated branches are vectors; a branch as large as the kernel is a single row.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// f(S{}) for the element type behind `dtype`. float64 reaches float kernels never: see MergeProblem::wide.
template <class T, class F>
LKCONV_INLINE void with_element(DType dtype, F&& f) {
  if (dtype == DType::f32)
    f(float());
  else if (dtype == DType::f16)
    f(f16());
  else if (dtype == DType::bf16)
    f(bf16());
  else if constexpr (std::is_same_v<T, double>)
    f(double());
}

template <class T>
T channel_value(const ChannelVector& v, int64_t c, T absent) {
  if (!v.data) return absent;
  T value{};
  with_element<T>(v.dtype,
                  [&](auto s) { value = T(scalar_load(static_cast<decltype(s)*>(v.data) + c * v.stride)); });
  return value;
}

template <class T>
void set_channel_value(const ChannelVector& v, int64_t c, T value) {
  with_element<T>(v.dtype,
                  [&](auto s) { scalar_store(static_cast<decltype(s)*>(v.data) + c * v.stride, value); });
}

// Whether vectors of T are loaded from and stored to elements of S: all but float64 sums of narrower
// elements.
template <class T, class S>
constexpr bool kVectorised = std::is_same_v<T, double> == std::is_same_v<S, double>;

// Rows of one branch in one channel: `taps` apart by `step` in the kernel, by `stride` in the weight.
struct MergeRows {
  int64_t rows, taps;
  int64_t kernel_step_row, step, weight_step_row, stride;
};

inline MergeRows merge_rows(const MergeProblem& p, const MergeBranch& b, int64_t row_stride, int64_t stride) {
  const bool whole = b.kernel_h == p.kernel_h && b.kernel_w == p.kernel_w && stride == 1;
  if (whole && row_stride == b.kernel_w) return {1, p.taps(), 0, 1, 0, 1};
  return {b.kernel_h, b.kernel_w, b.step_h * p.kernel_w, b.step_w, row_stride, stride};
}

// to[v step] += scale from[v stride]
template <class T, class S>
LKCONV_INLINE void add_row(T* to, const S* from, const MergeRows& r, T scale) {
  int64_t v = 0;
  if constexpr (kVectorised<T, S>) {
    if (r.step == 1 && r.stride == 1) {
      for (; v + kLanes<T> <= r.taps; v += kLanes<T>)
        store(to + v, load(to + v) + scale * load_as(from + v, T()));
      if (const int64_t rest = r.taps - v)
        store_part(to + v, load_part(to + v, rest, T()) + scale * load_part(from + v, rest, T()), rest);
      return;
    }
  }
  for (; v < r.taps; ++v) to[v * r.step] += scale * T(scalar_load(from + v * r.stride));
}

template <class T>
void store_plane(const TensorView& to, int64_t c, const T* from, int64_t count) {
  with_element<T>(to.dtype, [&](auto s) {
    using S = decltype(s);
    S* out = static_cast<S*>(to.data) + c * count;
    int64_t i = 0;
    if constexpr (kVectorised<T, S>) {
      for (; i + kLanes<T> <= count; i += kLanes<T>) store_from(out + i, load(from + i));
      if (i < count) store_part(out + i, load_part(from + i, count - i, T()), count - i);
    } else {
      for (; i < count; ++i) scalar_store(out + i, from[i]);
    }
  });
}

template <class T>
void merge_kernels(const MergeProblem& p, int64_t channel0, int64_t channel1) {
  T* kernel = thread_scratch<T>(p.taps());
  for (int64_t c = channel0; c < channel1; ++c) {
    std::fill(kernel, kernel + p.taps(), T(0));
    for (const MergeBranch* b = p.branches; b != p.branches + p.branch_count; ++b) {
      const T scale = channel_value(b->scale, c, T(1));
      const MergeRows r = merge_rows(p, *b, b->weight.stride_h, b->weight.stride_w);
      T* to = kernel + b->offset_h * p.kernel_w + b->offset_w;
      with_element<T>(b->weight.dtype, [&](auto s) {
        const auto* from = static_cast<decltype(s)*>(b->weight.data) + c * b->weight.stride_c;
        for (int64_t u = 0; u < r.rows; ++u)
          add_row(to + u * r.kernel_step_row, from + u * r.weight_step_row, r, scale);
      });
    }
    store_plane(p.kernel, c, kernel, p.taps());
    T bias = 0;
    for (int64_t j = 0; j < p.bias_count; ++j) bias += channel_value(p.biases[j], c, T(0));
    set_channel_value(p.bias, c, bias);
  }
}

// out[v] = scale grad[v step]
template <class T, class S>
LKCONV_INLINE void gather_row(S* out, const T* grad, const MergeRows& r, T scale) {
  int64_t v = 0;
  if constexpr (kVectorised<T, S>) {
    if (r.step == 1) {
      for (; v + kLanes<T> <= r.taps; v += kLanes<T>) store_from(out + v, scale * load(grad + v));
      if (v < r.taps) store_part(out + v, scale * load_part(grad + v, r.taps - v, T()), r.taps - v);
      return;
    }
  }
  for (; v < r.taps; ++v) scalar_store(out + v, scale * grad[v * r.step]);
}

// sum_v grad[v step] from[v stride]
template <class T, class S>
LKCONV_INLINE T dot_row(const T* grad, const S* from, const MergeRows& r) {
  T sum = 0;
  int64_t v = 0;
  if constexpr (kVectorised<T, S>) {
    if (r.step == 1 && r.stride == 1) {
      Vec<T> sums{};
      for (; v + kLanes<T> <= r.taps; v += kLanes<T>) sums += load(grad + v) * load_as(from + v, T());
      if (v < r.taps) sums += load_part(grad + v, r.taps - v, T()) * load_part(from + v, r.taps - v, T());
      for (int l = 0; l < kLanes<T>; ++l) sum += sums[l];
      return sum;
    }
  }
  for (; v < r.taps; ++v) sum += grad[v * r.step] * T(scalar_load(from + v * r.stride));
  return sum;
}

template <class T, class S>
void gather_branch(const MergeProblem& p, const MergeBranch& b, int64_t c, const T* grad) {
  const T scale = channel_value(b.scale, c, T(1));
  const T* from = grad + b.offset_h * p.kernel_w + b.offset_w;
  const MergeRows out = merge_rows(p, b, b.kernel_w, 1);
  S* to = static_cast<S*>(b.grad_weight) + c * b.kernel_h * b.kernel_w;
  for (int64_t u = 0; u < out.rows; ++u)
    gather_row(to + u * b.kernel_w, from + u * out.kernel_step_row, out, scale);
  if (!b.grad_scale.data) return;
  const MergeRows r = merge_rows(p, b, b.weight.stride_h, b.weight.stride_w);
  const S* weight = static_cast<const S*>(b.weight.data) + c * b.weight.stride_c;
  T sum = 0;
  for (int64_t u = 0; u < r.rows; ++u)
    sum += dot_row(from + u * r.kernel_step_row, weight + u * r.weight_step_row, r);
  set_channel_value(b.grad_scale, c, sum);
}

template <class T>
void merge_kernels_backward(const MergeProblem& p, int64_t channel0, int64_t channel1) {
  T* grad = thread_scratch<T>(p.taps());
  for (int64_t c = channel0; c < channel1; ++c) {
    with_element<T>(p.kernel.dtype, [&](auto s) {
      const MergeRows whole{1, p.taps(), 0, 1, 0, 1};
      std::fill(grad, grad + p.taps(), T(0));
      add_row(grad, static_cast<const decltype(s)*>(p.kernel.data) + c * p.taps(), whole, T(1));
    });
    for (const MergeBranch* b = p.branches; b != p.branches + p.branch_count; ++b)
      with_element<T>(b->weight.dtype, [&](auto s) { gather_branch<T, decltype(s)>(p, *b, c, grad); });
    const T bias = p.bias_count ? channel_value(p.bias, c, T(0)) : T(0);
    for (int64_t j = 0; j < p.bias_count; ++j) set_channel_value(p.biases[j], c, bias);
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
