// What the planner may know of the machine.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"

namespace lkconv::cpu {

struct Machine {
  Isa isa;
  int64_t threads;
  int64_t lanes_f32, lanes_f64;
  bool many_registers = false;  // 32 vector registers, not 16
  bool bf16_pairs = false;      // kernels multiply pairs of bfloat16
};

const char* isa_name(Isa isa);
Isa detected_isa();  // the best this processor and this build have
Isa active_isa();    // detected_isa, capped by LKCONV_MAX_CPU_ISA (baseline, avx2, avx512, amx)

// The twelve letters by which the processor names its maker; empty on others than x86.
const std::string& processor_vendor();
// Whether the processor is known to run two 512-bit multiply-adds a cycle, as it does two of 256 bits; and
// what tells: Intel's with AMX do, AMD's from Zen 5 on but for those made for notebooks, while Zen 4 splits
// vectors into halves. `signature` is leaf 1 of CPUID.
bool whole_512_bits();
bool whole_512_bits_of(const std::string& vendor, unsigned signature, bool amx);

// Whether the processor multiplies pairs of bfloat16 (AVX512-BF16) and LKCONV_BF16_PRODUCTS is not 0.
bool bf16_products();

Machine machine_for(Isa isa, int64_t threads);

}  // namespace lkconv::cpu
