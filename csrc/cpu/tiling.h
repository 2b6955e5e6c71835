// SPDX-License-Identifier: Apache-2.0
// How a view falls into work items.
#pragma once

#include "cpu.h"

namespace pyfmt {
namespace cpu {

constexpr int64_t kTile = 4096;      // elements a work item, about
constexpr int64_t kGrain = 1 << 15;  // elements a thread, at least

inline int64_t gcd(int64_t a, int64_t b) {
  return b ? gcd(b, a % b) : a;
}
inline int64_t lcm(int64_t a, int64_t b) {
  return a / gcd(a, b) * b;
}

// Items a thread, at least.
inline int64_t grain(const Tiling& t) {
  const int64_t each = t.tile_columns * t.block_rows;
  return each >= kGrain ? 1 : kGrain / (each > 0 ? each : 1);
}

// True where rows may be seen as one long row: each ends at a whole block and a whole byte.
inline bool joins(const View& v, int64_t block_rows, int64_t block, int bits, const Rotation& r) {
  const bool signs_repeat = !r.signs || r.signs_length == r.size;
  return block_rows == 1 && v.columns % block == 0 && v.columns * bits % 8 == 0 && signs_repeat;
}

// Tiles of whole blocks and whole rotations; false where those are too large for one.
inline bool make_tiling(const View& v, const FormatSpec& f, const Rotation& r, Tiling* t) {
  t->batches = v.batches;
  t->rows = v.rows;
  t->columns = v.columns;
  t->block_rows = f.block_rows;
  t->block_columns = f.columns(v.columns);
  if (joins(v, t->block_rows, t->block_columns, f.bits(), r)) {
    t->batches = t->rows = 1;
    t->columns = v.count();
  }
  if (t->block_rows > kMaxTile || t->block_columns > kMaxTile) return false;
  const int64_t rows = t->rows < t->block_rows ? t->rows : t->block_rows;
  int64_t unit = lcm(t->block_columns, 8 / gcd(f.bits(), 8));
  if (r.size) unit = lcm(unit, r.size);
  const int64_t room = kTile / (rows > 0 ? rows : 1) / unit * unit;
  t->tile_columns = room > unit ? room : unit;
  if (t->tile_columns > t->padded()) t->tile_columns = t->padded();
  return t->tile_columns * t->block_rows <= kMaxTile;
}

}  // namespace cpu
}  // namespace pyfmt
