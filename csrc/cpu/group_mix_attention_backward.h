// The attention core, backward, with A = softmax(K): dQ = scale dO G^T + dO * E, dG = scale Q^T dO,
// dV = A dG + DW^T(dO * Q), dA = V dG^T and dK = A * (dA - s). The column sums s of A * dA need no pass of
// their own: sum_n A[n, c] dA[n, c] = sum_j dG[c, j] G[c, j].
#pragma once

namespace lkconv::cpu::LKCONV_ISA::group_mix {

template <class S, class T>
Tokens<const S> grad_out_tokens(const AttentionProblem<T>& p, int64_t image) {
  const int64_t token = kKinds * p.segment;
  return {static_cast<const S*>(p.grad_out) + image * p.tokens() * token, token};
}

// state += Q^T dO per head, over tokens [begin, end).
template <class T>
void attention_grad_context(const AttentionProblem<T>& p, int64_t image, int64_t begin, int64_t end,
                            T* state) {
  constexpr int64_t kTile = 64;
  const AttentionSizes<T> z(p);
  T* q = thread_scratch<T>(2 * kTile * z.row + kRowSlack);
  T* g = q + kTile * z.row;
  z.clear_padding(q, 2 * kTile);
  with_storage<T>(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t n = begin; n < end; n += kTile) {
      const int64_t count = std::min(kTile, end - n);
      load_tokens(q, z.row, attention_tokens<S>(p, image, 0), n, count, z.channels);
      load_tokens(g, z.row, grad_out_tokens<S>(p, image), n, count, z.channels);
      for (int64_t h = 0; h < kHeads; ++h)
        gemm_accumulate(state + h * z.head * z.head_row, z.head_row, q + h * z.head, z.row, g + h * z.head,
                        z.row, z.head, z.head_row / kLanes<T>, count);
    }
  });
}

// dE = dO * Q of the window's rows.
template <class T, class S>
void load_position_grad(const AttentionProblem<T>& p, const AttentionSizes<T>& z, const Window<T>& w,
                        int64_t image) {
  constexpr int L = kLanes<T>;
  const auto q = attention_tokens<S>(p, image, 0);
  const auto g = grad_out_tokens<S>(p, image);
  const auto part = w.inside(w.top, w.rows);
  const int64_t y0 = w.top + part.begin, y1 = w.top + part.end, step = w.group_size();
  clear_margins(w, 0, z.groups, y0, y1);
  for (int64_t y = y0; y < y1; ++y)
    for (int64_t x = 0; x < p.width; ++x) {
      const int64_t n = y * p.width + x;
      T* to = w.at(0, y, x);
      for (int64_t c = 0; c < z.channels; c += L, to += step)
        store(to,
              load_channels<T>(q.at(n) + c, z.channels - c) * load_channels<T>(g.at(n) + c, z.channels - c));
    }
}

template <class T>
struct AttentionBackwardScratch {
  T *context, *grad_context, *grad_context_t;  // matrices
  T *q, *a, *v, *g, *e, *out;                  // tiles
  Window<T> value, grad;
};

template <class T>
AttentionBackwardScratch<T> attention_backward_scratch(const AttentionProblem<T>& p,
                                                       const AttentionSizes<T>& z, const Strip& strip,
                                                       int64_t tile) {
  AttentionBackwardScratch<T> s;
  s.value = s.grad = {nullptr, strip.y0 - 3, strip.y1 - strip.y0 + 6, p.width, p.height, 3};
  const int64_t window = z.groups * (p.plan.rows + 6) * s.value.row_size();
  s.context = thread_scratch<T>(3 * z.matrices() + 6 * tile + 2 * window);
  s.grad_context = s.context + z.matrices();
  s.grad_context_t = s.grad_context + z.matrices();
  s.q = s.grad_context_t + z.matrices();
  s.a = s.q + tile, s.v = s.a + tile, s.g = s.v + tile, s.e = s.g + tile, s.out = s.e + tile;
  s.value.data = s.out + tile;
  s.grad.data = s.value.data + window;
  return s;
}

// dQ, dK and dV of `count` tokens from n on, rows [y, y1).
template <class T, class S>
void attention_backward_tile(const AttentionProblem<T>& p, const AttentionSizes<T>& z,
                             const AttentionBackwardScratch<T>& s, int64_t image, int64_t y, int64_t y1) {
  constexpr int L = kLanes<T>;
  const int64_t n = y * p.width, count = (y1 - y) * p.width;
  const auto to = [&](int64_t part) {
    return part_tokens(p, static_cast<S*>(p.grad_mixed), image, part, z.channels, 0);
  };
  load_tokens(s.g, z.row, grad_out_tokens<S>(p, image), n, count, z.channels);
  load_tokens(s.a, z.row, attention_tokens<S>(p, image, 1), n, count, z.channels);
  load_tokens(s.v, z.row, attention_tokens<S>(p, image, 2), n, count, z.channels);
  const T *log_sum = p.log_sum + image * z.channels, *row_sum = p.row_sum + image * z.channels;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < z.channels; c += L) {
      T* at = s.a + i * z.row + c;
      store(at, exp_nonpositive<T>(load(at) - load(log_sum + c)));
    }
  T *g = s.g, *a = s.a, *e = s.e, *out = s.out;
  position_rows(p, z, s.value, y, y1, p.depthwise, p.bias, e);
  multiply_heads(z, g, s.context, count, [=](int64_t at, int64_t, Vec<T> v) __attribute__((always_inline)) {
    store(out + at, v + load(g + at) * load(e + at));
  });
  store_tokens(to(0), n, count, z.channels, out, z.row);
  multiply_heads(z, s.v, s.grad_context_t, count,
                 [=](int64_t at, int64_t c, Vec<T> v) __attribute__((always_inline)) {
                   store(out + at, load(a + at) * (v - load(row_sum + c)));
                 });
  store_tokens(to(1), n, count, z.channels, out, z.row);
  position_rows(p, z, s.grad, y, y1, p.flipped, static_cast<const T*>(nullptr), e);
  multiply_heads(z, a, s.grad_context, count,
                 [=](int64_t at, int64_t, Vec<T> v)
                     __attribute__((always_inline)) { store(out + at, v + load(e + at)); });
  store_tokens(to(2), n, count, z.channels, out, z.row);
}

// grads: depthwise [group][49][lane], then bias, added to.
template <class T>
void attention_backward(const AttentionProblem<T>& p, int64_t begin, int64_t end, T* grads) {
  constexpr int L = kLanes<T>;
  const AttentionSizes<T> z(p);
  const int64_t rows = std::min(rows_at_once<T>(p.width, z.row), p.plan.rows),
                matrix = z.head * z.head * kHeads;
  const int64_t pixels = rows * p.width + kRowSlack, tile = pixels * z.row;
  with_storage<T>(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const Strip strip = p.plan.at(i, p.height);
      const AttentionBackwardScratch<T> s = attention_backward_scratch(p, z, strip, tile);
      if (packed < 0) z.clear_padding(s.q, 6 * pixels);
      if (packed != strip.image) {
        pack_matrices(z, s.context, p.context + strip.image * matrix, p.scale, true);
        pack_matrices(z, s.grad_context, p.grad_context + strip.image * matrix, T(1), false);
        pack_matrices(z, s.grad_context_t, p.grad_context + strip.image * matrix, T(1), true);
      }
      packed = strip.image;
      load_window(s.value, 0, z.groups, attention_tokens<S>(p, strip.image, 2), z.channels);
      load_position_grad<T, S>(p, z, s.grad, strip.image);
      for (int64_t y = strip.y0; y < strip.y1; y += rows)
        attention_backward_tile<T, S>(p, z, s, strip.image, y, std::min(y + rows, strip.y1));
      T* bias = grads + z.groups * kPositionTaps * L;
      for (int64_t g = 0; g < z.groups; ++g) {
        correlate_window(grads + g * kPositionTaps * L, s.grad, s.value, g, p.kernel[g], strip.y0, strip.y1);
        Vec<T> sum{};
        for (int64_t y = strip.y0; y < strip.y1; ++y)
          for (int64_t x = 0; x < p.width; ++x) sum += load(s.grad.at(g, y, x));
        store(bias + g * L, load(bias + g * L) + sum);
      }
    }
  });
}

}  // namespace lkconv::cpu::LKCONV_ISA::group_mix
