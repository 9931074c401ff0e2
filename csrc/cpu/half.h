// IEEE binary16 conversions in plain C++, for instruction sets without them and for scalar tails.
#pragma once

#include <cstdint>
#include <cstring>

namespace lkconv::cpu {

inline float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31)
    return bits_to_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0));
  if (exponent) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  float subnormal = float(mantissa) * 5.9604644775390625e-08f;  // 2^-24
  return sign ? -subnormal : subnormal;
}

inline uint16_t float_to_half(float f) {
  uint32_t b = float_to_bits(f), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (a < 0x38800000u) {  // subnormal: let the float adder round to the grid of 2^-24
    float r = bits_to_float(a) + 0.5f;
    return uint16_t(sign | (float_to_bits(r) - 0x3f000000u));
  }
  uint32_t r = a + 0xfffu + ((a >> 13) & 1u) - (112u << 23);
  return uint16_t(sign | (r >> 13));
}

inline float bfloat_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

inline uint16_t float_to_bfloat(float f) {
  uint32_t b = float_to_bits(f);
  if (f != f) return uint16_t((b >> 16) | 0x40u);
  return uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

}  // namespace lkconv::cpu
