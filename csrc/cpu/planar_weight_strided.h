// backward_weight of tensors whose rows are read in place, at a stride of 2 in both directions without
// dilation: lanes are neighbouring outputs of a row, sums belong to taps. Pixels are dealt to even and odd
// ones, shifted in registers for each of V columns of taps, and multiplied with every row of outputs that
// they meet, of a block of Y. Pixels and outputs that do not exist are masked out of the products, so that
// none with the halo's zeros is formed.
#pragma once

#include "planar_weight_sums.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// What one column of taps meets in one block of columns: the lanes whose pixel and output exist, and which of
// the pixels from that column on exist, as many as two blocks would read.
struct TapColumn {
  ElementMask pairs;
  DealtMasks pixels, next;
};
static_assert(sizeof(TapColumn) == kTapColumnBytes);

// Rows of one channel's grad_output, in some images, and the pixels of the input that the kernel's first row
// and column of this call meet.
template <class T>
struct PlanePair {
  const T *grad, *in;
  int64_t images, grad_image, in_image;
  int64_t grad_row, in_row;
  int64_t first, height;  // the image's row at `in`, and how many rows there are
  int64_t rows, columns;  // of grad_output
  const TapColumn* taps;  // [block of columns][kernel_w], from the first column of this call on
  int64_t taps_of_block;
  float* sums;  // [kernel rows][kernel_w] vectors
  int64_t sums_of_row;
  // Planes whose successors are asked for beside these sums, if any, from step `step` on.
  const PlanesAhead<T>* ahead;
  const T *grad_plane, *in_plane;
  int64_t step;
};

// kLanes<float> elements of [a b] from element kFrom on.
template <int kFrom>
LKCONV_INLINE Vec<float> shifted(Vec<float> a, Vec<float> b) {
  if constexpr (kFrom == 0) return a;
  return (Vec<float>)_mm512_alignr_epi32((__m512i)b, (__m512i)a, kFrom);
}
template <int V, int... v>
LKCONV_INLINE void shift_columns(Vec<float> (&p)[V], const Vec<float> (&first)[2],
                                 const Vec<float> (&next)[2], std::integer_sequence<int, v...>) {
  ((p[v] = shifted<v / 2>(first[v % 2], next[v % 2])), ...);
}

// The pixels of V columns of taps in one row of the image: of whole rows loaded once, as most loads would
// cross a cache line. `wide`: whether a column's pixels reach into the next block's.
template <int V, class T>
LKCONV_INLINE void load_columns(Vec<float> (&p)[V], const T* in, const TapColumn& taps, bool wide) {
  Vec<float> first[2], next[2] = {};
  load_dealt(first[0], first[1], in, taps.pixels);
  if (V > 2 && wide) load_dealt(next[0], next[1], in + 2 * kLanes<float>, taps.next);
  shift_columns(p, first, next, std::make_integer_sequence<int, V>());
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) keep(p[v]);
}

// One block of `rows` rows, all Y of them if kWhole, by one vector of outputs.
template <bool kWhole, int K, int V, class T>
LKCONV_INLINE void correlate_planes_block(Vec<float> (&a)[K][V], const T* grad, int64_t grad_row,
                                          int64_t rows, ElementMask outputs, const T* in, int64_t in_row,
                                          uint32_t inside, const TapColumn* columns) {
  constexpr int Y = int(kWeightBlockRows);
  ElementMask pairs[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) pairs[v] = columns[v].pairs;
  const TapColumn taps = columns[0];
  const bool wide = outputs >> (kLanes<float> - (V - 1) / 2);
  Vec<float> g[Y];
#pragma GCC unroll 8
  for (int y = 0; y < Y; ++y, grad += grad_row)
    g[y] = kWhole || y < rows ? load_as_floats(grad, outputs) : Vec<float>{};
#pragma GCC unroll 32
  for (int i = 0; i < (Y - 1) * 2 + K; ++i, in += in_row) {
    if (!(inside & (1u << i))) continue;
    Vec<float> p[V];
    load_columns<V>(p, in, taps, wide);
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      const int y = (i - u) / 2;
      if (i < u || (i - u) % 2 || y >= Y || !(kWhole || y < rows)) continue;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) a[u][v] = add_product(a[u][v], g[y], p[v], pairs[v]);
    }
  }
}

// The sums of one image's rows.
template <int K, int V, class T>
LKCONV_INLINE void correlate_planes_image(Vec<float> (&a)[K][V], const PlanePair<T>& r, int64_t image) {
  constexpr int Y = int(kWeightBlockRows), L = kLanes<float>;
  const T *grad_rows = r.grad + image * r.grad_image, *in_rows = r.in + image * r.in_image;
  for (int64_t y = 0; y < r.rows; y += Y) {
    if (r.ahead)
      r.ahead->request_both(r.in_plane + image * r.in_image, r.grad_plane + image * r.grad_image,
                            r.step + y / Y);
    const int64_t rows = std::min<int64_t>(Y, r.rows - y), top = y * 2;
    const uint32_t rows_inside = bits_inside(r.first + top, 1, r.height, (rows - 1) * 2 + K);
    const TapColumn* taps = r.taps;
    for (int64_t x = 0; x < r.columns; x += L, taps += r.taps_of_block) {
      const T *grad = grad_rows + y * r.grad_row + x, *in = in_rows + top * r.in_row + x * 2;
      const ElementMask outputs = first_elements(std::min<int64_t>(L, r.columns - x));
      const uint32_t inside = in_register(rows_inside);
      if (rows == Y)
        correlate_planes_block<true, K, V>(a, grad, r.grad_row, rows, outputs, in, r.in_row, inside, taps);
      else
        correlate_planes_block<false, K, V>(a, grad, r.grad_row, rows, outputs, in, r.in_row, inside, taps);
    }
  }
}

template <class T, int K, int V>
void correlate_planes(const PlanePair<T>& r) {
  Vec<float> a[K][V] = {};
  for (int64_t n = 0; n < r.images; ++n) correlate_planes_image<K, V>(a, r, n);
  add_sums(r.sums, r.sums_of_row, a);
}

template <class T>
using PlaneKernel = void(const PlanePair<T>&);
template <class T, int K, int... V>
LKCONV_INLINE PlaneKernel<T>* const* plane_kernels(std::integer_sequence<int, V...>) {
  static constexpr PlaneKernel<T>* kTable[] = {correlate_planes<T, K, V + 1>...};
  return kTable;
}
template <class T>
LKCONV_INLINE PlaneKernel<T>* plane_kernel(int64_t rows, int64_t columns) {
  const auto of = [&](auto k) {
    constexpr int K = decltype(k)::value;
    return plane_kernels<T, K>(std::make_integer_sequence<int, int(weight_columns(K))>())[columns - 1];
  };
  return rows == 1   ? of(std::integral_constant<int, 1>())
         : rows == 2 ? of(std::integral_constant<int, 2>())
                     : of(std::integral_constant<int, 3>());
}

template <class T>
class StridedWeightTask {
 public:
  StridedWeightTask(const WeightProblem& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        ahead_(p.input, p.height * p.width, p.grad_output, p.out_height * p.out_width, p.batch * p.channels,
               ceil_div(p.out_height, kWeightBlockRows)) {
    const PlanarWeightSizes s = planar_weight_sizes(p, plan.lanes);
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(s.bytes)));
    sums_ = reinterpret_cast<float*>(at);
    sums_of_channel_ = s.sums;
    columns_ = reinterpret_cast<TapColumn*>(at + plan.lanes * s.sums * int64_t(sizeof(float)));
    TapColumn* column = columns_;
    for (int64_t x = 0; x < p.out_width; x += kLanes<float>)
      for (int64_t v = 0; v < p.kernel_w; ++v) *column++ = tap_column(x, v);
  }

  void run(float* partial, int64_t task) const {
    sum_planes(p_, plan_, sums_, sums_of_channel_, partial, task,
               [this](int64_t n, int64_t images, int64_t c, float* sums) { add_planes(n, images, c, sums); });
  }

 private:
  TapColumn tap_column(int64_t x, int64_t v) const {
    const int64_t first = 2 * x + v - p_.pad_w, L = kLanes<float>;
    const ElementMask pairs = bits_inside(first, 2, p_.width, std::min(L, p_.out_width - x));
    return {pairs, dealt_masks<T>(first, p_.width), dealt_masks<T>(first + 2 * L, p_.width)};
  }

  // Tiles of rows are summed apart, so that no sum grows long.
  void add_planes(int64_t n, int64_t images, int64_t c, float* sums) const {
    PlanePair<T> r{};
    r.in_plane = element<T>(p_.input, n, c / p_.channel_div, 0);
    r.grad_plane = element<T>(p_.grad_output, n, c, 0);
    r.images = images, r.grad_image = p_.grad_output.stride_n, r.in_image = p_.input.stride_n;
    r.grad_row = p_.grad_output.stride_h, r.in_row = p_.input.stride_h;
    r.height = p_.height, r.columns = p_.out_width;
    r.taps_of_block = p_.kernel_w, r.sums_of_row = p_.kernel_w * kLanes<float>;
    for (int64_t y = 0; y < p_.out_height; y += plan_.tile_h) {
      r.rows = std::min(plan_.tile_h, p_.out_height - y);
      r.grad = r.grad_plane + y * r.grad_row;
      r.ahead = &ahead_, r.step = y / kWeightBlockRows;
      add_rows(r, 2 * y - p_.pad_h, sums);
    }
  }

  // Every tap of a tile of rows, the first of which meets the image's row `top`.
  void add_rows(PlanePair<T>& r, int64_t top, float* sums) const {
    for (int64_t u = 0, k; u < p_.kernel_h; u += k) {
      k = std::min(kMaxWeightRows, p_.kernel_h - u);
      r.first = top + u;
      const int64_t width = even_part(p_.kernel_w, weight_columns(k));
      for (int64_t v = 0, count; v < p_.kernel_w; v += count) {
        count = std::min(width, p_.kernel_w - v);
        r.in = r.in_plane + r.first * r.in_row + v - p_.pad_w;
        r.taps = columns_ + v;
        r.sums = sums + (u * p_.kernel_w + v) * kLanes<float>;
        plane_kernel<T>(k, count)(r);
        r.ahead = nullptr;
      }
    }
  }

  const WeightProblem& p_;
  const Plan& plan_;
  const PlanesAhead<T> ahead_;
  float* sums_;
  int64_t sums_of_channel_;  // elements, whole squares of vectors
  TapColumn* columns_;       // [block of columns][kernel_w]
};

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
