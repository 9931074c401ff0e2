// backward_weight of tensors whose rows are read in place, at a stride of 1: lanes are neighbouring outputs
// of a row, sums belong to taps and stay in registers while a sweep goes down the rows of a vector of
// columns. A row of pixels meets K rows of outputs, which registers keep until it has passed: V + 1 loads for
// the K V multiply-adds of K kernel rows by V columns. Pixels that do not exist are masked out of the
// products, so that none with the halo's zeros is formed. Rows of a dilated kernel are swept apart.
#pragma once

#include "planar_weight_sums.h"

namespace lkconv::cpu::LKCONV_ISA {

#if LKCONV_AVX512

// Lines of both tensors to come, one of each for a row of a vector of columns. Their order is that of
// addresses, not that of their use: memory that is asked for column after column takes five times as long.
template <class T>
struct LinesOfTwo {
  static constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  const T *grad, *in;
  LKCONV_INLINE void request() {
    if (!in) return;
    __builtin_prefetch(in, 0, 2);
    __builtin_prefetch(grad, 0, 2);
    in += kLine, grad += kLine;
  }
  void skip(int64_t lines) {
    if (in) in += lines * kLine, grad += lines * kLine;
  }
};

// Rows of one channel's grad_output, in some images, and the pixels of the input that the kernel's first row
// and column of this call meet. With a dilation, every dil_h-th row, and rows of pixels as far apart.
template <class T>
struct SweptPair {
  const T *grad, *in;
  int64_t images, grad_image, in_image;
  int64_t grad_row, in_row;
  int64_t begin, end;  // of the rows of pixels that rows - 1 + K steps from `in` on reach, those of the image
  int64_t rows, columns;     // of grad_output
  int64_t column;            // pixels from one column of taps to the next
  const ElementMask* pairs;  // [vector of columns][kernel_w], from the first column of this call on
  int64_t pairs_of_vector;
  float* sums;  // [kernel rows][kernel_w] vectors
  int64_t sums_of_row;
  LinesOfTwo<T> ahead;  // asked for beside these sums
};

// A row of pixels with the rows of outputs that meet kernel rows [U0, U1), or those in `met`.
template <int U0, int U1, int K, int V, class T>
LKCONV_INLINE void add_pixel_row(Vec<float> (&a)[K][V], const Vec<float> (&g)[K], const T* in, int64_t column,
                                 const ElementMask (&pairs)[V], uint32_t met = ~0u) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v, in += column) {
    Vec<float> p = load_as_floats(in, pairs[v]);
    keep(p);
#pragma GCC unroll 8
    for (int u = U0; u < U1; ++u)
      if (met & (1u << u)) a[u][v] = add_product(a[u][v], g[u], p, pairs[v]);
  }
}
// The same for the first rows of pixels, which meet the first `count` kernel rows, and for the last ones.
template <int K, int V, class T, int... n>
LKCONV_INLINE void add_first_row(Vec<float> (&a)[K][V], const Vec<float> (&g)[K], const T* in, int64_t column,
                                 const ElementMask (&pairs)[V], int64_t count,
                                 std::integer_sequence<int, n...>) {
  (void)((count == n + 1 && (add_pixel_row<0, n + 1>(a, g, in, column, pairs), true)) || ...);
}
template <int K, int V, class T, int... n>
LKCONV_INLINE void add_last_row(Vec<float> (&a)[K][V], const Vec<float> (&g)[K], const T* in, int64_t column,
                                const ElementMask (&pairs)[V], int64_t count,
                                std::integer_sequence<int, n...>) {
  (void)((count == n + 1 && (add_pixel_row<K - n - 1, K>(a, g, in, column, pairs), true)) || ...);
}

template <int K>
LKCONV_INLINE void move_down(Vec<float> (&g)[K]) {
#pragma GCC unroll 8
  for (int u = K - 1; u > 0; --u) g[u] = g[u - 1];
}

// The sums of one vector of columns.
template <int K, int V, class T>
LKCONV_INLINE void sweep_weight_column(Vec<float> (&a)[K][V], const SweptPair<T>& r, const T* grad,
                                       const T* in, ElementMask outputs, const ElementMask* masks,
                                       LinesOfTwo<T>& ahead) {
  ElementMask pairs[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) pairs[v] = masks[v];
  Vec<float> g[K];  // g[u]: the row of outputs u rows above
#pragma GCC unroll 8
  for (int u = 0; u < K; ++u) {
    const int64_t row = r.begin - u;
    g[u] = row >= 0 && row < r.rows ? load_as_floats(grad + row * r.grad_row, outputs) : Vec<float>{};
  }
  const int64_t in_row = r.in_row, grad_row = r.grad_row, rows = r.rows, end = r.end, column = r.column;
  in += r.begin * in_row, grad += (r.begin + 1) * grad_row;
  int64_t i = r.begin;
  constexpr auto kCounts = std::make_integer_sequence<int, K - 1>();
  if (rows < K) {
    for (; i < end; ++i, in += in_row, grad += grad_row) {
      ahead.request();
      add_pixel_row<0, K>(a, g, in, column, pairs, in_register(bits_inside(rows - 1 - i, 1, rows, K)));
      move_down(g);
      if (i + 1 < rows) g[0] = load_as_floats(grad, outputs);
    }
    return;
  }
  for (; i < std::min<int64_t>(end, K - 1); ++i, in += in_row, grad += grad_row) {
    ahead.request();
    add_first_row(a, g, in, column, pairs, i + 1, kCounts);
    move_down(g);
    if (i + 1 < rows) g[0] = load_as_floats(grad, outputs);
  }
  for (; i < std::min(end, rows); ++i, in += in_row, grad += grad_row) {
    ahead.request();
    add_pixel_row<0, K>(a, g, in, column, pairs);
    move_down(g);
    g[0] = load_as_floats(grad, i + 1 < rows ? outputs : 0);
  }
  for (; i < end; ++i, in += in_row) {
    ahead.request();
    add_last_row(a, g, in, column, pairs, rows + K - 1 - i, kCounts);
    move_down(g);
  }
}

template <class T, int K, int V>
void sweep_weight(const SweptPair<T>& r) {
  constexpr int L = kLanes<float>;
  Vec<float> a[K][V] = {};
  for (int64_t n = 0; n < r.images; ++n) {
    const T *grad = r.grad + n * r.grad_image, *in = r.in + n * r.in_image;
    const ElementMask* pairs = r.pairs;
    LinesOfTwo<T> ahead = r.ahead;
    if (ahead.in) ahead.grad += n * r.grad_image, ahead.in += n * r.in_image;
    for (int64_t x = 0; x < r.columns; x += L, pairs += r.pairs_of_vector)
      sweep_weight_column(a, r, grad + x, in + x, first_elements(std::min<int64_t>(L, r.columns - x)), pairs,
                          ahead);
  }
  add_sums(r.sums, r.sums_of_row, a);
}

template <class T>
using SweepWeightKernel = void(const SweptPair<T>&);
template <class T, int K, int... V>
LKCONV_INLINE SweepWeightKernel<T>* sweep_weight_kernel(int64_t columns, std::integer_sequence<int, V...>) {
  static constexpr SweepWeightKernel<T>* kTable[] = {sweep_weight<T, K, V + 1>...};
  return kTable[columns - 1];
}
template <class T, int... K>
LKCONV_INLINE SweepWeightKernel<T>* sweep_weight_kernel(int64_t rows, int64_t columns,
                                                        std::integer_sequence<int, K...>) {
  SweepWeightKernel<T>* kernel = nullptr;
  ((rows == K + 1 && (kernel = sweep_weight_kernel<T, K + 1>(
                          columns, std::make_integer_sequence<int, int(swept_weight_columns(K + 1))>()))),
   ...);
  return kernel;
}

template <class T>
class SweepWeightTask {
 public:
  SweepWeightTask(const WeightProblem& p, const Plan& plan) : p_(p), plan_(plan) {
    constexpr int64_t L = kLanes<float>;
    const PlanarWeightSizes s = planar_weight_sizes(p, plan.lanes);
    char* at = static_cast<char*>(thread_scratch_bytes(size_t(s.bytes)));
    sums_ = reinterpret_cast<float*>(at);
    sums_of_channel_ = s.sums;
    pairs_ = reinterpret_cast<ElementMask*>(at + L * s.sums * int64_t(sizeof(float)));
    ElementMask* pairs = pairs_;
    for (int64_t x = 0; x < p.out_width; x += L)
      for (int64_t v = 0; v < p.kernel_w; ++v)
        *pairs++ = bits_inside(x + v * p.dil_w - p.pad_w, 1, p.width, std::min(L, p.out_width - x));
    place_requests();
  }

  void run(float* partial, int64_t task) const {
    sum_planes(p_, plan_, sums_, sums_of_channel_, partial, task,
               [this](int64_t n, int64_t images, int64_t c, float* sums) { add_planes(n, images, c, sums); });
  }

 private:
  // The next planes, or rows if planes are large; nothing of small tensors.
  void place_requests() {
    const int64_t planes = p_.batch * p_.channels, in = p_.height * p_.width,
                  grad = p_.out_height * p_.out_width;
    if ((in + grad) * planes * int64_t(sizeof(T)) < kRequestBytes) return;
    const auto distance = [&](const TensorView& t, int64_t plane) {
      if ((in + grad) * int64_t(sizeof(T)) > kWeightTileBytes) return plan_.tile_h * t.stride_h;
      return plane_ahead<T>(t, plane);
    };
    ahead_in_ = distance(p_.input, in), ahead_grad_ = distance(p_.grad_output, grad);
  }

  // Tiles of rows, their rows of a dilated kernel, and as many columns as a lane may add up, are summed
  // apart.
  void add_planes(int64_t n, int64_t images, int64_t c, float* sums) const {
    constexpr int64_t L = kLanes<float>;
    const T* in = element<T>(p_.input, n, c / p_.channel_div, 0);
    const T* grad = element<T>(p_.grad_output, n, c, 0);
    SweptPair<T> r{};
    r.images = images, r.grad_image = p_.grad_output.stride_n, r.in_image = p_.input.stride_n;
    r.grad_row = p_.dil_h * p_.grad_output.stride_h, r.in_row = p_.dil_h * p_.input.stride_h;
    r.column = p_.dil_w, r.pairs_of_vector = p_.kernel_w, r.sums_of_row = p_.kernel_w * kLanes<float>;
    LinesOfTwo<T> ahead{};
    if (ahead_in_) ahead = {grad + ahead_grad_, in + ahead_in_};
    for (int64_t y = 0; y < p_.out_height; y += plan_.tile_h) {
      const int64_t end = std::min(y + plan_.tile_h, p_.out_height);
      for (int64_t first = y; first < std::min(y + p_.dil_h, end); ++first) {
        r.rows = ceil_div(end - first, p_.dil_h);
        const int64_t most = std::max<int64_t>(1, kLongestWeightSum / (r.rows * images)) * L;
        for (int64_t x = 0; x < p_.out_width; x += most) {
          r.columns = std::min(most, p_.out_width - x), r.ahead = ahead;
          r.grad = grad + first * p_.grad_output.stride_h + x;
          add_taps(r, in + x, x / L, first - p_.pad_h, sums);
          ahead.skip(r.rows * ceil_div(r.columns, L));
        }
      }
    }
  }

  // Every tap of some rows and columns, the first row of which meets the image's row `top`.
  void add_taps(SweptPair<T>& r, const T* in, int64_t vector, int64_t top, float* sums) const {
    const int64_t part = even_part(p_.kernel_h, kMaxWeightSweepRows);
    for (int64_t u = 0, k; u < p_.kernel_h; u += k) {
      k = std::min(part, p_.kernel_h - u);
      const int64_t first = top + u * p_.dil_h, steps = r.rows + k - 1;
      r.begin = std::clamp<int64_t>(ceil_div(std::max<int64_t>(0, -first), p_.dil_h), 0, steps);
      r.end =
          std::clamp<int64_t>(ceil_div(std::max<int64_t>(0, p_.height - first), p_.dil_h), r.begin, steps);
      const int64_t width = even_part(p_.kernel_w, swept_weight_columns(k));
      for (int64_t v = 0, count; v < p_.kernel_w; v += count) {
        count = std::min(width, p_.kernel_w - v);
        r.in = in + first * p_.input.stride_h + v * p_.dil_w - p_.pad_w;
        r.pairs = pairs_ + vector * p_.kernel_w + v;
        r.sums = sums + (u * p_.kernel_w + v) * kLanes<float>;
        sweep_weight_kernel<T>(k, count, std::make_integer_sequence<int, int(kMaxWeightSweepRows)>())(r);
        r.ahead = {};
      }
    }
  }

  const WeightProblem& p_;
  const Plan& plan_;
  int64_t ahead_grad_ = 0, ahead_in_ = 0;  // elements to what is asked for; 0: nothing is
  float* sums_;
  int64_t sums_of_channel_;  // elements, whole squares of vectors
  ElementMask* pairs_;       // [vector of columns][kernel_w]
};

#endif

}  // namespace lkconv::cpu::LKCONV_ISA
