// SPDX-License-Identifier: Apache-2.0
// Panels for the tiles. The left one keeps its rows. The right one turns rows into lanes: 32 bits
// of each row (one float32, two bfloat16 or four bytes) side by side, along K.
#pragma once

#include "matmul_ahead.h"
#include "matmul_turn.h"

namespace pyfmt {
namespace PYFMT_ISA {

using cpu::LeftArgs;
using cpu::TileArgs;
using cpu::TileKind;

#if PYFMT_AVX512
constexpr int kAcross = 4;
#else
constexpr int kAcross = 2;
#endif
constexpr int kPanel = kAcross * kLanes;
constexpr int64_t kPiece = 256;  // elements of a row decoded at a time
constexpr int kBias = 128;       // what makes the left bytes unsigned

constexpr int element_bytes(TileKind kind) {
  return kind == TileKind::kInt8 ? 1 : 4;
}
// Elements of K in one panel: long runs of each row where b streams by, else what the first-level
// cache holds beside the left rows.
PYFMT_INLINE int64_t chunk_of(const TileArgs& t) {
  const int64_t bytes = t.m_chunk > 64 ? int64_t(kPanel) * 512 : int64_t(kPanel) * 4096;
  const int64_t most = bytes / (kPanel * element_bytes(t.kind));
  return most > t.segment ? most / t.segment * t.segment : t.segment;
}

// A part of b (or of the left side) that panels are made of.
struct Rows {
  const Packed& p;
  int64_t k;
  const TileArgs& t;
};

// ---- scales ---------------------------------------------------------------------------

// The biased exponents of scales, for overflow and underflow of their products.
struct Extremes {
  int64_t least = 255, most = 0;
  PYFMT_HD void see(uint32_t bits) {
    const int64_t e = bits >> 23;
    if (bits == 0 || e >= 255) return;
    least = e < least ? e : least;
    most = e > most ? e : most;
  }
};

// Whether a block holds nothing but zeros.
static bool empty_block(const Packed& p, int64_t row, int64_t k, int64_t block) {
  const FormatSpec& f = p.format;
  const int64_t width = f.columns(k), bytes = f.row_bytes(k), bits = f.bits();
  const ElementSpec& e = f.element;
  const uint32_t mask = e.is_int() ? (1u << bits) - 1 : e.magnitude_mask();
  const uint8_t* const codes = p.codes + row * bytes;
  const int64_t end = (block + 1) * width < k ? (block + 1) * width : k;
  for (int64_t i = block * width; i < end; ++i) {
    const int64_t at = i * bits / 8, shift = i * bits % 8;
    const uint32_t two = codes[at] | (at + 1 < bytes ? uint32_t(codes[at + 1]) << 8 : 0u);
    if ((two >> shift) & mask) return false;
  }
  return true;
}

// The scales of segments (of `width` elements) `from` to `from + n` of a row, multiplied by `step`.
// An empty block's scale, a subnormal number, becomes 1: its products are zeros all the same.
static void segment_scales(const Rows& r, int64_t row, int64_t from, int64_t n, int64_t width,
                           float step, float* out, Extremes* extremes) {
  const FormatSpec& f = r.p.format;
  const int64_t block = f.columns(r.k), first = from * width / block;
  const int64_t last = ((from + n) * width - 1) / block;
  const int64_t blocks = (last < f.blocks(r.k) ? last + 1 : f.blocks(r.k)) - first;
  constexpr int64_t kRoom = 256;
  alignas(64) uint32_t scales[kRoom];
  int64_t have = first, end = first;
  for (int64_t s = 0; s < n; ++s) {
    const int64_t b = (from + s) * width / block;
    if (b >= end) {
      have = b;
      end = first + blocks - b < kRoom ? first + blocks : b + kRoom;
      row_scales(r.p, row, r.k, have, end - have, scales);
    }
    float scale = codec::Lane<uint32_t>::as_float(scales[b - have]);
    if (scales[b - have] - 1u < 0x007fffffu && empty_block(r.p, row, r.k, b)) scale = 1.0f;
    scale *= step;
    extremes->see(codec::Lane<uint32_t>::as_uint(scale));
    out[s] = scale;
  }
}

// ---- elements -------------------------------------------------------------------------

// Pieces of rows as float32 or bfloat16: decoded values, or elements as they stand.
class RowDecoder {
 public:
  PYFMT_HD RowDecoder(const Rows& rows, DType dtype)
      : rows_(rows),
        decoded_(rows.t.decoded),
        block_(decoded_ ? rows.p.format.columns(rows.k) : kPiece),
        decoder_(rows.p.format.element, decoded_ ? rows.p.format.scale : Scale::kE8M0, dtype,
                 block_, decoded_ && rows.p.has_tensor_scale ? &rows.p.tensor_scale : nullptr) {
    d_.has_tensor_scale = decoded_ && rows.p.has_tensor_scale;
    d_.tensor_scale = codec::Lane<uint32_t>::as_uint(rows.p.tensor_scale);
  }

  // Elements `from` to `from + n` (at most kPiece) of a row; from is a multiple of 16.
  PYFMT_HD void run(int64_t row, int64_t from, int64_t n, void* out) {
    const FormatSpec& f = rows_.p.format;
    const int64_t bytes = f.row_bytes(rows_.k), offset = from * f.bits() / 8;
    const uint8_t* const codes = rows_.p.codes + row * bytes + offset;
    int64_t phase = 0, blocks = 1;
    if (decoded_) {
      const int64_t first = from / block_;
      phase = from - first * block_;
      blocks = (phase + n + block_ - 1) / block_;
      row_scales(rows_.p, row, rows_.k, first, blocks, scales_);
    } else {
      scales_[0] = 0x3f800000u;
    }
    d_.codes = codes;
    d_.bits = decoder_.packed_bits(n, scales_, phase, blocks);
    if (d_.bits == 8 && (f.bits() != 8 || n % kGroup)) {
      unpack_row(codes, bytes - offset, n, f.bits(), unpacked_);
      d_.codes = unpacked_;
    }
    d_.n = n;
    d_.out = out;
    decoder_.run(d_, scales_, phase, room_);
  }

 private:
  const Rows& rows_;
  bool decoded_;
  int64_t block_;
  Decoder decoder_;
  DecodeRow d_;
  alignas(64) uint32_t scales_[kPiece + 16];
  alignas(64) uint32_t room_[kPiece];
  alignas(64) uint8_t unpacked_[kPiece + 64];
};

// Codes to signed bytes that count the element's smallest step.
struct StepTable {
  alignas(64) int8_t of[256];
  int bits;
  bool as_is;
  float step;

  explicit StepTable(const ElementSpec& e)
      : bits(e.bits()),
        as_is(e.is_int() && bits == 8),
        step(codec::Lane<uint32_t>::as_float(power_of_two_bits(e.step_exp()))) {
    const float steps = codec::Lane<uint32_t>::as_float(power_of_two_bits(-e.step_exp()));
    for (uint32_t i = 0; i < 256; ++i) {
      const uint32_t code = i & ((1u << bits) - 1);
      const uint32_t value = value_of(e, code);
      of[i] = int8_t(codec::Lane<uint32_t>::as_float(value) * steps);
    }
  }
};

#if PYFMT_VNNI
// n bytes (a multiple of 64 may be written) of a row from element `from`, `flip` added to each.
static void step_row(const StepTable& table, const Rows& r, int64_t row, int64_t from, int64_t n,
                     int8_t flip, int8_t* out) {
  const FormatSpec& f = r.p.format;
  const int64_t bytes = f.row_bytes(r.k), offset = from * f.bits() / 8;
  const uint8_t* codes = r.p.codes + row * bytes + offset;
  const __m512i values = _mm512_load_si512(table.of), sign = _mm512_set1_epi8(flip);
  alignas(64) uint8_t unpacked[kPiece + 64];
  const bool nibbles = f.bits() == 4 && !table.as_is;
  if (!nibbles && (f.bits() != 8 || n % 64)) {
    unpack_row(codes, bytes - offset, n, f.bits(), unpacked);
    codes = unpacked;
  }
  for (int64_t i = 0; i < n; i += 64) {
    __m512i x;
    if (nibbles) {
      const int64_t left = (n - i + 1) / 2;
      const __mmask32 mask = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
      const __m512i w = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, codes + i / 2));
      x = _mm512_permutexvar_epi8(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), values);
    } else {
      x = _mm512_loadu_si512(codes + i);
      if (!table.as_is) x = _mm512_permutexvar_epi8(x, values);
    }
    if (n - i < 64) x = _mm512_maskz_mov_epi8((__mmask64(1) << (n - i)) - 1, x);
    _mm512_storeu_si512(out + i, _mm512_xor_si512(x, sign));
  }
}
#endif

// ---- left -----------------------------------------------------------------------------

// Rows begin to end of the left side to the panel, and their scales.
static void left_rows(const LeftArgs& a, int64_t begin, int64_t end, Extremes* extremes) {
  const TileArgs& t = *a.tile;
  const int64_t width = element_bytes(t.kind), stride = t.a_columns * width;
  const int64_t segments = t.segments();
  if (!a.left) {
    for (int64_t row = begin; row < end; ++row) {
      char* const to = (char*)t.a + (a.first_row + row) * stride;
      const void* const from = at(a.a, a.a_dtype, row * t.k);
      load_row(from, a.a_dtype, t.k, round_up(t.k, kGroup), (uint32_t*)to);
      memset(to + round_up(t.k, kGroup) * 4, 0, size_t(t.a_columns - round_up(t.k, kGroup)) * 4);
    }
    return;
  }
  const Rows rows{*a.left, t.k, t};
  RowDecoder decoder(rows, DType::kFP32);
  const StepTable table(a.left->format.element);
  const float step = t.kind == TileKind::kInt8 ? table.step : 1.0f;
  for (int64_t row = begin; row < end; ++row) {
    char* const to = (char*)t.a + (a.first_row + row) * stride;
    for (int64_t i = 0; i < t.k; i += kPiece) {
      const int64_t n = t.k - i < kPiece ? t.k - i : kPiece;
#if PYFMT_VNNI
      if (t.kind == TileKind::kInt8) {
        step_row(table, rows, row, i, n, int8_t(kBias), (int8_t*)to + i);
        continue;
      }
#endif
      decoder.run(row, i, n, to + i * width);
    }
    // Zero times whatever lies there; beyond the last 64 bytes nothing was written.
    memset(to + t.k * width, 0, size_t(t.a_columns - t.k) * width);
    if (!t.a_scales) continue;
    segment_scales(rows, row, 0, segments, t.segment, step,
                   t.a_scales + (a.first_row + row) * segments, extremes);
  }
}

// ---- right ----------------------------------------------------------------------------

// A panel: kPanel rows of b from `row`, elements `from` to `from + n` of K, n a whole number of
// segments where the last may be cut by k.
struct Panel {
  uint32_t* data;  // (elements / elements in 32 bits, kPanel)
  float* scales;   // (segments, kPanel)
  int32_t* sums;   // (segments, kPanel): -kBias times the sum of a segment's bytes
  int64_t segments = 0;
  bool wide = false;
  Ahead codes, scale_codes;
};

class RightPacker {
 public:
  PYFMT_HD explicit RightPacker(const TileArgs& t)
      : t_(t),
        rows_{t.right, t.k, t},
        decoder_(rows_, DType::kFP32),
        table_(t.right.format.element),
        step_(all(t.kind == TileKind::kInt8 ? table_.step : 1.0f)),
        blocks_(t.right.format.blocks(t.k))
#if PYFMT_VNNI
        ,
        turner_(t.right.format.element, t.k, table_.of)
#endif
  {
  }

  PYFMT_HD void run(int64_t row, int64_t from, int64_t n, Panel* p) {
    p->segments = (n + t_.segment - 1) / t_.segment;
    const int64_t padded = p->segments * t_.segment;
    const int64_t per = 4 / element_bytes(t_.kind);
    for (int v = 0; v < kAcross; ++v) {
#if PYFMT_VNNI
      if (t_.kind == TileKind::kInt8 && turner_.serves()) {
        turn(row + v * kLanes, from, padded, p->data + v * kLanes);
        continue;
      }
#endif
      for (int64_t i = 0; i < padded; i += kPiece) {
        const int64_t width = padded - i < kPiece ? padded - i : kPiece;
        piece(row + v * kLanes, from + i, width, p->data + i / per * kPanel + v * kLanes);
      }
    }
    p->wide = false;
    if (t_.decoded) return;
    Extremes extremes;
    least_ = broadcast(255);
    most_ = U{};
    for (int v = 0; v < kAcross; ++v) {
      for (int64_t i = 0; i < p->segments; i += kLanes) {
        const int64_t count = p->segments - i < kLanes ? p->segments - i : kLanes;
        U x[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t r = row + v * kLanes + lane;
          x[lane] = U{};
          if (r < t_.n) x[lane] = some_scales(r, from / t_.segment + i, count, &extremes);
        }
        transpose(x);
        float* const to = p->scales + i * kPanel + v * kLanes;
        for (int64_t j = 0; j < count; ++j) store<U>(to + j * kPanel, x[j]);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (least_[lane] < extremes.least) extremes.least = least_[lane];
      if (most_[lane] > extremes.most) extremes.most = most_[lane];
    }
    // Products of scales that might leave the normal numbers.
    p->wide = t_.a_scales && extremes.most && t_.a_most &&
              (extremes.least + t_.a_least < 128 || extremes.most + t_.a_most > 357);
#if PYFMT_VNNI
    if (t_.kind == TileKind::kInt8) sum(p);
#endif
  }

 private:
  // The scales of up to kLanes segments of a row.
  PYFMT_HD U some_scales(int64_t row, int64_t from, int64_t count, Extremes* extremes) {
    alignas(64) uint32_t scales[kLanes];
    for (uint32_t& scale : scales) scale = 0x3f800000u;
    if (t_.right.format.columns(t_.k) != t_.segment) {
      segment_scales(rows_, row, from, count, t_.segment, step_[0], (float*)scales, extremes);
      return load<U>(scales);
    }
    U bits;
    const Scale kind = t_.right.format.scale;
    if (count == kLanes && kLanes == kGroup && scale_bytes(kind) == 1) {
      const int64_t first =
          t_.right.format.block_rows == 1 ? row * blocks_ : first_scale(t_.right, row, t_.k);
      bits = load_u8((const uint8_t*)t_.right.scales + first + from).v[0];
      bits = kind == Scale::kE8M0 ? codec::decode_scale<U>(Scale::kE8M0, bits)
                                  : codec::decode_scale<U>(Scale::kE4M3, bits);
    } else {
      row_scales(t_.right, row, t_.k, from, count, scales);
      bits = load<U>(scales);
    }
    if (any((U)(bits - 1u < 0x007fffffu))) {
      segment_scales(rows_, row, from, count, t_.segment, step_[0], (float*)scales, extremes);
      return load<U>(scales);
    }
    const U scaled = (U)((F)bits * step_);
    if (t_.a_scales) see(scaled);
    return scaled;
  }

  // The same for many scales at a time: zeros and what is no number do not count.
  PYFMT_HD void see(U scaled) {
    const U e = scaled >> 23;
    const U counts = (U)(e - 1u < broadcast(254u));
    least_ = min_u(least_, e | ~counts);
    most_ = max_u(most_, e & counts);
  }

  // kLanes rows of `width` elements, turned.
  PYFMT_HD void piece(int64_t row, int64_t from, int64_t width, uint32_t* out) {
    const int64_t bytes = element_bytes(t_.kind), left = t_.k - from;
    const int64_t n = left < 0 ? 0 : left < width ? left : width;
    const int64_t words = round_up(width * bytes / 4, kLanes);
    for (int lane = 0; lane < kLanes; ++lane) {
      char* const to = (char*)(room_ + lane * kPiece);
      const int64_t have = row + lane < t_.n ? n : 0;
      if (have > 0) {
#if PYFMT_VNNI
        if (t_.kind == TileKind::kInt8) {
          step_row(table_, rows_, row + lane, from, have, 0, (int8_t*)to);
        } else {
          decoder_.run(row + lane, from, have, to);
        }
#else
        decoder_.run(row + lane, from, have, to);
#endif
      }
      if (have * bytes < words * 4) memset(to + have * bytes, 0, size_t(words * 4 - have * bytes));
    }
    const int64_t keep = width * bytes / 4;
    for (int64_t i = 0; i < words; i += kLanes) {
      U v[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) v[lane] = load<U>(room_ + lane * kPiece + i);
      transpose(v);
      const int64_t count = keep - i < kLanes ? keep - i : kLanes;
      for (int64_t j = 0; j < count; ++j) store<U>(out + (i + j) * kPanel, v[j]);
    }
  }

#if PYFMT_VNNI
  // The same for all of a panel, by way of packed codes.
  PYFMT_HD void turn(int64_t row, int64_t from, int64_t padded, uint32_t* out) {
    const int bits = t_.right.format.bits();
    const int64_t bytes = t_.right.format.row_bytes(t_.k), per = 4 / element_bytes(t_.kind);
    const int64_t step = 16 * turner_.codes_per_word(),
                  n = t_.k - from < padded ? t_.k - from : padded;
    const int64_t rows = t_.n - row < 16 ? t_.n - row : 16;
    const uint8_t* const codes = t_.right.codes + row * bytes;
    const uint8_t* const unpacked = (const uint8_t*)room_;
    for (int64_t i = 0; i < padded; i += step, out += step / per * kPanel) {
      const int64_t have = n - i < 0 ? 0 : n - i < step ? n - i : step;
      const int64_t words = (padded - i < step ? padded - i : step) / per;
      const int64_t offset = (from + i) * bits / 8, lanes = have ? rows : 0;
      if (turner_.packed()) {
        turner_.run(codes + offset, bytes, lanes, (have * bits + 7) / 8, out, words, kPanel);
        continue;
      }
      // One byte a code, a piece at a time.
      if (i % kPiece == 0) {
        const int64_t left = n - i < kPiece ? n - i : kPiece;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          unpack_row(codes + lane * bytes + offset, bytes - offset, left, bits,
                     (uint8_t*)(room_ + lane * kPiece));
        }
      }
      turner_.run(unpacked + i % kPiece, kPiece * 4, lanes, have, out, words, kPanel);
    }
  }

  PYFMT_HD void sum(Panel* p) const {
    const int64_t words = t_.segment / 4;
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t s = 0; s < p->segments; ++s) {
      for (int v = 0; v < kAcross; ++v) {
        const uint32_t* const data = p->data + s * words * kPanel + v * kLanes;
        __m512i total = _mm512_setzero_si512();
        for (int64_t i = 0; i < words; ++i) {
          total = _mm512_dpbusd_epi32(total, ones, _mm512_loadu_si512(data + i * kPanel));
        }
        total = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), total), 7);
        _mm512_storeu_si512(p->sums + s * kPanel + v * kLanes, total);
      }
    }
  }
#endif

  const TileArgs& t_;
  Rows rows_;
  RowDecoder decoder_;
  StepTable table_;
  F step_;          // what the scales are multiplied by
  int64_t blocks_;  // of a row
  U least_, most_;  // biased exponents of a panel's scales
#if PYFMT_VNNI
  Turner turner_;
#endif
  alignas(64) uint32_t room_[kLanes * kPiece];
};

}  // namespace PYFMT_ISA
}  // namespace pyfmt
