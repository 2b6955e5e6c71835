// SPDX-License-Identifier: Apache-2.0
// What of b is fetched ahead while products are made.
#pragma once

#include "matmul_lanes.h"

namespace pyfmt {
namespace PYFMT_ISA {

using cpu::TileArgs;

// Lines of packed codes or scales that will be needed next, fetched during the products: rows of b
// are more streams than the hardware foresees, and memory would rest meanwhile. Those of a column
// of lines in turn.
struct Ahead {
  const char* next = nullptr;
  int64_t row_bytes = 0, rows = 0;
  int64_t lines = 0;  // still to fetch
  int64_t row = 0;

  PYFMT_HD void fetch(int64_t count) {
    count = count < lines ? count : lines;
    lines -= count;
    for (; count > 0; --count) {
      __builtin_prefetch(next, 0, 2);
      next += row_bytes;
      if (++row == rows) {
        row = 0;
        next += 64 - rows * row_bytes;
      }
    }
  }
};

// What `rows` rows of b from `row` and element `from` on are made of.
static void look_ahead(const TileArgs& t, int64_t row, int64_t rows, int64_t from, int64_t n,
                       Ahead* codes, Ahead* scales) {
  *codes = *scales = Ahead{};
  const FormatSpec& f = t.right.format;
  if (row + rows > t.n || f.block_rows > 1) return;
  n = t.k - from < n ? t.k - from : n;
  const int64_t bytes = f.row_bytes(t.k), block = f.columns(t.k), each = scale_bytes(f.scale);
  codes->next = (const char*)t.right.codes + row * bytes + from * f.bits() / 8;
  codes->row_bytes = bytes;
  codes->rows = scales->rows = rows;
  codes->lines = (n * f.bits() / 8 + 63) / 64 * rows;
  scales->row_bytes = f.blocks(t.k) * each;
  scales->next = (const char*)t.right.scales + row * scales->row_bytes + from / block * each;
  scales->lines = (n / block * each + 63) / 64 * rows;
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
