// The AMX tile instructions in plain C++, for csrc/cpu/amx_tiles.h. Follows the operation sections of the
// Intel Software Developer's Manual (LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS): even and odd products are
// summed apart, each fused, denormals are zero on the way in and out, rounding is to nearest even. Anything
// the processor would fault on, and any use of a tile that nobody has loaded or cleared since configuration,
// ends the program. Included inside a namespace: the standard headers are the including file's.

struct EmulatedTile {
  unsigned char data[16][64];
  int rows = 0, row_bytes = 0;
  bool defined = false;
};
struct EmulatedTiles {
  EmulatedTile tile[8];
  bool configured = false;
  int64_t products = 0;
};
inline thread_local EmulatedTiles emulated;

[[noreturn]] inline void tile_fault(const char* what) {
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

inline void tile_configure(const TileConfig& c) {
  if (reinterpret_cast<uintptr_t>(&c) % alignof(TileConfig)) tile_fault("misaligned configuration");
  if (c.palette != 1) tile_fault("palette is not 1");
  if (c.start_row != 0) tile_fault("start_row is not 0");
  for (unsigned char r : c.reserved)
    if (r) tile_fault("reserved bytes of the configuration are not zero");
  for (int t = 0; t < 16; ++t) {
    if (t >= 8 && (c.rows[t] || c.row_bytes[t])) tile_fault("palette 1 has eight tiles");
    if (c.rows[t] > 16 || c.row_bytes[t] > 64 || !c.rows[t] != !c.row_bytes[t])
      tile_fault("tile size out of range");
    if (t < 8) emulated.tile[t] = EmulatedTile{{}, c.rows[t], c.row_bytes[t], false};
  }
  emulated.configured = true;
}
inline void tile_release() {
  if (!emulated.configured) tile_fault("release without configuration");
  emulated.configured = false;
}

inline EmulatedTile& tile_in_use(int number) {
  if (!emulated.configured) tile_fault("tile used without configuration");
  EmulatedTile& t = emulated.tile[number];
  if (!t.rows) tile_fault("tile is not configured");
  return t;
}
inline EmulatedTile& tile_source(int number) {
  EmulatedTile& t = tile_in_use(number);
  if (!t.defined) tile_fault("tile is read before it was loaded or cleared");
  return t;
}

template <int D>
void tile_zero() {
  EmulatedTile& t = tile_in_use(D);
  std::memset(t.data, 0, sizeof t.data);
  t.defined = true;
}
template <int D>
void tile_load(const void* base, int64_t stride) {
  EmulatedTile& t = tile_in_use(D);
  std::memset(t.data, 0, sizeof t.data);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.data[r], static_cast<const char*>(base) + r * stride, size_t(t.row_bytes));
  t.defined = true;
}
template <int S>
void tile_store(void* base, int64_t stride) {
  const EmulatedTile& t = tile_source(S);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, t.data[r], size_t(t.row_bytes));
}

inline float flush(float f) {
  const uint32_t b = float_to_bits(f);
  return bits_to_float(b & 0x7f800000u ? b : b & 0x80000000u);
}
inline float widened(const unsigned char* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return flush(bfloat_to_float(h));
}

template <int D, int A, int B>
void tile_dot() {
  static_assert(D != A && D != B && A != B, "the processor faults on equal tiles");
  const EmulatedTile &a = tile_source(A), &b = tile_source(B);
  EmulatedTile& d = tile_source(D);
  if (a.row_bytes % 4 || b.row_bytes % 4 || d.row_bytes % 4) tile_fault("row size is not a multiple of 4");
  if (d.rows != a.rows || d.row_bytes != b.row_bytes || a.row_bytes / 4 != b.rows)
    tile_fault("tile sizes disagree");
  const int columns = d.row_bytes / 4;
  float left[16][32], right[16][32];
  for (int m = 0; m < a.rows; ++m)
    for (int k = 0; k < a.row_bytes / 2; ++k) left[m][k] = widened(a.data[m] + 2 * k);
  for (int k = 0; k < b.rows; ++k)
    for (int n = 0; n < 2 * columns; ++n) right[k][n] = widened(b.data[k] + 2 * n);
  for (int m = 0; m < d.rows; ++m) {
    float sum[32] = {};
    // The product of two bfloat16 is exact in float32 (but where it is denormal), so that a multiplication
    // and an addition give what a fused one does.
    for (int k = 0; k < b.rows; ++k)
      for (int n = 0; n < 2 * columns; ++n) sum[n] = flush(left[m][2 * k + n % 2] * right[k][n] + sum[n]);
    for (int n = 0; n < columns; ++n) {
      float old;
      std::memcpy(&old, d.data[m] + 4 * n, 4);
      const float result = flush(flush(old) + flush(sum[2 * n] + sum[2 * n + 1]));
      std::memcpy(d.data[m] + 4 * n, &result, 4);
    }
  }
  ++emulated.products;
}
