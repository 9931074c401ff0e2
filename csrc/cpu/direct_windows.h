// The input window that a tile of outputs reads.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// Geometry of one tile of outputs, in pixels of the padded scratch image.
struct DirectTile {
  int64_t y0, y1, x0, x1;      // outputs
  int64_t iy0, iy1, ix0, ix1;  // input window: rows clipped to the image, columns not
};

LKCONV_INLINE DirectTile direct_tile(const Geometry& p, const Plan& plan, int64_t ty, int64_t tx) {
  DirectTile t;
  t.y0 = ty * plan.tile_h;
  t.y1 = std::min(t.y0 + plan.tile_h, p.out_height);
  t.x0 = tx * plan.tile_w;
  t.x1 = std::min(t.x0 + plan.tile_w, p.out_width);
  t.iy0 = std::clamp<int64_t>(t.y0 * p.stride_h - p.pad_h, 0, p.height);
  t.iy1 = std::clamp<int64_t>((t.y1 - 1) * p.stride_h - p.pad_h + (p.kernel_h - 1) * p.dil_h + 1, t.iy0,
                              p.height);
  t.ix0 = t.x0 * p.stride_w - p.pad_w;
  t.ix1 = (t.x1 - 1) * p.stride_w - p.pad_w + std::max<int64_t>(p.kernel_w - 1, 0) * p.dil_w + 1;
  return t;
}

}  // namespace lkconv::cpu::LKCONV_ISA
