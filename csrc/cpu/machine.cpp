#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "amx_detect.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lkconv::cpu {

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();

const Kernels* kernels_for(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return kernels_baseline();
    case Isa::avx2:
      return kernels_avx2();
    case Isa::avx512:
      return bf16_products() ? kernels_avx512_bf16() : kernels_avx512();
    case Isa::amx:
      return kernels_amx();
  }
  return nullptr;
}

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "amx"};
  return names[int(isa)];
}

Isa detected_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && amx_available()) return Isa::amx;
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

// Asked once: CPUID leaves a virtual machine, which takes tens of microseconds.
const std::string& processor_vendor() {
  static const std::string vendor = []() -> std::string {
#if defined(__x86_64__)
    unsigned top = 0, name[3] = {};
    if (__get_cpuid(0, &top, &name[0], &name[2], &name[1]))
      return std::string(reinterpret_cast<const char*>(name), sizeof(name));
#endif
    return "";
  }();
  return vendor;
}

bool whole_512_bits_of(const std::string& vendor, unsigned signature, bool amx) {
  if (vendor != "AuthenticAMD") return amx;
  const unsigned family = (signature >> 8 & 15) + (signature >> 20 & 255);
  const unsigned model = (signature >> 4 & 15) | (signature >> 12 & 0xf0);
  const bool small = (model >= 0x20 && model < 0x40) || (model >= 0x60 && model < 0x70);
  return family == 0x1a ? !small : family > 0x1a;
}

bool whole_512_bits() {
  static const bool whole = [] {
    unsigned signature = 0;
#if defined(__x86_64__)
    unsigned b, c, d;
    if (!__get_cpuid(1, &signature, &b, &c, &d)) signature = 0;
#endif
    return whole_512_bits_of(processor_vendor(), signature, detected_isa() == Isa::amx);
  }();
  return whole;
}

bool bf16_products() {
  static const bool have = [] {
    const char* wanted = std::getenv("LKCONV_BF16_PRODUCTS");
    if (wanted && !std::strcmp(wanted, "0")) return false;
#if defined(__x86_64__)
    __builtin_cpu_init();
    return bool(__builtin_cpu_supports("avx512bf16"));
#else
    return false;
#endif
  }();
  return have;
}

Isa active_isa() {
  static const Isa isa = [] {
    const Isa best = detected_isa();
    const char* cap = std::getenv("LKCONV_MAX_CPU_ISA");
    if (!cap || !*cap) return best;
    for (Isa i : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::amx})
      if (!std::strcmp(cap, isa_name(i))) return std::min(best, i);
    throw std::invalid_argument(
        std::string("LKCONV_MAX_CPU_ISA must be baseline, avx2, avx512 or amx, got ") + cap);
  }();
  return isa;
}

Machine machine_for(Isa isa, int64_t threads) {
  const Kernels* k = kernels_for(isa);
  if (!k) throw std::invalid_argument(std::string("this build has no kernels for ") + isa_name(isa));
  return {isa,
          threads,
          k->lanes_f32,
          k->lanes_f64,
          k->vector_registers >= 32,
          k->forward_direct_pairs != nullptr};
}

void* thread_scratch_bytes(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    buffer.reset();
    capacity = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.reset(std::aligned_alloc(64, rounded));
    if (!buffer) throw std::bad_alloc();
    capacity = rounded;
  }
  return buffer.get();
}

}  // namespace lkconv::cpu
