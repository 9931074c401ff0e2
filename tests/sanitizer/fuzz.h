// What the fuzz programs share: random numbers, elements of any dtype, buffers of exactly the size that their
// views need, and threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/depthwise_conv2d.h"

namespace fuzz {

using namespace lkconv;
using namespace lkconv::cpu;

// merge.cpp: random folds of branch kernels. Both print a line for each failure and return whether there was
// one.
int run_merges(uint64_t first, uint64_t count);
// scaled_sum.cpp: random per-channel combinations of tensors.
int run_sums(uint64_t first, uint64_t count);
// branches.cpp: random sums of normalised branches and their gradients.
int run_branches(uint64_t first, uint64_t count);
// segments.cpp: random convolutions of slices of the channels.
int run_segments(uint64_t first, uint64_t count);

constexpr unsigned char kPattern = 0xa5;

struct Random {
  std::mt19937_64 engine;
  int64_t operator()(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine); }
  double normal() { return std::normal_distribution<double>()(engine); }
};

inline double read(const char* p, DType t) {
  switch (t) {
    case DType::f64: {
      double v;
      std::memcpy(&v, p, 8);
      return v;
    }
    case DType::f32: {
      float v;
      std::memcpy(&v, p, 4);
      return v;
    }
    case DType::f16: {
      _Float16 v;
      std::memcpy(&v, p, 2);
      return double(v);
    }
    case DType::bf16: {
      uint32_t bits = 0;
      std::memcpy(reinterpret_cast<char*>(&bits) + 2, p, 2);
      float v;
      std::memcpy(&v, &bits, 4);
      return v;
    }
  }
  std::abort();
}

inline void write(char* p, DType t, double value) {
  if (t == DType::f64) {
    std::memcpy(p, &value, 8);
  } else if (t == DType::f32) {
    const float v = float(value);
    std::memcpy(p, &v, 4);
  } else if (t == DType::f16) {
    const _Float16 v = _Float16(value);
    std::memcpy(p, &v, 2);
  } else {  // truncation gives a bfloat16 too, and inputs may be any
    const float v = float(value);
    std::memcpy(p, reinterpret_cast<const char*>(&v) + 2, 2);
  }
}

using Size = std::array<int64_t, 4>;

// A 4-D tensor with random strides in a buffer of exactly the size it needs.
struct Buffer {
  Size size;
  std::vector<char> bytes;
  TensorView view;

  Buffer(Random& random, Size s, DType dtype, bool input) : size(s) {
    std::array<int, 4> order = {0, 1, 2, 3};
    if (random.chance(0.3))
      order = {0, 2, 3, 1};
    else if (random.chance(0.3))
      std::shuffle(order.begin(), order.end(), random.engine);
    Size stride{};
    int64_t next = 1;
    for (int i = 3; i >= 0; --i) {
      if (random.chance(0.15)) next += random(1, 3);
      stride[order[i]] = next;
      next *= std::max<int64_t>(1, size[order[i]]);
    }
    if (input)
      for (int64_t& v : stride)
        if (random.chance(0.05)) v = 0;
    int64_t last = 0;
    bool empty = false;
    for (int i = 0; i < 4; ++i) {
      empty |= size[i] == 0;
      last += (size[i] - 1) * stride[i];
    }
    const int64_t width = dtype_size(dtype);
    bytes.assign(size_t(empty ? 0 : (last + 1) * width),
                 char(input ? 0xff : kPattern));  // 0xff...: NaN in every type
    bytes.shrink_to_fit();
    view = {bytes.data(), dtype, stride[0], stride[1], stride[2], stride[3]};
    if (input) each([&](const Size& i) { write(at(i), dtype, random.normal()); });
  }
  char* at(const Size& i) {
    return bytes.data() +
           (i[0] * view.stride_n + i[1] * view.stride_c + i[2] * view.stride_h + i[3] * view.stride_w) *
               dtype_size(view.dtype);
  }
  double get(const Size& i) { return read(at(i), view.dtype); }

  template <class Body>
  void each(Body body) const {
    for (int64_t n = 0; n < size[0]; ++n)
      for (int64_t c = 0; c < size[1]; ++c)
        for (int64_t y = 0; y < size[2]; ++y)
          for (int64_t x = 0; x < size[3]; ++x) body(Size{n, c, y, x});
  }
  // Bytes that belong to no element must still hold the pattern.
  bool gaps_untouched() {
    std::vector<char> copy = bytes;
    each([&](const Size& i) {
      std::memset(copy.data() + (at(i) - bytes.data()), kPattern, dtype_size(view.dtype));
    });
    return std::all_of(copy.begin(), copy.end(), [](char b) { return b == char(kPattern); });
  }
};

inline ParallelFor threads_of(int64_t count) {
  return [count](int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    const int64_t parts = std::clamp<int64_t>(tasks / std::max<int64_t>(1, grain), 1, count);
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < parts; ++i)
      threads.emplace_back([&, i] { body(tasks * i / parts, tasks * (i + 1) / parts); });
    body(0, tasks / parts);
    for (std::thread& t : threads) t.join();
  };
}

}  // namespace fuzz
