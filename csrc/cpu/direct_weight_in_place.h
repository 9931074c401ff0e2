// Direct backward_weight of channels_last tensors that are read where they are: odd kernel rows of at most 7
// taps, at a stride of 1 or 2, whose halo is not read. Sums are floats, [part][tap][lane] for every group of
// kElements channels; a vector of bfloat16 is read once for each of its parts (element_vectors.h). The last
// group of a tensor moves left to be whole, and what it computes twice is left out when the gradient is
// written.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// One part of vectors of T, as a pointer.
template <class T, int kPart>
struct PartPointer {
  const T* at;
  LKCONV_INLINE void operator+=(int64_t elements) { at += elements; }
  LKCONV_INLINE PartPointer operator+(int64_t elements) const { return {at + elements}; }
};
template <int kPart>
LKCONV_INLINE Vec<float> load(PartPointer<bf16, kPart> p) {
  return take_part<OneRow, kPart>(p.at, p.at);
}
#if LKCONV_ROW_PAIRS
// One part of pairs of two rows, `below` elements apart, or of the floats of one.
template <class Product, int kPart>
struct RowsPointer {
  const bf16* at;
  int64_t below;
  LKCONV_INLINE void operator+=(int64_t elements) { at += elements; }
  LKCONV_INLINE RowsPointer operator+(int64_t elements) const { return {at + elements, below}; }
};
template <class Product, int kPart>
LKCONV_INLINE void pin(RowsPointer<Product, kPart>& p) {
  asm("" : "+r"(p.at));
}
template <class Product, int kPart>
LKCONV_INLINE Vec<float> load(RowsPointer<Product, kPart> p) {
  return take_part<Product, kPart>(p.at, p.at + p.below);
}
template <class Product, int kPart>
LKCONV_INLINE RowsPointer<Product, kPart> part_pointer(const bf16* at, int64_t below) {
  return {at, below};
}
#else
template <class Product, int kPart>
LKCONV_INLINE const float* part_pointer(const float* at, int64_t) {
  return at;
}
template <class Product, int kPart>
LKCONV_INLINE PartPointer<bf16, kPart> part_pointer(const bf16* at, int64_t) {
  return {at};
}
#endif

// Vectors of two neighbouring groups of channels, as one value: where lines that lie next to each other are
// worth taking together (see shares_blocks of the planner).
struct TwoGroups {
  Vec<float> group[2];
  friend LKCONV_INLINE TwoGroups operator*(TwoGroups a, TwoGroups b) {
    return {{a.group[0] * b.group[0], a.group[1] * b.group[1]}};
  }
  LKCONV_INLINE void operator+=(TwoGroups b) { group[0] += b.group[0], group[1] += b.group[1]; }
};
struct GroupsPointer {
  const float* at;
  LKCONV_INLINE void operator+=(int64_t elements) { at += elements; }
  LKCONV_INLINE GroupsPointer operator+(int64_t elements) const { return {at + elements}; }
};
LKCONV_INLINE TwoGroups load(GroupsPointer p) { return {{load(p.at), load(p.at + kElements<float>)}}; }

// Adds to the sums of a tap, which are `group` floats apart for two groups.
LKCONV_INLINE void add_to(float* sums, Vec<float> more, int64_t) { store(sums, load(sums) + more); }
LKCONV_INLINE void add_to(float* sums, TwoGroups more, int64_t group) {
  store(sums, load(sums) + more.group[0]);
  store(sums + group, load(sums + group) + more.group[1]);
}

// What the values behind a pointer multiply.
template <class Pixels>
struct ProductBehind {
  using Product = OneRow;
};
#if LKCONV_ROW_PAIRS
template <int kPart>
struct ProductBehind<RowsPointer<TwoRows, kPart>> {
  using Product = TwoRows;
};
#endif
template <class Pixels>
using ProductOf = typename ProductBehind<Pixels>::Product;

// Rows of grad_output and of the input that meet.
template <class Pixels>
struct RowPair {
  Pixels grad, in;
  int64_t in_row, rows, n;  // kernel rows, and outputs of the row
  int64_t width, stride;    // pixels of the image's row, and how many lie between outputs
  int64_t group;            // floats between the sums of two groups
  TensorSteps steps;
  RowSteps next = {1, 0, 0};  // rows of grad_output, at a stride of 1
};

// acc[u][v] += sum over x < n of grad[x] * in[u][S x + v] for a stride S: each output loads its pixels anew.
template <int U, int V, class Pixels>
LKCONV_INLINE void correlate_strided_unit(float* acc, const RowPair<Pixels>& r, Pixels in) {
  using Value = decltype(load(in));
  constexpr int L = kLanes<float>, P = V / 2;
  Value a[U][V] = {};
  Pixels grad = r.grad;
  int64_t left = P,
          right = r.width + P;  // of the pixels an output reads, those in the image are [left, right)
  for (int64_t x = 0; x < r.n; ++x, left -= r.stride, right -= r.stride) {
    if (left <= 0 && right >= V)
      correlate_pixel<ProductOf<Pixels>, Value, U, V>(a, grad, in, r.in_row, 0, V, r.steps);
    else
      correlate_pixel<ProductOf<Pixels>, Value, U, V>(a, grad, in, r.in_row, left, right, r.steps);
    grad += r.steps.grad(), in += r.stride * r.steps.in();
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) add_to(acc + (u * V + v) * L, a[u][v], r.group);
}

template <int V, class Pixels>
void correlate_rows_in_place(float* acc, const RowPair<Pixels>& r) {
  constexpr int L = kLanes<float>;
  constexpr int kMost = std::is_same_v<Pixels, GroupsPointer> ? (V <= 3 ? 3 : 2) : rows_together(V);
  for_rows_together<kMost>(r.rows, [&](int64_t u, auto part) __attribute__((always_inline)) {
    constexpr int U = part();
    float* to = acc + u * V * L;
    const Pixels in = r.in + u * r.in_row;
    if (r.stride != 1)
      correlate_strided_unit<U, V>(to, r, in);
    else if constexpr (!std::is_same_v<Pixels, GroupsPointer>)
      correlate_unit<ProductOf<Pixels>, float, U, V, (V > 1)>(to, V * L, r.grad, in, r.in_row, r.n, r.steps,
                                                              r.next);
  });
}

template <class Pixels>
void correlate_in_place(float* acc, int64_t taps, const RowPair<Pixels>& r) {
  switch (taps) {
    case 1:
      return correlate_rows_in_place<1>(acc, r);
    case 3:
      return correlate_rows_in_place<3>(acc, r);
    case 5:
      return correlate_rows_in_place<5>(acc, r);
    default:
      if constexpr (!std::is_same_v<Pixels, GroupsPointer>) return correlate_rows_in_place<7>(acc, r);
  }
}

// What group g of `groups` asks for of the row of grad_output after the one at `grads`, of `pixels` pixels,
// and of the `rows` rows from `in` on that it reads anew. Where that is little, each group asks for its own;
// at a stride, all groups together in the order of addresses.
template <class T>
LKCONV_INLINE RowsAhead rows_ahead(const WeightProblem& p, const T* grads, const T* in, int64_t rows,
                                   int64_t groups, int64_t g, int64_t together, int64_t pixels) {
  const TensorView &grad = p.grad_output, &input = p.input;
  RowsAhead ahead;
  ahead.left = pixels;
  if (!pixels) return ahead;
  ahead.pixels = p.stride_w, ahead.lines = together;
  ahead.rows = std::min(rows, RowsAhead::kMaxRows);
  const bool shared = p.stride_w > 1;
  ahead.own = !shared && ahead.rows == 1;
  const auto pixels_ahead = [&](const T* row, int64_t step, int64_t stride) {
    return shared ? PixelsAhead(row - g * kElements<T>, step, groups, g * pixels * stride)
                  : PixelsAhead(row, step);
  };
  ahead.grad = pixels_ahead(grads + grad.stride_h, grad.stride_w, 1);
  for (int64_t r = 0; r < ahead.rows; ++r)
    ahead.in[r] = pixels_ahead(in + r * input.stride_h, input.stride_w, p.stride_w);
  return ahead;
}

// Channel groups of one image: the elements of channel `c` on, and their sums.
template <class T>
struct ImageGroup {
  int64_t n, c;
  float* sums;
};

// Adds the products of kernel rows [u0, u1) with `rows` rows of grad_output from y on, or so many pairs of
// rows.
template <class Product, class T>
LKCONV_INLINE void correlate_rows_of_image(const WeightProblem& p, const ImageGroup<T>& group, int64_t y,
                                           int64_t u0, int64_t u1, int64_t rows, int64_t together,
                                           RowsAhead& ahead) {
  constexpr int64_t kApart = Product::kRows;
  const TensorView &in = p.input, &grad = p.grad_output;
  const int64_t taps = p.kernel_h * p.kernel_w;
  const T* grads = element<T>(grad, group.n, group.c, y);
  const T* pixels = element<T>(in, group.n, group.c, 0) +
                    (y * p.stride_h - p.pad_h + u0 * p.dil_h) * in.stride_h - p.pad_w * in.stride_w;
  const TensorSteps steps{grad.stride_w, in.stride_w, &ahead};
  float* acc = group.sums + u0 * p.kernel_w * kLanes<float>;
  const int64_t below = in.stride_h * p.stride_h;
  const auto add = [&](auto grad_pixels, auto in_pixels, float* to) {
    correlate_in_place<decltype(grad_pixels)>(to, p.kernel_w,
                                              {grad_pixels,
                                               in_pixels,
                                               in.stride_h * p.dil_h,
                                               u1 - u0,
                                               p.out_width,
                                               p.width,
                                               p.stride_w,
                                               taps * kLanes<float>,
                                               steps,
                                               {rows, kApart * grad.stride_h, kApart * below}});
  };
#if LKCONV_VECTOR_REGISTERS >= 32
  if constexpr (kFloatParts<T> == 1)
    if (together == 2) return add(GroupsPointer{grads}, GroupsPointer{pixels}, acc);
#endif
  add(part_pointer<Product, 0>(grads, grad.stride_h), part_pointer<Product, 0>(pixels, below), acc);
  if constexpr (kFloatParts<T> == 2)
    add(part_pointer<Product, 1>(grads, grad.stride_h), part_pointer<Product, 1>(pixels, below),
        acc + taps * kLanes<float>);
}

// What a group asks for of the rows after [y0, y1).
template <class T>
RowsAhead tile_ahead(const WeightProblem& p, const ImageGroup<T>& group, int64_t y0, int64_t y1) {
  const int64_t next = (y1 - 1) * p.stride_h - p.pad_h + (p.kernel_h - 1) * p.dil_h + 1;
  RowsAhead ahead;
  ahead.left = (y1 - y0) * p.out_width, ahead.pixels = ahead.rows = ahead.lines = 1, ahead.own = true;
  ahead.grad = PixelsAhead(element<T>(p.grad_output, group.n, group.c, y1), p.grad_output.stride_w);
  ahead.in[0] = PixelsAhead(element<T>(p.input, group.n, group.c, next), p.input.stride_w);
  return ahead;
}

// Rows [y0, y1) of grad_output for one group: the rows that meet as many kernel rows as registers hold are
// summed in registers, the others one after the other.
template <class T>
void correlate_tile_in_place(const WeightProblem& p, const ImageGroup<T>& group, int64_t y0, int64_t y1,
                             RowsAhead ahead) {
  RowsAhead nothing;
  const int64_t most = rows_together(int(p.kernel_w));
  for (int64_t u = 0, k; u < p.kernel_h; u += k) {
    k = even_part(p.kernel_h - u, most);
    const int64_t top = p.pad_h - u * p.dil_h, bottom = p.height + p.pad_h - (u + k - 1) * p.dil_h;
    const int64_t a = std::clamp(ceil_div(std::max<int64_t>(0, top), p.stride_h), y0, y1);
    int64_t b = std::clamp(ceil_div(std::max<int64_t>(0, bottom), p.stride_h), a, y1);
    b -= (b - a) % kRowsTogether;
    const auto edges = [&](int64_t from, int64_t to) {
      for_steps_over_rows(p, from, to, [&](auto product, int64_t y, int64_t u0, int64_t u1) {
        u0 = std::max(u0, u), u1 = std::min(u1, u + k);
        if (u0 < u1) correlate_rows_of_image<decltype(product)>(p, group, y, u0, u1, 1, 1, nothing);
      });
    };
    edges(y0, a);
    if (a < b) correlate_rows_of_image<Rows>(p, group, a, u, u + k, (b - a) / kRowsTogether, 1, ahead);
    edges(b, y1);
    ahead.left = 0;
  }
}

// Outputs that one group sums in registers before the next one does, so that no sum grows long: of floats,
// and of bfloat16, whose gradients are rounded more than longer sums are. Rows of them where memory is asked
// for: the rows that follow.
constexpr int64_t kLongestRowSum = 64, kLongestHalfRowSum = 256, kAskingRows = 4;

// The sums of one image for `count` groups from channel c0 on, whose elements are next to each other,
// `together` groups at a time.
template <class T>
void correlate_image_in_place(const WeightProblem& p, float* sums, int64_t count, int64_t together, int64_t n,
                              int64_t c0, bool request) {
  constexpr int64_t L = kElements<T>;
  const int64_t taps = p.kernel_h * p.kernel_w;
  zero(sums, count * taps * kFloatParts<T>);
  const auto group = [&](int64_t g) {
    return ImageGroup<T>{n, std::min(c0 + g * L, p.channels - L), sums + g * taps * L};
  };
  if (kRegisters >= 32 && p.stride_w == 1) {
    constexpr int64_t kLongest = kFloatParts<T> == 1 ? kLongestRowSum : kLongestHalfRowSum;
    const int64_t most = std::max<int64_t>(1, kLongest / (p.out_width * kRowsTogether)) * kRowsTogether,
                  rows = request ? std::min(most, kAskingRows) : most;
    for (int64_t y = 0, end; y < p.out_height; y = end) {
      end = std::min(y + rows, p.out_height);
      for (int64_t g = 0; g < count; ++g) {
        const ImageGroup<T> at = group(g);
        correlate_tile_in_place<T>(p, at, y, end, request ? tile_ahead<T>(p, at, y, end) : RowsAhead());
      }
    }
    return;
  }
  for_steps_over_rows(p, 0, p.out_height, [&](auto product, int64_t y, int64_t u0, int64_t u1) {
    const int64_t next = std::max<int64_t>(0, y * p.stride_h - p.pad_h + (p.kernel_h - 1) * p.dil_h + 1);
    for (int64_t g = 0; g < count; g += together) {
      const ImageGroup<T> at = group(g);
      RowsAhead ahead = rows_ahead(p, element<T>(p.grad_output, n, at.c, y),
                                   element<T>(p.input, n, at.c, 0) + next * p.input.stride_h,
                                   std::clamp<int64_t>(p.height - next, 0, p.stride_h), count, g, together,
                                   request && y + 1 < p.out_height ? p.out_width : 0);
      correlate_rows_of_image<decltype(product)>(p, at, y, u0, u1, 1, together, ahead);
    }
  });
}

#if LKCONV_AVX512
// The same for one group of contiguous planes, from transposed copies (Plan::gather).
template <class T>
void correlate_planes_in_place(const WeightProblem& p, float* sums, T* copies, int64_t n, int64_t c) {
  constexpr int64_t L = kElements<T>;
  WeightProblem q = p;
  q.channels = L;
  const auto gather = [&](TensorView& t, auto channel, int64_t height, int64_t width) {
    gather_planes(copies, t, n, channel, width, 0, height);
    t.data = copies, t.stride_n = 0, t.stride_c = 1, t.stride_w = L, t.stride_h = L * width;
    copies += (height * width + kSlackPixels) * L;
  };
  gather(q.input, [&](int64_t i) { return (c + i) / p.channel_div; }, p.height, p.width);
  gather(q.grad_output, [&](int64_t i) { return c + i; }, p.out_height, p.out_width);
  correlate_image_in_place<T>(q, sums, 1, 1, 0, 0, false);
}
#endif

// Task = (span of channel groups, split of the batch), as in weight_direct.
template <class T>
void weight_in_place_of(const WeightProblem& p, const Plan& plan, float* partial, int64_t task0,
                        int64_t task1) {
  constexpr int64_t L = kElements<T>;
  const int64_t taps = p.kernel_h * p.kernel_w, groups = channel_groups(p.channels, plan);
  const bool gathered = plan.gather == Gather::planes;
  const int64_t pixels = gathered ? p.height * p.width + p.out_height * p.out_width + 2 * kSlackPixels : 0;
  float* image = thread_scratch<float>(taps * L * plan.span + pixels * kLanes<float>);
  [[maybe_unused]] T* copies = reinterpret_cast<T*>(image + taps * L * plan.span);
  const bool request = requests_weight_rows(p, p.input.dtype);
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t g0 = task / plan.splits * plan.span, split = task % plan.splits;
    const int64_t count = std::min(plan.span, groups - g0), vectors = taps * kFloatParts<T> * count;
    float* total = partial + (split * groups + g0) * taps * L;
    zero(total, vectors);
    const int64_t n0 = p.batch * split / plan.splits, n1 = p.batch * (split + 1) / plan.splits;
    for (int64_t n = n0; n < n1; ++n) {
      if (!gathered) correlate_image_in_place<T>(p, image, count, plan.together, n, g0 * L, request);
#if LKCONV_AVX512
      for (int64_t g = 0; g < count && gathered; ++g)
        correlate_planes_in_place<T>(p, image + g * taps * L, copies, n,
                                     std::min((g0 + g) * L, p.channels - L));
#endif
      add_vectors(total, image, vectors);
    }
  }
}

// Writes the gradient of group g from its sums.
template <class T>
void store_sums_in_place_of(const WeightProblem& p, const Plan& plan, const float* sums, int64_t g) {
  constexpr int64_t L = kElements<T>, P = kFloatParts<T>;
  const int64_t taps = p.kernel_h * p.kernel_w, c0 = std::min(g * L, p.channels - L);
  for (int64_t i = 0; i < L; ++i) {
    const int64_t part = i / kLanes<float>, lane = i % kLanes<float>;
    const int64_t c = c0 + element_of_part(plan.paired, part, lane, P);
    if (c < g * L) continue;  // of the group before
    const float* from = sums + part * taps * kLanes<float> + lane;
    for (int64_t u = 0; u < p.kernel_h; ++u) {
      T* to = element<T>(p.grad_weight, 0, c, u);
      for (int64_t v = 0; v < p.kernel_w; ++v, from += kLanes<float>)
        scalar_store(to + v * p.grad_weight.stride_w, *from);
    }
  }
}

inline void weight_in_place(const WeightProblem& p, const Plan& plan, float* partial, int64_t task0,
                            int64_t task1) {
#if LKCONV_VECTOR_REGISTERS >= 32
  if (kRowsTogether > 1 || p.input.dtype == DType::bf16)
    return weight_in_place_of<bf16>(p, plan, partial, task0, task1);
#endif
  if constexpr (kRowsTogether == 1) weight_in_place_of<float>(p, plan, partial, task0, task1);
}
inline void store_sums_in_place(const WeightProblem& p, const Plan& plan, const float* sums, int64_t g) {
  p.input.dtype == DType::bf16 ? store_sums_in_place_of<bf16>(p, plan, sums, g)
                               : store_sums_in_place_of<float>(p, plan, sums, g);
}

}  // namespace lkconv::cpu::LKCONV_ISA
