#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "amx_detect.h"

namespace lkconv::cpu {

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();

const Kernels* kernels_for(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return kernels_baseline();
    case Isa::avx2:
      return kernels_avx2();
    case Isa::avx512:
      return kernels_avx512();
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
  return {isa, threads, k->lanes_f32, k->lanes_f64, k->vector_registers >= 32};
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
