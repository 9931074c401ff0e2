#include "amx_detect.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace lkconv::cpu {
namespace {

constexpr int kTileConfigState = 17, kTileDataState = 18;  // bits of XCR0
constexpr long kRequestStatePermission = 0x1023;           // ARCH_REQ_XCOMP_PERM of asm/prctl.h, Linux 5.16

bool processor_has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  return (d & bf16) && (d & tile);
}

bool system_saves_tiles() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t both = 1u << kTileConfigState | 1u << kTileDataState;
  return (low & both) == both;
}

// Tile data is too large for every thread's signal frame, so Linux gives it only to processes that ask.
bool system_grants_tiles() { return syscall(SYS_arch_prctl, kRequestStatePermission, kTileDataState) == 0; }

}  // namespace

bool amx_available() {
  static const bool available = processor_has_tiles() && system_saves_tiles() && system_grants_tiles();
  return available;
}

}  // namespace lkconv::cpu
#else
namespace lkconv::cpu {
bool amx_available() { return false; }
}  // namespace lkconv::cpu
#endif
