// The attention core. Softmax runs over tokens, for each channel by itself, so context = softmax(K)^T V is a
// head x head matrix gathered in one pass; then O = scale * Q context + Q * (depthwise V + bias), per token.
#pragma once

namespace lkconv::cpu::LKCONV_ISA::group_mix {

template <class T, int N>
struct InverseFactorials {
  T at[N + 1] = {1};
  constexpr InverseFactorials() {
    double f = 1;
    for (int i = 1; i <= N; ++i) at[i] = T(f /= i);
  }
};

// exp(x) for x <= 0 to within 2 units in the last place; 0 where the result would be subnormal, NaN for NaN.
template <class T>
LKCONV_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  using I = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef I VI __attribute__((vector_size(LKCONV_VECTOR_BYTES)));
  constexpr bool wide = sizeof(T) == 8;
  constexpr int mantissa = wide ? 52 : 23;
  constexpr T magic =
      wide ? T(6755399441055744.0) : T(12582912.0);  // 1.5 * 2^mantissa: adding it rounds to integer
  constexpr T lowest = wide ? T(-708.0) : T(-87.0);
  constexpr T ln2_high = wide ? T(0x1.62e42fee00000p-1) : T(0x1.62e400p-1),
              ln2_low = T(0x1.62e42fefa39efp-1 - double(ln2_high));
  constexpr int degree = wide ? 13 : 7;
  const Vec<T> zero{}, floor = zero + lowest;
  const Vec<T> y = x < floor ? floor : x;
  const Vec<T> shifted = y * T(1.4426950408889634) + magic;
  const Vec<T> n = shifted - magic;
  const Vec<T> r = (y - n * ln2_high) - n * ln2_low;
  constexpr InverseFactorials<T, degree> taylor;
  Vec<T> e = zero + taylor.at[degree];
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) e = e * r + taylor.at[i];
  const VI exponent = ((VI)shifted << mantissa) + (VI)(zero + T(1));
  return x < floor ? zero : e * (Vec<T>)exponent;
}

// Widths in scratch of a row of 4d channels (heads may be read a vector past their end) and of a head.
template <class T>
struct AttentionSizes {
  int64_t channels, head, groups, row, head_row;
  explicit AttentionSizes(const TokenShape& p) {
    constexpr int64_t L = kLanes<T>;
    channels = kMixed * p.segment, head = p.head();
    groups = ceil_div(channels, L);
    row = groups * L + std::max<int64_t>(L, kRowSlack);
    head_row = ceil_div(head, L) * L;
  }
  int64_t matrices() const { return kHeads * head * head_row; }
  int64_t packed_matrices() const { return (LKCONV_BF16_PRODUCTS ? 2 : 1) * matrices(); }

  // Zeros where loading the channels of `pixels` tokens writes nothing but products read. They also read
  // tokens past the last: what comes of those, whatever they hold, is used nowhere.
  void clear_padding(T* rows, int64_t pixels) const {
    const int64_t loaded = groups * kLanes<T>;
    for (int64_t i = 0; i < pixels; ++i, rows += row)
      for (int64_t c = loaded; c < row; c += kLanes<T>) store(rows + c, Vec<T>{});
  }
};

template <class S, class T>
Tokens<const S> attention_tokens(const AttentionProblem<T>& p, int64_t image, int64_t part) {
  return part_tokens(p, static_cast<const S*>(p.mixed), image, part, kMixed * p.segment, 0);
}

// Raises the running maxima to cover a tile of K, rescaling what was summed under the old ones.
template <class T>
void raise_maxima(const AttentionSizes<T>& z, const T* k, int64_t count, T* maximum, T* sum, T* context) {
  constexpr int L = kLanes<T>;
  for (int64_t g = 0; g < z.groups; ++g) {
    const Vec<T> old = load(maximum + g * L);
    Vec<T> top = old;
    for (int64_t i = 0; i < count; ++i) {
      const Vec<T> v = load(k + i * z.row + g * L);
      top = v > top ? v : top;
    }
    const Vec<T> factor = exp_nonpositive<T>(old - top);
    store(maximum + g * L, top);
    store(sum + g * L, load(sum + g * L) * factor);
    for (int64_t l = 0; l < L && g * L + l < z.channels; ++l) {
      if (!(top[l] > old[l])) continue;
      T* row = context + (g * L + l) * z.head_row;  // heads follow each other: channel c is row c
      for (int64_t j = 0; j < z.head_row; j += L) store(row + j, load(row + j) * factor[l]);
    }
  }
}

// What products of tokens are made of: their values, or pairs of bfloat16 of two neighbouring tokens or
// channels.
template <class T>
using Factor = std::conditional_t<LKCONV_BF16_PRODUCTS != 0, Bf16Pair, T>;
constexpr int64_t kTokensPerFactor = LKCONV_BF16_PRODUCTS ? 2 : 1;

// The exponentials of a tile of K, which join the sums, as factors; those may lie where K does.
template <class T>
void exponentials(const AttentionSizes<T>& z, const T* k, int64_t count, const T* maximum, T* sum,
                  Factor<T>* out) {
  constexpr int L = kLanes<T>;
  for (int64_t g = 0; g < z.groups * L; g += L) {
    Vec<T> total = load(sum + g);
    const Vec<T> top = load(maximum + g);
    const auto next = [&](int64_t i) __attribute__((always_inline)) {
      const Vec<T> e = exp_nonpositive<T>(load(k + i * z.row + g) - top);
      total += e;
      return e;
    };
#if LKCONV_BF16_PRODUCTS
    for (int64_t i = 0; i < count; i += 2) {
      const VU16 first = round_to_bf16(next(i));
      store_pairs(out + i / 2 * z.row + g, first, i + 1 < count ? round_to_bf16(next(i + 1)) : VU16{});
    }
#else
    for (int64_t i = 0; i < count; ++i) store(out + i * z.row + g, next(i));
#endif
    store(sum + g, total);
  }
}

// A tile of V as factors.
template <class T, class S>
void load_factors(const AttentionSizes<T>& z, Factor<T>* v, const Tokens<const S>& tokens, int64_t n,
                  int64_t count) {
#if LKCONV_BF16_PRODUCTS
  const auto bits = [&](int64_t i, int64_t c) __attribute__((always_inline)) {
    return (VU32)load_channels<T>(tokens.at(n + i) + c, z.channels - c);
  };
  for (int64_t i = 0; i < count; i += 2, v += z.row)
    for (int64_t c = 0; c < z.channels; c += kLanes<T>) {
      const VU32 second = i + 1 < count ? bits(i + 1, c) : VU32{};
      _mm512_storeu_si512(v + c, (__m512i)(bits(i, c) >> 16 | second));
    }
#else
  load_tokens(v, z.row, tokens, n, count, z.channels);
#endif
}

// Tokens [begin, end) of one image: state = maxima, sums of exp(K - maximum), and exp(K - maximum)^T V per
// head.
template <class T>
void attention_context(const AttentionProblem<T>& p, int64_t image, int64_t begin, int64_t end, T* state) {
  constexpr int64_t kTile = 64;
  const AttentionSizes<T> z(p);
  const int64_t width = z.groups * kLanes<T>;
  T *maximum = state, *sum = state + width, *context = state + 2 * width;
  T* k = thread_scratch<T>(2 * kTile * z.row + kRowSlack);
  auto* e = reinterpret_cast<Factor<T>*>(k);  // in the place of K
  auto* v = reinterpret_cast<Factor<T>*>(k + kTile * z.row);
  z.clear_padding(k, 2 * kTile);
  for (int64_t c = 0; c < width; ++c) maximum[c] = std::numeric_limits<T>::lowest();
  with_storage<T>(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t n = begin; n < end; n += kTile) {
      const int64_t count = std::min(kTile, end - n);
      load_tokens(k, z.row, attention_tokens<S>(p, image, 1), n, count, z.channels);
      load_factors(z, v, attention_tokens<S>(p, image, 2), n, count);
      raise_maxima(z, k, count, maximum, sum, context);
      exponentials(z, k, count, maximum, sum, e);
      for (int64_t h = 0; h < kHeads; ++h)
        gemm_accumulate(context + h * z.head * z.head_row, z.head_row, e + h * z.head, z.row, v + h * z.head,
                        z.row, z.head, z.head_row / kLanes<T>, ceil_div(count, kTokensPerFactor));
    }
  });
}

// dst[head][row][column, padded] = factor * src[head][row][column], or of the transpose.
template <class T>
void pack_matrices(const AttentionSizes<T>& z, T* dst, const T* src, T factor, bool transposed) {
  std::memset(dst, 0, size_t(z.matrices()) * sizeof(T));
  for (int64_t h = 0; h < kHeads; ++h, src += z.head * z.head, dst += z.head * z.head_row)
    for (int64_t i = 0; i < z.head; ++i)
      for (int64_t j = 0; j < z.head; ++j)
        dst[transposed ? j * z.head_row + i : i * z.head_row + j] = factor * src[i * z.head + j];
}

// For every head: finish(pixel, channel, sum_k a[pixel][k] * matrix[k][channel]). The last vector of a head
// runs into the next head, whose own results come later and replace it. Factors that are pairs are of
// neighbouring k.
template <class E, class Finish>
void multiply_heads(const AttentionSizes<Sum<E>>& z, const E* a, const E* matrices, int64_t count,
                    Finish&& finish) {
  using T = Sum<E>;
  constexpr int L = kLanes<T>;
  constexpr int64_t values = std::is_same_v<E, T> ? 1 : 2;
  for (int64_t h = 0; h < kHeads; ++h) {
    const int64_t c = h * z.head;
    gemm<E, Rows::pixels>(
        Left<E>{a + c / values, z.row / values, 1}, matrices + c / values * z.head_row, z.head_row,
        {z.head / values}, count, z.head_row / L, static_cast<const T*>(nullptr),
        [=](int64_t i, int64_t j, Vec<T> v)
            __attribute__((always_inline)) { finish(i * z.row + c + j * L, c + j * L, v); });
  }
}

constexpr int64_t kPositionTaps = 49;

template <class T>
void position_rows(const AttentionProblem<T>& p, const AttentionSizes<T>& z, const Window<T>& v, int64_t y0,
                   int64_t y1, const T* weight, const T* bias, T* out) {
  constexpr int L = kLanes<T>;
  for (int64_t g = 0; g < z.groups; ++g)
    depthwise_rows(v, g, p.kernel[g], weight + g * kPositionTaps * L, bias ? load(bias + g * L) : Vec<T>{},
                   y0, y1, out + g * L, z.row);
}

// scale * context of one image as factors; `matrices` is where they lie as numbers.
template <class T>
const Factor<T>* pack_context(const AttentionProblem<T>& p, const AttentionSizes<T>& z, int64_t image,
                              T* matrices) {
  pack_matrices(z, matrices, p.context + image * kHeads * z.head * z.head, p.scale, false);
#if LKCONV_BF16_PRODUCTS
  auto* pairs = reinterpret_cast<Bf16Pair*>(matrices + z.matrices());
  pack_pairs(pairs, matrices, kHeads * z.head, z.head_row);
  return pairs;
#else
  return matrices;
#endif
}

// Heads are of an even number of channels where factors are pairs.
template <class T>
void attention(const AttentionProblem<T>& p, int64_t begin, int64_t end) {
  const AttentionSizes<T> z(p);
  const int64_t d = p.segment, rows = std::min(rows_at_once<T>(p.width, z.row), p.plan.rows);
  const int64_t pixels = rows * p.width + kRowSlack, tile = pixels * z.row;
  with_storage<T>(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    const Factor<T>* context = nullptr;
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const Strip strip = p.plan.at(i, p.height);
      Window<T> v{nullptr, strip.y0 - 3, strip.y1 - strip.y0 + 6, p.width, p.height, 3};
      // The size does not depend on the strip, so that the packed matrices survive from one to the next.
      const int64_t window = z.groups * (p.plan.rows + 6) * v.row_size();
      T* matrices = thread_scratch<T>(z.packed_matrices() + 3 * tile + window);
      T *e = matrices + z.packed_matrices(), *o = e + tile;
      auto* q = reinterpret_cast<Between<T>*>(o + tile);
      v.data = o + 2 * tile;
      if (packed < 0) z.clear_padding(e, 3 * pixels);
      if (packed != strip.image) context = pack_context(p, z, strip.image, matrices);
      packed = strip.image;
      load_window(v, 0, z.groups, attention_tokens<S>(p, strip.image, 2), z.channels);
      const auto to = Tokens<S>{static_cast<S*>(p.out) + strip.image * p.tokens() * kKinds * d, kKinds * d};
      const S* local = static_cast<const S*>(p.local) + strip.image * p.tokens() * d;
      for (int64_t y = strip.y0; y < strip.y1; y += rows) {
        const int64_t y1 = std::min(y + rows, strip.y1), n = y * p.width, count = (y1 - y) * p.width;
        load_tokens(q, z.row, attention_tokens<S>(p, strip.image, 0), n, count, z.channels);
        position_rows(p, z, v, y, y1, p.depthwise, p.bias, e);
        multiply_heads(z, reinterpret_cast<const Factor<T>*>(q), context, count,
                       [=](int64_t at, int64_t, Vec<T> a) __attribute__((always_inline)) {
                         store(o + at, a + load_as(q + at, T()) * load(e + at));
                       });
        store_tokens(to, n, count, z.channels, o, z.row);
        for (int64_t t = n; t < n + count; ++t)
          std::memcpy(to.at(t) + z.channels, local + t * d, size_t(d) * sizeof(S));
      }
    }
  });
}

}  // namespace lkconv::cpu::LKCONV_ISA::group_mix
