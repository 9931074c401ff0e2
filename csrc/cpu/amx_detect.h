// Whether this process may use the AMX tile registers.
#pragma once

namespace lkconv::cpu {

// True when the processor multiplies bfloat16 tiles, the operating system saves tile registers, and (on
// Linux) it has granted their use. The first call asks for that permission, which then holds for every
// thread.
bool amx_available();

}  // namespace lkconv::cpu
