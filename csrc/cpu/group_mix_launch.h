// Shared by the Group-Mix launchers: aligned buffers, the choice of instruction set, strips and task
// scheduling.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "depthwise_conv2d.h"
#include "group_mix.h"
#include "machine.h"

namespace lkconv::cpu {

// A 64-byte aligned array of zeros.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 127) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_.get()), 0, bytes);
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// Threads, and how to run them.
struct Workers {
  int64_t threads;
  ParallelFor parallel;

  // body(task) for every task, handed out one at a time: tasks differ in cost. Results never depend on which
  // thread runs a task, because partial sums belong to tasks.
  template <class Body>
  void run(int64_t tasks, Body&& body) const {
    if (tasks == 0) return;
    std::atomic<int64_t> next{0};
    parallel(std::min(threads, tasks), 1, [&](int64_t first, int64_t last) {
      for (int64_t worker = first; worker < last; ++worker)
        for (int64_t i = next++; i < tasks; i = next++) body(i);
    });
  }
};

// Whether 512-bit vectors pay for segments of `segment` channels: once a segment fills one, and, on
// processors not known to run as many of them as of 256 bits, unless they leave half a vector empty.
inline bool wants_512_bits(Isa isa, int64_t segment, bool whole) {
  const int64_t rest = segment % 16;
  return isa >= Isa::avx512 && segment >= 16 && (whole || rest == 0 || rest > 8);
}

template <class T>
const GroupMixKernels<T>& group_mix_kernels(Isa isa, int64_t segment, DType dtype) {
  const bool wide = wants_512_bits(isa, segment, whole_512_bits());
  const GroupMixTable* table = wide               ? group_mix_avx512()
                               : isa >= Isa::avx2 ? group_mix_avx2()
                                                  : group_mix_baseline();
  if constexpr (std::is_same_v<T, double>)
    return table->f64;
  else
    return wide && dtype == DType::bf16 && bf16_products() ? *group_mix_avx512_bf16() : table->f32;
}

// Strips of as many rows as keep `row_bytes` per row (plus `halo` rows) in a second-level cache, and enough
// strips for `threads` when there are fewer than `tasks` images.
StripPlan plan_strips(const TokenShape& t, int64_t parts, int64_t halo, int64_t row_bytes, int64_t threads,
                      int64_t tasks);

// Tasks of kinds, `chunks` to a kind; the strips of a chunk are handled in order.
struct Chunks {
  int64_t chunks;
  int64_t begin(int64_t count, int64_t chunk) const { return count * chunk / chunks; }
  int64_t end(int64_t count, int64_t chunk) const { return count * (chunk + 1) / chunks; }
};

// Where chunks put their sums. One thread takes them in order, so that a single place holds them all.
struct Places {
  int64_t count;
  Places(const Workers& workers, const Chunks& chunks) : count(workers.threads == 1 ? 1 : chunks.chunks) {}
  int64_t of(int64_t chunk) const { return count == 1 ? 0 : chunk; }
};

// Adds the sums of all places, in order, to those of the first.
template <class T>
void add_places(T* sums, int64_t size, int64_t places) {
  for (int64_t i = 1; i < places; ++i)
    for (int64_t at = 0; at < size; ++at) sums[at] += sums[i * size + at];
}

// Weights of the aggregation as they are in the module, in the accumulation type: depthwise and pointwise of
// kinds 1 to 4, BatchNorms 0 to 3 (mean is null where statistics come from the batch).
template <class T>
struct AggregateWeights {
  const T *depthwise[4], *pointwise[4];
  const T *norm_weight[4], *norm_bias[4], *norm_mean[4], *norm_var[4];
  const T *layer_norm_weight, *layer_norm_bias;
  double eps, layer_norm_eps;
};

template <class T>
struct AggregateTensors : TokenShape {
  DType dtype;
  const void *qkv, *premix, *prelocal, *grad_local;
  const void* grad_mixed[kParts];  // of q, k and v, each (B, N, 4d)
  int64_t local_stride;
  void *mixed, *premix_out, *prelocal_out, *local, *grad_qkv;
};

template <class T>
struct GroupMix {
  // (mixed, local) with fixed statistics
  static void aggregate(const AggregateTensors<T>&, const AggregateWeights<T>&, Isa, const Workers&);
  // (premix, prelocal, local, mean, var): the statistics are (4, d), biased
  static void mix(const AggregateTensors<T>&, const AggregateWeights<T>&, T* mean, T* var, Isa,
                  const Workers&);
  static void normalize(const AggregateTensors<T>&, const AggregateWeights<T>&, Isa, const Workers&);
  // sums (2, 4, d): of dA and of dA times the normalised U
  static void backward_reduce(const AggregateTensors<T>&, const AggregateWeights<T>&, double* sums, Isa,
                              const Workers&);
  // `sums` over `count` tokens, or null for fixed statistics. grads: depthwise of kinds 1 to 4, pointwise of
  // kinds 1 to 4, LayerNorm's weight and bias, one after the other.
  static void backward(const AggregateTensors<T>&, const AggregateWeights<T>&, const double* sums,
                       double count, T* grads, Isa, const Workers&);
};

// The attention core; context is (B, 8, d/2, d/2), log_sum (B, 4d).
template <class T>
struct AttentionTensors : TokenShape {
  DType dtype;
  const void *mixed, *local, *grad_out;
  void *out, *grad_mixed;
  double scale;
  const T *weight[3], *bias[3];
};

template <class T>
struct GroupMixCore {
  static void forward(const AttentionTensors<T>&, T* log_sum, T* context, Isa, const Workers&);
  // grads: the three weights, then the three biases, one after the other
  static void backward(const AttentionTensors<T>&, const T* log_sum, const T* context, T* grads, Isa,
                       const Workers&);
};

}  // namespace lkconv::cpu
