// Launchers of the attention core: context matrices per image, then one pass over tokens.
#include <algorithm>
#include <cmath>
#include <limits>

#include "group_mix_launch.h"

namespace lkconv::cpu {
namespace {

constexpr int64_t kTaps = 49;
// Heads 0-1, 2-4 and 5-7 see windows of 3, 5 and 7 tokens.
constexpr int64_t kLists = 3;
constexpr int64_t kWindows[kLists] = {3, 5, 7}, kFirstHead[kLists] = {0, 2, 5},
                  kWindowHeads[kLists] = {2, 3, 3};

// The position encoding's weights as [group][tap][lane]; a group's window is the largest of its lanes', the
// smaller ones lie in its middle.
template <class T>
struct PositionWeights {
  int64_t channels, head, lanes, groups;
  Buffer<T> depthwise, flipped, bias;
  Buffer<int64_t> kernel;

  PositionWeights(int64_t segment, int64_t kernel_lanes, bool backward)
      : channels(kMixed * segment),
        head(segment / 2),
        lanes(kernel_lanes),
        groups(ceil_div(channels, lanes)),
        depthwise(groups * kTaps * lanes),
        flipped(backward ? Buffer<T>(groups * kTaps * lanes) : Buffer<T>()),
        bias((groups + 1) * lanes),
        kernel(groups) {
    for (int64_t g = 0; g < groups; ++g)
      kernel[g] = kWindows[list_of(std::min(channels, (g + 1) * lanes) - 1)];
  }

  int64_t list_of(int64_t c) const { return c < 2 * head ? 0 : c < 5 * head ? 1 : 2; }

  // For the taps of one list, in its order: visit(where the tap lies, where its mirror image lies).
  template <class Visit>
  void each_tap(int64_t list, Visit&& visit) const {
    const int64_t k = kWindows[list], channel = kFirstHead[list] * head;
    for (int64_t c = channel; c < channel + kWindowHeads[list] * head; ++c) {
      const int64_t group = c / lanes, wide = kernel[group], shift = (wide - k) / 2;
      const int64_t first = group * kTaps * lanes + c % lanes, last = first + (wide * wide - 1) * lanes;
      for (int64_t y = shift; y < shift + k; ++y)
        for (int64_t x = shift; x < shift + k; ++x) {
          const int64_t tap = (y * wide + x) * lanes;
          visit(first + tap, last - tap);
        }
    }
  }

  void pack(int64_t list, const T* weight, const T* biases) {
    std::copy_n(biases, kWindowHeads[list] * head, bias.get() + kFirstHead[list] * head);
    T *to = depthwise.get(), *mirrored = flipped.get();
    if (mirrored)
      each_tap(list, [&](int64_t tap, int64_t mirror) { to[tap] = mirrored[mirror] = *weight++; });
    else
      each_tap(list, [&](int64_t tap, int64_t) { to[tap] = *weight++; });
  }
};

// How the tokens of an image are split when there are fewer images than threads.
struct Splits {
  int64_t splits, tokens;
  Splits(const TokenShape& t, int64_t threads)
      : splits(std::clamp<int64_t>(ceil_div(2 * threads, std::max<int64_t>(1, t.batch)), 1,
                                   ceil_div(t.tokens(), 256))),
        tokens(t.tokens()) {}
  int64_t begin(int64_t i) const { return tokens * i / splits; }
};

template <class T>
AttentionProblem<T> problem_of(const AttentionTensors<T>& t, const PositionWeights<T>& w, int64_t windows,
                               int64_t threads) {
  AttentionProblem<T> p{};
  static_cast<TokenShape&>(p) = t;
  p.dtype = t.dtype, p.mixed = t.mixed, p.local = t.local, p.out = t.out, p.scale = T(t.scale);
  p.depthwise = w.depthwise.get(), p.flipped = w.flipped.get(), p.bias = w.bias.get(),
  p.kernel = w.kernel.get();
  p.grad_out = t.grad_out, p.grad_mixed = t.grad_mixed;
  const int64_t row = (t.width + 6) * w.groups * w.lanes * int64_t(sizeof(T)) * windows;
  p.plan = plan_strips(t, 1, 6, row, threads, t.batch);
  return p;
}

// Splits of one image's softmax sums into log(sum exp K) and softmax(K)^T V.
template <class T>
void merge_context(const PositionWeights<T>& w, const T* state, int64_t state_size, int64_t splits,
                   T* log_sum, T* context) {
  const int64_t width = w.groups * w.lanes, head_row = ceil_div(w.head, w.lanes) * w.lanes;
  Buffer<T> factor(splits);
  for (int64_t c = 0; c < w.channels; ++c) {
    T top = std::numeric_limits<T>::lowest(), sum = 0;
    for (int64_t i = 0; i < splits; ++i) top = std::max(top, state[i * state_size + c]);
    for (int64_t i = 0; i < splits; ++i) {
      factor[i] = splits == 1 ? T(1) : std::exp(state[i * state_size + c] - top);
      sum += state[i * state_size + width + c] * factor[i];
    }
    log_sum[c] = top + std::log(sum);
    T* row = context + c * w.head;
    std::fill_n(row, w.head, T(0));
    for (int64_t i = 0; i < splits; ++i) {
      const T* from = state + i * state_size + 2 * width + c * head_row;
      const T share = factor[i] / sum;
      for (int64_t j = 0; j < w.head; ++j) row[j] += from[j] * share;
    }
  }
}

}  // namespace

template <class T>
void GroupMixCore<T>::forward(const AttentionTensors<T>& t, T* log_sum, T* context, Isa isa,
                              const Workers& workers) {
  // Pairs of channels would mix heads that have an odd number of them.
  const DType products = t.head() % 2 ? DType::f32 : t.dtype;
  const GroupMixKernels<T>& k = group_mix_kernels<T>(isa, t.segment, products);
  PositionWeights<T> weights(t.segment, k.lanes, false);
  AttentionProblem<T> p = problem_of(t, weights, 1, workers.threads);
  const Splits splits(t, workers.threads);
  const int64_t head = t.head(), head_row = ceil_div(head, k.lanes) * k.lanes, channels = weights.channels;
  const int64_t size = 2 * weights.groups * k.lanes + channels * head_row;
  Buffer<T> states(t.batch * splits.splits * size);
  std::vector<std::atomic<int64_t>> gathered(t.batch);
  // The weights, which only the second pass needs, are packed beside the first; whoever ends an image's last
  // split merges all of them.
  workers.run(kLists + t.batch * splits.splits, [&](int64_t i) {
    if (i < kLists) return weights.pack(i, t.weight[i], t.bias[i]);
    const int64_t image = (i - kLists) / splits.splits, s = (i - kLists) % splits.splits;
    T* state = states.get() + image * splits.splits * size;
    k.context(p, image, splits.begin(s), splits.begin(s + 1), state + s * size);
    if (++gathered[image] == splits.splits)
      merge_context(weights, state, size, splits.splits, log_sum + image * channels,
                    context + image * channels * head);
  });
  p.context = context;
  const Chunks chunks{std::min(p.plan.count(), 8 * workers.threads)};
  workers.run(chunks.chunks, [&](int64_t i) {
    k.attention(p, chunks.begin(p.plan.count(), i), chunks.end(p.plan.count(), i));
  });
}

template <class T>
void GroupMixCore<T>::backward(const AttentionTensors<T>& t, const T* log_sum, const T* context, T* grads,
                               Isa isa, const Workers& workers) {
  const GroupMixKernels<T>& k = group_mix_kernels<T>(isa, t.segment, t.dtype);
  PositionWeights<T> weights(t.segment, k.lanes, true);
  AttentionProblem<T> p = problem_of(t, weights, 2, workers.threads);
  const Splits splits(t, workers.threads);
  const int64_t head = t.head(), head_row = ceil_div(head, k.lanes) * k.lanes, channels = weights.channels;
  const int64_t size = channels * head_row;
  Buffer<T> states(t.batch * splits.splits * size);
  workers.run(kLists + t.batch * splits.splits, [&](int64_t i) {
    if (i < kLists) return weights.pack(i, t.weight[i], t.bias[i]);
    const int64_t image = (i - kLists) / splits.splits, s = (i - kLists) % splits.splits;
    k.grad_context(p, image, splits.begin(s), splits.begin(s + 1), states.get() + (i - kLists) * size);
  });
  Buffer<T> grad_context(t.batch * channels * head), row_sum(t.batch * channels + k.lanes);
  Buffer<T> log_sums(t.batch * channels + k.lanes);  // with room for reading whole vectors
  std::copy_n(log_sum, t.batch * channels, log_sums.get());
  workers.run(t.batch, [&](int64_t image) {
    const T* state = states.get() + image * splits.splits * size;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t row = (image * channels + c) * head;
      T total = 0;
      for (int64_t j = 0; j < head; ++j) {
        T value = 0;
        for (int64_t s = 0; s < splits.splits; ++s) value += state[s * size + c * head_row + j];
        grad_context[row + j] = value * p.scale;
        total += grad_context[row + j] * context[row + j];
      }
      row_sum[image * channels + c] = total;
    }
  });
  p.context = context, p.grad_context = grad_context.get(), p.row_sum = row_sum.get(),
  p.log_sum = log_sums.get();
  const Chunks chunks{std::min(p.plan.count(), 4 * workers.threads)};
  const int64_t grad_size = weights.groups * (kTaps + 1) * k.lanes;
  const Places places(workers, chunks);
  Buffer<T> sums(places.count * grad_size);
  workers.run(chunks.chunks, [&](int64_t i) {
    k.attention_backward(p, chunks.begin(p.plan.count(), i), chunks.end(p.plan.count(), i),
                         sums.get() + places.of(i) * grad_size);
  });
  add_places(sums.get(), grad_size, places.count);
  for (int64_t list = 0; list < kLists; ++list)
    weights.each_tap(list, [&](int64_t tap, int64_t) { *grads++ = sums[tap]; });
  std::copy_n(sums.get() + weights.groups * kTaps * k.lanes, channels, grads);
}

template struct GroupMixCore<float>;
template struct GroupMixCore<double>;

}  // namespace lkconv::cpu
