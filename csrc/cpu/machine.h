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
};

const char* isa_name(Isa isa);
Isa detected_isa();  // the best this processor and this build have
Isa active_isa();    // detected_isa, capped by LKCONV_MAX_CPU_ISA (baseline, avx2, avx512, amx)
Machine machine_for(Isa isa, int64_t threads);

}  // namespace lkconv::cpu
