// What kernels ask for ahead of time, and when: pixels of channels_last tensors are single lines, far from
// each other, which hardware prefetchers do not foresee.
#pragma once

#include "element_vectors.h"

namespace lkconv::cpu::LKCONV_ISA {

constexpr int64_t kRequestBytes = 1 << 20;  // smaller tensors stay in a core's own cache

LKCONV_INLINE int64_t input_bytes(const Geometry& p, DType dtype) {
  return p.batch * p.height * p.width * p.channels * dtype_size(dtype);
}
// Whether the next rows of an image are asked for.
LKCONV_INLINE bool requests_rows(const Geometry& p, DType dtype) {
  return input_bytes(p, dtype) >= kRequestBytes;
}
// What rows in place ask for ahead of time. Pixels that are in a cache come soon enough, and so do outputs in
// a core's own; but a new output rarely is there, and stores wait for each other, unless much is computed for
// each. Pixels that fall in few sets of a cache are gone before they are used.
enum class Ahead { nothing, outputs, all };
constexpr int64_t kOutputsAheadBytes[2] = {2 << 20, 16 << 20};
constexpr int64_t kOutputsAheadTaps = 25;
LKCONV_INLINE Ahead requests_ahead(const Geometry& p, DType dtype) {
  const int64_t pixel = p.channels * dtype_size(dtype), bytes = bytes_of_tensors(p, dtype_size(dtype));
  if (bytes >= kCachedBytes) return Ahead::all;
  const bool little = p.stride_w == 1 && p.kernel_h * p.kernel_w <= kOutputsAheadTaps;
  return little && bytes >= kOutputsAheadBytes[pixel % kFewSetsBytes == 0] ? Ahead::outputs : Ahead::nothing;
}

// The same for backward_weight, which writes little: rows of bfloat16 take longer than memory does.
constexpr int64_t kWeightAheadBytes = 16 << 20, kHalfWeightAheadBytes = 64 << 20;
constexpr int64_t kStridedWeightAheadBytes[2] = {8 << 20, 12 << 20};
LKCONV_INLINE bool requests_weight_rows(const Geometry& p, DType dtype) {
  const int64_t pixel = p.channels * dtype_size(dtype), bytes = bytes_of_tensors(p, dtype_size(dtype));
  if (dtype == DType::bf16) return bytes >= kHalfWeightAheadBytes;
  return bytes >= (p.stride_w == 1 ? kWeightAheadBytes : kStridedWeightAheadBytes[pixel >= kFarPixelBytes]);
}

// Whether planes that direct sums copy to scratch are asked for ahead, 16 at a time: while the tensors stay
// in a shared cache this costs more than it gives.
constexpr int64_t kRequestPlaneBytes = 6 << 20;
LKCONV_INLINE bool requests_planes(const Geometry& p, DType dtype) {
  return input_bytes(p, dtype) >= kRequestPlaneBytes;
}

// Lines of a row of pixels, `step` elements apart, of which `groups` groups of channels read one each: in the
// order of addresses, which memory serves faster than lines that are pixels apart. Each group asks for its
// share.
class PixelsAhead {
 public:
  PixelsAhead() = default;  // of nothing: there is one for each row of sums
  // One group's own lines.
  template <class T>
  LKCONV_INLINE PixelsAhead(const T* row, int64_t step)
      : at_(reinterpret_cast<const char*>(row)), skip_(step * int64_t(sizeof(T))), groups_(1), group_(0) {}
  // From the line on that has so many before it.
  template <class T>
  LKCONV_INLINE PixelsAhead(const T* row, int64_t step, int64_t groups, int64_t before)
      : at_(reinterpret_cast<const char*>(row + before / groups * step + before % groups * kElements<T>)),
        skip_((step - (groups - 1) * kElements<T>)*int64_t(sizeof(T))),
        groups_(groups),
        group_(before % groups) {}

  LKCONV_INLINE void request(int64_t lines) {
    const char* at = at_;
    int64_t group = group_;
    for (int64_t i = 0; i < lines; ++i) {
      __builtin_prefetch(at, 0, 2);
      const bool last = ++group == groups_;
      at += last ? skip_ : int64_t(LKCONV_VECTOR_BYTES);
      if (last) group = 0;
    }
    group_ = group, at_ = at;
  }
  // The same for one group.
  LKCONV_INLINE void request_own(int64_t lines) {
    const char* at = at_;
    for (int64_t i = 0; i < lines; ++i, at += skip_) __builtin_prefetch(at, 0, 2);
    at_ = at;
  }

 private:
  const char* at_;
  int64_t skip_, groups_, group_;
};

}  // namespace lkconv::cpu::LKCONV_ISA
