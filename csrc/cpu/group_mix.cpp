// Launchers of the aggregation: packs weights, cuts images into strips, runs tasks and reduces their sums.
#include <algorithm>
#include <cmath>
#include <mutex>

#include "group_mix_launch.h"

namespace lkconv::cpu {

StripPlan plan_strips(const TokenShape& t, int64_t parts, int64_t halo, int64_t row_bytes, int64_t threads,
                      int64_t tasks) {
  constexpr int64_t kCacheBytes = 512 * 1024;
  // Below `halo` rows a strip would load more than twice what it needs.
  int64_t rows = std::max<int64_t>({1, halo, kCacheBytes / std::max<int64_t>(1, row_bytes) - halo});
  const int64_t wanted = ceil_div(2 * threads, std::max<int64_t>(1, tasks));
  rows = std::min({rows, std::max(std::max<int64_t>(1, halo), ceil_div(t.height, wanted)), t.height});
  const int64_t strips = ceil_div(t.height, rows);
  return {t.batch, parts, strips, ceil_div(t.height, strips)};
}

namespace {

int64_t parts_of(int64_t kind) { return kind == kLocalKind ? kParts : 1; }

// What weights are packed for; scaled ones hold the factor of their BatchNorm.
enum class Packing { forward, scaled, backward };

// Sizes and packed weights of one call.
template <class T>
struct Packed {
  int64_t segment, padded, lanes;
  Buffer<T> depthwise[kKinds], flipped[kKinds], in_out[kKinds], out_in[kKinds];
  Buffer<Bf16Pair> pairs[kKinds];
  Buffer<T> scale, shift, layer_norm;
  std::once_flag packed[kKinds];

  Packed(int64_t d, int64_t kernel_lanes)
      : segment(d),
        padded(GroupMixSizes{kernel_lanes}.padded(d)),
        lanes(kernel_lanes),
        scale(kMixed * padded),
        shift(kMixed * padded),
        layer_norm(2 * padded) {}

  int64_t taps(int64_t kind) const { return kKindKernel[kind] * kKindKernel[kind]; }
  int64_t depth(int64_t kind) const { return parts_of(kind) * padded; }
  // where channel c of part i lies in [group][tap][lane] for the first tap
  int64_t tap_at(int64_t kind, int64_t part, int64_t c) const {
    const int64_t at = part * padded + c;
    return at / lanes * taps(kind) * lanes + at % lanes;
  }

  void pack_depthwise(int64_t kind, const T* weight, bool backward) {
    const int64_t n = taps(kind);
    depthwise[kind] = Buffer<T>(depth(kind) * n);
    if (backward) flipped[kind] = Buffer<T>(depth(kind) * n);
    for (int64_t i = 0; i < parts_of(kind); ++i)
      for (int64_t c = 0; c < segment; ++c, weight += n) {
        T* to = depthwise[kind].get() + tap_at(kind, i, c);
        for (int64_t t = 0; t < n; ++t) to[t * lanes] = weight[t];
        if (!backward) continue;
        to = flipped[kind].get() + tap_at(kind, i, c);
        for (int64_t t = 0; t < n; ++t) to[t * lanes] = weight[n - 1 - t];
      }
  }

  // weight (d, parts * d) as [in][out], and for the backward pass as [out][in]
  void pack_pointwise(int64_t kind, const T* weight, const GroupMixKernels<T>& k, bool backward) {
    const int64_t parts = parts_of(kind);
    in_out[kind] = Buffer<T>(depth(kind) * padded);
    if (parts == 1) {
      k.transpose_weight(in_out[kind].get(), padded, weight, segment, segment);
    } else {
      Buffer<T> part(segment * segment);
      for (int64_t i = 0; i < parts; ++i) {
        for (int64_t o = 0; o < segment; ++o)
          std::copy_n(weight + (o * parts + i) * segment, segment, part.get() + o * segment);
        k.transpose_weight(in_out[kind].get() + i * padded * padded, padded, part.get(), segment, segment);
      }
    }
    if (!backward) return;
    out_in[kind] = Buffer<T>(depth(kind) * padded);
    for (int64_t o = 0; o < segment; ++o)
      for (int64_t i = 0; i < parts; ++i)
        std::copy_n(weight + (o * parts + i) * segment, segment,
                    out_in[kind].get() + o * depth(kind) + i * padded);
  }

  // BatchNorm as scale and shift
  void fold_norms(const AggregateWeights<T>& w) {
    for (int64_t s = 0; s < kMixed; ++s)
      for (int64_t c = 0; c < segment; ++c) {
        const T factor = T(double(w.norm_weight[s][c]) / std::sqrt(double(w.norm_var[s][c]) + w.eps));
        scale[s * padded + c] = factor;
        shift[s * padded + c] = w.norm_bias[s][c] - w.norm_mean[s][c] * factor;
      }
  }

  // Multiplies the pointwise weight of a convolved segment by its scale.
  void fold_scale(int64_t kind) {
    T* row = in_out[kind].get();
    const T* factor = scale.get() + kind * padded;
    for (int64_t i = 0; i < segment; ++i, row += padded)
      for (int64_t o = 0; o < padded; ++o) row[o] *= factor[o];
  }

  void pack_layer_norm(const AggregateWeights<T>& w) {
    std::copy_n(w.layer_norm_weight, segment, layer_norm.get());
    std::copy_n(w.layer_norm_bias, segment, layer_norm.get() + padded);
  }

  void pack_kind(int64_t kind, const AggregateWeights<T>& w, const GroupMixKernels<T>& k, bool backward) {
    pack_depthwise(kind, w.depthwise[kind - 1], backward);
    pack_pointwise(kind, w.pointwise[kind - 1], k, backward);
    if (!k.pack_pairs || backward) return;
    pairs[kind] = Buffer<Bf16Pair>(depth(kind) / 2 * padded);
    k.pack_pairs(pairs[kind].get(), in_out[kind].get(), depth(kind), padded);
  }

  MixWeights<T> weights(int64_t kind) const {
    return {depthwise[kind].get(), flipped[kind].get(), in_out[kind].get(), pairs[kind].get(),
            out_in[kind].get()};
  }

  // Packs the weights of a kind for the first task that asks for them, to which `weights` points from then
  // on: threads pack different kinds at the same time, without a parallel region for that alone.
  void pack_once(int64_t kind, const AggregateWeights<T>& w, const GroupMixKernels<T>& k, Packing packing,
                 MixWeights<T>& to) {
    if (kind == 0) return;
    std::call_once(packed[kind], [&] {
      pack_kind(kind, w, k, packing == Packing::backward);
      if (packing == Packing::scaled && kind < kMixed) fold_scale(kind);
      to = weights(kind);
    });
  }
};

template <class T>
void plan_kinds(const TokenShape& t, const Packed<T>& packed, int64_t windows, int64_t threads,
                StripPlan* plan) {
  for (int64_t kind = 0; kind < kKinds; ++kind) {
    const int64_t halo = kKindKernel[kind] ? kKindKernel[kind] - 1 : 0;
    const int64_t row = (t.width + halo) * packed.depth(kind) * int64_t(sizeof(T)) * windows;
    plan[kind] =
        plan_strips(t, kind == kLocalKind ? 1 : kParts, halo, row, threads, t.batch * (kParts * kMixed + 1));
  }
}

// The most expensive kinds first, so that the last tasks handed out are small.
constexpr int64_t kOrder[kKinds] = {4, 3, 2, 1, 0};

Chunks chunks_for(const StripPlan* plan, int64_t limit) {
  int64_t most = 1;
  for (int64_t kind = 0; kind < kKinds; ++kind) most = std::max(most, plan[kind].count());
  return {std::min(most, limit)};
}

// task(kind, chunk, begin, end) for every chunk of every kind that has strips.
template <class Task>
void run_kinds(const StripPlan* plan, const Chunks& chunks, const Workers& workers, Task&& task) {
  workers.run(chunks.chunks * kKinds, [&](int64_t i) {
    const int64_t chunk = i / kKinds, kind = kOrder[i % kKinds], count = plan[kind].count();
    const int64_t begin = chunks.begin(count, chunk), end = chunks.end(count, chunk);
    if (end > begin) task(kind, chunk, begin, end);
  });
}

// Elementwise passes go over the tokens of (3, B, N).
int64_t all_tokens(const TokenShape& t) { return kParts * t.batch * t.tokens(); }

Chunks token_chunks(const TokenShape& t, int64_t threads) {
  return {std::clamp<int64_t>(all_tokens(t) / 256, 1, 4 * threads)};
}

template <class T>
AggregateProblem<T> problem_of(const AggregateTensors<T>& t, const Packed<T>& packed, double layer_norm_eps) {
  AggregateProblem<T> p{};
  static_cast<TokenShape&>(p) = t;
  p.dtype = t.dtype, p.qkv = t.qkv, p.mixed = t.mixed;
  p.premix = t.premix_out, p.prelocal = t.prelocal_out, p.local = t.local;
  p.scale = packed.scale.get(), p.shift = packed.shift.get(), p.layer_norm = packed.layer_norm.get();
  p.layer_norm_eps = T(layer_norm_eps);
  return p;
}

}  // namespace

template <class T>
void GroupMix<T>::aggregate(const AggregateTensors<T>& t, const AggregateWeights<T>& w, Isa isa,
                            const Workers& workers) {
  const GroupMixKernels<T>& k = group_mix_kernels<T>(isa, t.segment, t.dtype);
  Packed<T> packed(t.segment, k.lanes);
  packed.pack_layer_norm(w);
  packed.fold_norms(w);
  const Packing packing = k.pack_pairs ? Packing::forward : Packing::scaled;
  AggregateProblem<T> p = problem_of(t, packed, w.layer_norm_eps);
  plan_kinds(t, packed, 1, workers.threads, p.plan);
  run_kinds(p.plan, chunks_for(p.plan, 8 * workers.threads), workers,
            [&](int64_t kind, int64_t, int64_t begin, int64_t end) {
              packed.pack_once(kind, w, k, packing, p.weights[kind]);
              k.aggregate(p, kind, begin, end);
            });
}

template <class T>
void GroupMix<T>::mix(const AggregateTensors<T>& t, const AggregateWeights<T>& w, T* mean, T* var, Isa isa,
                      const Workers& workers) {
  const GroupMixKernels<T>& k = group_mix_kernels<T>(isa, t.segment, t.dtype);
  Packed<T> packed(t.segment, k.lanes);
  packed.pack_layer_norm(w);
  AggregateProblem<T> p = problem_of(t, packed, w.layer_norm_eps);
  plan_kinds(t, packed, 1, workers.threads, p.plan);
  const Chunks chunks = chunks_for(p.plan, 8 * workers.threads);
  const int64_t size = 3 * packed.padded;
  Buffer<T> statistics(chunks.chunks * kKinds * size);
  run_kinds(p.plan, chunks, workers, [&](int64_t kind, int64_t chunk, int64_t begin, int64_t end) {
    packed.pack_once(kind, w, k, Packing::forward, p.weights[kind]);
    k.mix(p, kind, begin, end, statistics.get() + (chunk * kKinds + kind) * size);
  });
  for (int64_t s = 0; s < kMixed; ++s)
    for (int64_t c = 0; c < t.segment; ++c) {
      double n = 0, m = 0, squares = 0;
      for (int64_t i = 0; i < chunks.chunks; ++i) {
        const T* from = statistics.get() + (i * kKinds + s) * size;
        const double count = from[0];
        if (count == 0) continue;
        const double delta = double(from[packed.padded + c]) - m;
        m += delta * count / (n + count);
        squares += double(from[2 * packed.padded + c]) + delta * delta * n * count / (n + count);
        n += count;
      }
      mean[s * t.segment + c] = T(m);
      var[s * t.segment + c] = T(squares / n);
    }
}

template <class T>
void GroupMix<T>::normalize(const AggregateTensors<T>& t, const AggregateWeights<T>& w, Isa isa,
                            const Workers& workers) {
  const GroupMixKernels<T>& k = group_mix_kernels<T>(isa, t.segment, t.dtype);
  Packed<T> packed(t.segment, k.lanes);
  packed.fold_norms(w);
  AggregateProblem<T> p = problem_of(t, packed, 0);
  p.premix = const_cast<void*>(t.premix);
  const int64_t tokens = all_tokens(t);
  const Chunks chunks = token_chunks(t, workers.threads);
  workers.run(chunks.chunks,
              [&](int64_t i) { k.normalize(p, chunks.begin(tokens, i), chunks.end(tokens, i)); });
}

namespace {

template <class T>
AggregateBackwardProblem<T> backward_problem(const AggregateTensors<T>& t, const Packed<T>& packed,
                                             double layer_norm_eps) {
  AggregateBackwardProblem<T> p{};
  static_cast<TokenShape&>(p) = t;
  p.dtype = t.dtype, p.qkv = t.qkv, p.premix = t.premix, p.prelocal = t.prelocal;
  std::copy_n(t.grad_mixed, kParts, p.grad_mixed);
  p.grad_local = t.grad_local, p.local_stride = t.local_stride, p.grad_qkv = t.grad_qkv;
  p.scale = packed.scale.get(), p.shift = packed.shift.get(), p.layer_norm = packed.layer_norm.get();
  p.layer_norm_eps = T(layer_norm_eps);
  return p;
}

}  // namespace

template <class T>
void GroupMix<T>::backward_reduce(const AggregateTensors<T>& t, const AggregateWeights<T>& w, double* sums,
                                  Isa isa, const Workers& workers) {
  const GroupMixKernels<T>& k = group_mix_kernels<T>(isa, t.segment, t.dtype);
  Packed<T> packed(t.segment, k.lanes);
  packed.fold_norms(w);
  AggregateBackwardProblem<T> p = backward_problem(t, packed, 0);
  Buffer<T> mean(kMixed * packed.padded);
  for (int64_t s = 0; s < kMixed; ++s) std::copy_n(w.norm_mean[s], t.segment, mean.get() + s * packed.padded);
  p.mean = mean.get();
  const int64_t size = 2 * kMixed * packed.padded;
  const int64_t tokens = all_tokens(t);
  const Chunks chunks = token_chunks(t, workers.threads);
  Buffer<double> partial(chunks.chunks * size);
  workers.run(chunks.chunks, [&](int64_t i) {
    k.backward_reduce(p, chunks.begin(tokens, i), chunks.end(tokens, i), partial.get() + i * size);
  });
  for (int64_t q = 0; q < 2; ++q)
    for (int64_t s = 0; s < kMixed; ++s)
      for (int64_t c = 0; c < t.segment; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < chunks.chunks; ++i)
          sum += partial[i * size + (q * kMixed + s) * packed.padded + c];
        sums[(q * kMixed + s) * t.segment + c] = q ? sum / std::sqrt(double(w.norm_var[s][c]) + w.eps) : sum;
      }
}

namespace {

// What one chunk of a kind adds up: the pointwise weight [out][in], the depthwise weight, LayerNorm's two.
template <class T>
int64_t grad_size(const Packed<T>& packed, int64_t kind) {
  if (kind == 0) return 0;
  return packed.padded * packed.depth(kind) + packed.depth(kind) * packed.taps(kind) +
         (kind == kLocalKind ? 2 * packed.padded : 0);
}

// From the kernels' padded order to the parameters' own.
template <class T>
void write_grads(const Packed<T>& packed, const T* const* sums, T* grads) {
  const int64_t d = packed.segment, padded = packed.padded;
  for (int64_t kind = 1; kind < kKinds; ++kind)
    for (int64_t i = 0; i < parts_of(kind); ++i)
      for (int64_t c = 0; c < d; ++c) {
        const T* from = sums[kind] + padded * packed.depth(kind) + packed.tap_at(kind, i, c);
        for (int64_t t = 0; t < packed.taps(kind); ++t) *grads++ = from[t * packed.lanes];
      }
  for (int64_t kind = 1; kind < kKinds; ++kind)
    for (int64_t o = 0; o < d; ++o)
      for (int64_t i = 0; i < parts_of(kind); ++i)
        grads = std::copy_n(sums[kind] + o * packed.depth(kind) + i * padded, d, grads);
  const int64_t norm = padded * packed.depth(kLocalKind) + packed.depth(kLocalKind) * packed.taps(kLocalKind);
  for (int64_t i = 0; i < 2; ++i) grads = std::copy_n(sums[kLocalKind] + norm + i * padded, d, grads);
}

}  // namespace

template <class T>
void GroupMix<T>::backward(const AggregateTensors<T>& t, const AggregateWeights<T>& w, const double* sums,
                           double count, T* grads, Isa isa, const Workers& workers) {
  const GroupMixKernels<T>& k = group_mix_kernels<T>(isa, t.segment, t.dtype);
  Packed<T> packed(t.segment, k.lanes);
  packed.pack_layer_norm(w);
  packed.fold_norms(w);
  AggregateBackwardProblem<T> p = backward_problem(t, packed, w.layer_norm_eps);
  // dU = scale * (dA - mean(dA) - U^ mean(dA U^)) with U^ = (U - mean) / sigma
  Buffer<T> slope(kMixed * packed.padded), offset(kMixed * packed.padded);
  for (int64_t s = 0; sums && s < kMixed; ++s)
    for (int64_t c = 0; c < t.segment; ++c) {
      const double factor = packed.scale[s * packed.padded + c];
      const double mean = sums[s * t.segment + c] / count,
                   product = sums[(kMixed + s) * t.segment + c] / count;
      const double per_sigma = product / std::sqrt(double(w.norm_var[s][c]) + w.eps);
      slope[s * packed.padded + c] = T(-factor * per_sigma);
      offset[s * packed.padded + c] = T(factor * (per_sigma * double(w.norm_mean[s][c]) - mean));
    }
  p.slope = slope.get(), p.offset = offset.get();
  plan_kinds(t, packed, 2, workers.threads, p.plan);
  const Chunks chunks = chunks_for(p.plan, 4 * workers.threads);
  const Places places(workers, chunks);
  Buffer<T> partial[kKinds];
  const T* totals[kKinds];
  for (int64_t kind = 0; kind < kKinds; ++kind) {
    partial[kind] = Buffer<T>(places.count * grad_size(packed, kind));
    totals[kind] = partial[kind].get();
  }
  run_kinds(p.plan, chunks, workers, [&](int64_t kind, int64_t chunk, int64_t begin, int64_t end) {
    packed.pack_once(kind, w, k, Packing::backward, p.weights[kind]);
    k.backward(p, kind, begin, end, partial[kind].get() + places.of(chunk) * grad_size(packed, kind));
  });
  for (int64_t kind = 1; kind < kKinds; ++kind)
    add_places(partial[kind].get(), grad_size(packed, kind), places.count);
  write_grads(packed, totals, grads);
}

template struct GroupMix<float>;
template struct GroupMix<double>;

}  // namespace lkconv::cpu
