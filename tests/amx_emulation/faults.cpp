// Misuses emulated tiles on purpose: every named misuse must end the program, "none" must not.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "cpu/half.h"

#define LKCONV_ISA emulated_amx
#define LKCONV_INLINE inline
using lkconv::cpu::bfloat_to_float;
#define LKCONV_AMX_EMULATION "emulated_tiles.h"
#include "cpu/amx_tiles.h"

using namespace lkconv::cpu::emulated_amx;

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  alignas(64) uint16_t a[512];
  alignas(64) float sums[256];
  for (int i = 0; i < 512; ++i) a[i] = 0x3f80;  // 1
  if (what == "unconfigured") tile_zero<0>();
  if (what == "release") tile_release();
  TileConfig config;
  if (what == "palette") config.palette = 2, tile_configure(config);
  if (what == "size") config.rows[0] = 17, config.row_bytes[0] = 64, tile_configure(config);
  if (what == "disagree") {
    for (int t = 0; t < 3; ++t) config.rows[t] = 16, config.row_bytes[t] = 64;
    config.rows[1] = 8;
    tile_configure(config);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>();
    tile_dot<0, 1, 2>();
  }
  {
    const TileSession session;
    if (what == "undefined") tile_dot<0, 1, 2>();
    tile_zero<0>();
    tile_load<1>(a, 64);
    tile_load<2>(a, 64);
    tile_dot<0, 1, 2>();
    tile_store<0>(sums, 64);
  }
  for (float s : sums)
    if (s != 32) return 3;
  if (what == "after") tile_zero<0>();
  return what == "none" ? 0 : 4;
}
