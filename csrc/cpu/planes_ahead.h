// Asks for the memory of planes to come while this one is summed. Blocks visit a plane's rows in an order
// that hardware prefetchers follow only in part, and a line that is written must be owned first: without
// this, tensors that come from memory take the sum of both times instead of the longer one.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

constexpr int64_t kPlanesAheadBytes = 8 << 10;  // at least so far, if planes are smaller
// Elements from one plane, of `size` elements, to the one that is asked for meanwhile.
template <class T>
int64_t plane_ahead(const TensorView& t, int64_t size) {
  const int64_t bytes = std::max<int64_t>(1, size) * int64_t(sizeof(T));
  return t.stride_c * ceil_div(kPlanesAheadBytes, bytes);
}

template <class T>
class PlanesAhead {
 public:
  PlanesAhead() = default;
  // `in` and `out` are the tensors whose planes of so many elements one task reads and writes in `steps`
  // steps.
  PlanesAhead(const TensorView& in, int64_t in_size, const TensorView& out, int64_t out_size, int64_t planes,
              int64_t steps)
      : in_{in, in_size, steps}, out_{out, out_size, steps} {
    if ((in_size + out_size) * planes * int64_t(sizeof(T)) < kRequestBytes) in_.step = out_.step = 0;
  }

  // Step `step` of the planes that begin at `in` and `out`.
  LKCONV_INLINE void request(const T* in, T* out, int64_t step) const {
    in_.template request<0>(in, step);
    out_.template request<1>(out, step);
  }
  // The same where both tensors are read.
  LKCONV_INLINE void request_both(const T* a, const T* b, int64_t step) const {
    in_.template request<0>(a, step);
    out_.template request<0>(b, step);
  }

 private:
  static constexpr int64_t kLine = 64 / int64_t(sizeof(T));

  struct Stream {
    int64_t distance = 0, size = 0, step = 0;  // elements; step: per step, none if 0
    Stream() = default;
    Stream(const TensorView& t, int64_t size, int64_t steps)
        : distance(plane_ahead<T>(t, size)), size(size), step(round_up(ceil_div(size, steps), kLine)) {}
    template <int kWrite>
    LKCONV_INLINE void request(const T* plane, int64_t index) const {
      const T* at = plane + distance;
      const int64_t end = std::min(size, (index + 1) * step);
      for (int64_t i = index * step; i < end; i += kLine) __builtin_prefetch(at + i, kWrite, 2);
    }
  };
  Stream in_, out_;
};

}  // namespace lkconv::cpu::LKCONV_ISA
