// backward_weight of small planes that a padding leaves their size, counted through like planar_flat.h's
// outputs: a vector of neighbouring pixels, whatever their rows, meets the outputs for each column of taps,
// which lie a distance before it, and a tap's sum takes their products. K + V loads for K V multiply-adds,
// of bfloat16 two pixels at once where the processor multiplies pairs. Both planes are read where they are.
#pragma once

#include "planar_flat.h"
#include "planar_weight_sums.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// Planes of one channel in some images. Pixel i, counted through, meets for tap (u, v) output i - v * dil +
// pad_w and takes its value from in[i + u * row]. For vector i / L, masks_of_vector apart, columns[v] says
// for which pixels there is an output in the same row, pixels[u] which of them exist, pairs[u * KW + v] both;
// all pixels of vectors that begin in [first, last) exist.
template <class T>
struct FlatPair {
  const T *grad, *in;
  int64_t images, grad_image, in_image;
  int64_t count, dil, pad_w;  // outputs
  int64_t row, first, last;
  const ElementMask *columns, *pixels, *pairs;
  int64_t masks_of_vector;
  float* sums;  // [kernel rows][kernel_w] vectors
  int64_t sums_of_row;
};

LKCONV_INLINE void add_flat_pixels(Vec<float>& sum, const float*, VU32 outputs, VU32 pixels,
                                   ElementMask pairs, bool) {
  sum = add_product(sum, (Vec<float>)outputs, (Vec<float>)pixels, pairs);
}
#if LKCONV_ROW_PAIRS
// What is left out is zero in `outputs`; `exact`: in `pixels` too, which may be infinite.
LKCONV_INLINE void add_flat_pixels(Vec<float>& sum, const bf16*, VU32 outputs, VU32 pixels, ElementMask pairs,
                                   bool exact) {
  if (exact) pixels = (VU32)_mm512_maskz_mov_epi16(pairs, (__m512i)pixels);
  TwoRows::add(sum, (Vec<float>)outputs, (Vec<float>)pixels);
}
#endif

// One vector of pixels; at the plane's edges some may not exist.
template <class T, int K, int V, bool kEdge, bool kExact>
LKCONV_INLINE void add_flat_vector(Vec<float> (&a)[K][V], const FlatPair<T>& r, const T* grad, const T* in,
                                   int64_t i) {
  const int64_t masks = i / kElements<T> * r.masks_of_vector;
  ElementMask columns[V];
  VU32 g[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    columns[v] = r.columns[masks + v];
    VU32 loaded = load_bits(grad + i - v * r.dil + r.pad_w, columns[v]);
    keep(loaded);
    g[v] = loaded;
  }
#pragma GCC unroll 8
  for (int u = 0; u < K; ++u) {
    const T* from = in + i + u * r.row;
    VU32 pixels = kEdge ? load_bits(from, r.pixels[masks + u]) : load_whole(from);
    keep(pixels);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      add_flat_pixels(a[u][v], static_cast<const T*>(nullptr), g[v], pixels,
                      kEdge ? r.pairs[masks + u * V + v] : columns[v], kExact);
  }
}

template <class T, int K, int V, bool kExact>
void correlate_flat(const FlatPair<T>& r) {
  constexpr int L = kElements<T>;
  Vec<float> a[K][V] = {};
  for (int64_t n = 0; n < r.images; ++n) {
    const T *grad = r.grad + n * r.grad_image, *in = r.in + n * r.in_image;
    int64_t i = 0;
    for (; i < r.first; i += L) add_flat_vector<T, K, V, true, kExact>(a, r, grad, in, i);
    for (; i < r.last; i += L) add_flat_vector<T, K, V, false, kExact>(a, r, grad, in, i);
    for (; i < r.count; i += L) add_flat_vector<T, K, V, true, kExact>(a, r, grad, in, i);
  }
  if constexpr (sizeof(T) < sizeof(float) && !kExact) {
    // Zeros may have met infinite pixels.
    Vec<float> total{};
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) total += a[u][v];
    if (_mm512_cmp_ps_mask((__m512)total, (__m512)total, _CMP_UNORD_Q))
      return correlate_flat<T, K, V, true>(r);
  }
  add_sums(r.sums, r.sums_of_row, a);
}

template <class T>
using FlatWeightKernel = void(const FlatPair<T>&);
template <class T, int V, int... K>
LKCONV_INLINE FlatWeightKernel<T>* flat_weight_kernel(int64_t rows, std::integer_sequence<int, K...>) {
  static constexpr FlatWeightKernel<T>* kTable[] = {correlate_flat < T, K + 1, V, sizeof(T) == 4 > ...};
  return kTable[rows - 1];
}
template <class T, int V>
LKCONV_INLINE FlatWeightKernel<T>* flat_weight_kernel(int64_t rows) {
  return flat_weight_kernel<T, V>(rows, std::make_integer_sequence<int, int(flat_weight_rows(V))>());
}
template <class T>
FlatWeightKernel<T>* flat_weight_kernel(int64_t rows, int64_t columns) {
  return columns == 1   ? flat_weight_kernel<T, 1>(rows)
         : columns == 3 ? flat_weight_kernel<T, 3>(rows)
         : columns == 5 ? flat_weight_kernel<T, 5>(rows)
                        : flat_weight_kernel<T, 7>(rows);
}

template <class T>
class FlatWeightTask {
 public:
  FlatWeightTask(const WeightProblem& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        sizes_(flat_weight_sizes(p, sizeof(T))),
        ahead_(p.input, p.height * p.width, p.grad_output, p.out_height * p.out_width, p.batch * p.channels,
               1) {
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(sizes_.bytes)));
    sums_ = reinterpret_cast<float*>(at);
    masks_ = reinterpret_cast<ElementMask*>(at += plan.lanes * sizes_.sums * int64_t(sizeof(float)));
    grad_ = reinterpret_cast<T*>(at += sizes_.masks);
    in_ = reinterpret_cast<T*>(at + sizes_.grad);
    place_masks();
  }

  void run(float* partial, int64_t task) const {
    sum_planes(p_, plan_, sums_, sizes_.sums, partial, task,
               [this](int64_t n, int64_t images, int64_t c, float* sums) { add_planes(n, images, c, sums); });
  }

 private:
  void add_planes(int64_t n, int64_t images, int64_t c, float* sums) const {
    FlatPair<T> r{};
    r.grad = element<T>(p_.grad_output, n, c, 0), r.in = element<T>(p_.input, n, c / p_.channel_div, 0);
    for (int64_t i = 0; i < images; ++i)
      ahead_.request_both(r.in + i * p_.input.stride_n, r.grad + i * p_.grad_output.stride_n, 0);
    r.images = images, r.grad_image = p_.grad_output.stride_n, r.in_image = p_.input.stride_n;
    r.count = p_.out_height * p_.width, r.dil = p_.dil_w, r.pad_w = p_.pad_w;
    r.row = p_.dil_h * p_.width;
    r.columns = masks_, r.masks_of_vector = flat_weight_masks(p_),
    r.sums_of_row = p_.kernel_w * kLanes<float>;
    if (p_.grad_output.stride_h == p_.width && p_.input.stride_h == p_.width) return add_taps(r, sums);
    // Rows with gaps between them are copied next to each other, an image at a time.
    const T *grad = r.grad, *in = r.in;
    r.images = 1, r.grad = grad_, r.in = in_;
    for (int64_t i = 0; i < images; ++i) {
      copy_rows(grad_, grad + i * r.grad_image, p_.grad_output.stride_h, p_.out_height, p_.width);
      copy_rows(in_, in + i * r.in_image, p_.input.stride_h, p_.height, p_.width);
      add_taps(r, sums);
    }
  }

  // As many kernel rows at a time as registers hold sums of.
  void add_taps(FlatPair<T> r, float* sums) const {
    constexpr int64_t L = kElements<T>;
    const T* plane = r.in;
    const int64_t part = even_part(p_.kernel_h, flat_weight_rows(p_.kernel_w));
    for (int64_t u = 0, k; u < p_.kernel_h; u += k) {
      k = std::min(part, p_.kernel_h - u);
      const int64_t move = (u * p_.dil_h - p_.pad_h) * p_.width;
      r.in = plane + move;
      r.pixels = masks_ + p_.kernel_w + u, r.pairs = masks_ + p_.kernel_w + p_.kernel_h + u * p_.kernel_w;
      r.first = std::clamp<int64_t>(round_up(std::max<int64_t>(0, -move), L), 0, r.count);
      r.last = std::min(r.count, p_.height * p_.width - move - (k - 1) * r.row - L + 1);
      r.sums = sums + u * r.sums_of_row;
      flat_weight_kernel<T>(k, p_.kernel_w)(r);
    }
  }

  // Those of FlatPair for each vector of pixels, of all kernel rows.
  void place_masks() const {
    constexpr int64_t L = kElements<T>;
    const int64_t count = p_.out_height * p_.width;
    ElementMask* mask = masks_;
    for (int64_t i = 0; i < count; i += L) {
      const ElementMask *columns = mask, *pixels = mask + p_.kernel_w;
      for (int64_t v = 0; v < p_.kernel_w; ++v)
        *mask++ = bits_in_row(i % p_.width, p_.pad_w - v * p_.dil_w, p_.width, L) &
                  first_elements(std::min(L, count - i));
      for (int64_t u = 0; u < p_.kernel_h; ++u) {
        const int64_t first = i + (u * p_.dil_h - p_.pad_h) * p_.width;
        *mask++ = bits_inside(first, 1, p_.height * p_.width, L);
      }
      for (int64_t u = 0; u < p_.kernel_h; ++u)
        for (int64_t v = 0; v < p_.kernel_w; ++v) *mask++ = pixels[u] & columns[v];
    }
  }

  const WeightProblem& p_;
  const Plan& plan_;
  const FlatWeightSizes sizes_;
  const PlanesAhead<T> ahead_;
  float* sums_;
  ElementMask* masks_;
  T *grad_, *in_;  // planes without gaps
};

// Task = (group of channels, split of the batch).
template <class T>
void weight_flat(const WeightProblem& p, const Plan& plan, float* partial, int64_t task0, int64_t task1) {
  const FlatWeightTask<T> task(p, plan);
  for (int64_t i = task0; i < task1; ++i) task.run(partial, i);
}

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
