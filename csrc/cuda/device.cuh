// The machine as the kernels see it: one thin function per hardware instruction. nvcc compiles them to inline
// PTX; any other compiler takes them from a shim that runs a grid on the CPU, so that the kernels can be
// tested on machines without a GPU. Knows nothing of torch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define LK_DEVICE __device__ __forceinline__
#else
#include "cuda_shim.h"
#define LK_DEVICE inline
#endif

namespace lkconv::cuda {

constexpr int kWarp = 32;

// 16-bit floating-point numbers as storage; arithmetic is always in float.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class T>
struct alignas(4 * sizeof(T)) Vec4 {
  T v[4];
};

// 16, 8 or 4 bytes moved as one access.
template <int Bytes>
struct alignas(Bytes) Packet {
  uint32_t words[Bytes / 4];
};

#ifdef __CUDACC__

extern __shared__ __align__(128) unsigned char lk_dynamic_shared[];
LK_DEVICE unsigned char* dynamic_shared() { return lk_dynamic_shared; }
LK_DEVICE void sync_block() { __syncthreads(); }
LK_DEVICE void sync_warp() { __syncwarp(); }
LK_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

LK_DEVICE float to_float(Half h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
}
LK_DEVICE float to_float(BFloat h) { return __uint_as_float(uint32_t(h.bits) << 16); }
LK_DEVICE void from_float(float f, Half& h) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f)); }
LK_DEVICE void from_float(float f, BFloat& h) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(f)); }

// The float whose low 13 bits are zero that lies nearest: what the tf32 unit should be given.
LK_DEVICE float round_to_tf32(float f) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(f));
  return __uint_as_float(bits);
}
LK_DEVICE uint32_t float_bits(float f) { return __float_as_uint(f); }
LK_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
LK_DEVICE double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

LK_DEVICE float exponential(float a) { return expf(a); }
LK_DEVICE double exponential(double a) { return exp(a); }
LK_DEVICE float square_root(float a) { return sqrtf(a); }
LK_DEVICE double square_root(double a) { return sqrt(a); }
LK_DEVICE float natural_log(float a) { return logf(a); }
LK_DEVICE double natural_log(double a) { return log(a); }

LK_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Loads four 8x8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix i / 8.
LK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
LK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
LK_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

#define LK_MMA(shape_and_types)                         \
  asm("mma.sync.aligned." shape_and_types               \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
      "{%0, %1, %2, %3};"                               \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
// d += a b with a 16 x K and b K x 8: K is 16 for 16-bit types, 8 for tf32.
LK_DEVICE void mma(Half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  LK_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
LK_DEVICE void mma(BFloat, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  LK_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
LK_DEVICE void mma(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  LK_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef LK_MMA

// Copies `valid` bytes to shared memory and zeroes the rest of `Bytes`, asynchronously.
template <int Bytes>
LK_DEVICE void copy_async(void* shared, const void* global, int valid) {
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(Bytes), "r"(valid)
                 : "memory");
}
LK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GroupsLeft>
LK_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
}

#else  // the shim

LK_DEVICE unsigned char* dynamic_shared() { return shim::dynamic_shared_memory(); }
LK_DEVICE void sync_block() { shim::barrier(); }
LK_DEVICE void sync_warp() { shim::warp_barrier(); }
LK_DEVICE uint32_t shuffle(uint32_t value, int lane) { return shim::shuffle(value, lane); }

LK_DEVICE float to_float(Half h) { return cpu::half_to_float(h.bits); }
LK_DEVICE float to_float(BFloat h) { return cpu::bfloat_to_float(h.bits); }
LK_DEVICE void from_float(float f, Half& h) { h.bits = cpu::float_to_half(f); }
LK_DEVICE void from_float(float f, BFloat& h) { h.bits = cpu::float_to_bfloat(f); }
LK_DEVICE uint32_t float_bits(float f) { return cpu::float_to_bits(f); }
LK_DEVICE float round_to_tf32(float f) {
  const uint32_t bits = cpu::float_to_bits(f);
  if ((bits & 0x7f800000u) == 0x7f800000u) return f;
  return cpu::bits_to_float((bits + 0x1000u) & 0xffffe000u);
}
LK_DEVICE float fused_multiply_add(float a, float b, float c) { return a * b + c; }
LK_DEVICE double fused_multiply_add(double a, double b, double c) { return a * b + c; }
LK_DEVICE float exponential(float a) { return std::exp(a); }
LK_DEVICE double exponential(double a) { return std::exp(a); }
LK_DEVICE float square_root(float a) { return std::sqrt(a); }
LK_DEVICE double square_root(double a) { return std::sqrt(a); }
LK_DEVICE float natural_log(float a) { return std::log(a); }
LK_DEVICE double natural_log(double a) { return std::log(a); }

LK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) { shim::ldmatrix(r, 4, false, row); }
LK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { shim::ldmatrix(r, 4, true, row); }
LK_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { shim::ldmatrix(r, 2, true, row); }

LK_DEVICE void shim_mma(shim::MmaKind kind, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  shim::mma(kind, d, a, b);
}
LK_DEVICE void mma(Half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim_mma(shim::MmaKind::f16, d, a, b0, b1);
}
LK_DEVICE void mma(BFloat, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim_mma(shim::MmaKind::bf16, d, a, b0, b1);
}
LK_DEVICE void mma(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim_mma(shim::MmaKind::tf32, d, a, b0, b1);
}

template <int Bytes>
LK_DEVICE void copy_async(void* shared, const void* global, int valid) {
  shim::copy_async(shared, global, Bytes, valid);
}
LK_DEVICE void commit_copies() { shim::commit_async(); }
template <int GroupsLeft>
LK_DEVICE void wait_copies() {
  shim::wait_async(GroupsLeft);
}

#endif

LK_DEVICE float to_float(float f) { return f; }
LK_DEVICE double to_float(double f) { return f; }
LK_DEVICE void from_float(float f, float& out) { out = f; }
LK_DEVICE void from_float(double f, double& out) { out = f; }

// The type a dtype is accumulated in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

LK_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
LK_DEVICE int max_int(int a, int b) { return a > b ? a : b; }
LK_DEVICE int ceil_div_int(int a, int b) { return (a + b - 1) / b; }
// floor(a / b) and ceil(a / b) for b > 0 and any a
LK_DEVICE int floor_div_int(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
LK_DEVICE int ceil_div_signed(int a, int b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

}  // namespace lkconv::cuda
