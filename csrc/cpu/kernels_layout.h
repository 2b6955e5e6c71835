// SPDX-License-Identifier: Apache-2.0
// Codes, one a byte, to packed bits and back.
#pragma once

#include "lanes.h"

namespace pyfmt {
namespace PYFMT_ISA {

// Eight codes of `bits` bits from the start of p; `have` bytes are readable.
PYFMT_INLINE uint64_t load_bytes(const uint8_t* p, int64_t have) {
  uint64_t w = 0;
  memcpy(&w, p, size_t(have < 8 ? have : 8));
  return w;
}

PYFMT_INLINE void pack_nibbles(const uint8_t* codes, int64_t n, uint8_t* out) {
  int64_t i = 0;
#if PYFMT_AVX512
  for (; i + 64 <= n; i += 64) {
    const __m512i w = _mm512_loadu_si512(codes + i);
    const __m512i pair = _mm512_or_si512(w, _mm512_srli_epi16(w, 4));
    _mm256_storeu_si256((__m256i*)(out + i / 2), _mm512_cvtepi16_epi8(pair));
  }
#elif PYFMT_AVX2
  for (; i + 64 <= n; i += 64) {
    __m256i w[2];
    for (int k = 0; k < 2; ++k) {
      w[k] = _mm256_loadu_si256((const __m256i*)(codes + i) + k);
      w[k] = _mm256_or_si256(w[k], _mm256_srli_epi16(w[k], 4));
      w[k] = _mm256_and_si256(w[k], _mm256_set1_epi16(0xff));
    }
    const __m256i x = _mm256_packus_epi16(w[0], w[1]);
    _mm256_storeu_si256((__m256i*)(out + i / 2), _mm256_permute4x64_epi64(x, 0xd8));
  }
#endif
  for (; i + 2 <= n; i += 2) out[i / 2] = uint8_t(codes[i] | codes[i + 1] << 4);
  if (i < n) out[i / 2] = codes[i];
}

// n codes below 2^bits to ceil(n * bits / 8) bytes.
static void pack_row(const uint8_t* codes, int64_t n, int bits, uint8_t* out) {
  if (bits == 8) {
    memcpy(out, codes, size_t(n));
    return;
  }
  if (bits == 4) return pack_nibbles(codes, n, out);
  const int64_t total = (n * bits + 7) / 8;
  constexpr int kWords = kLanes / 2;
  int64_t i = 0;
  uint8_t* p = out;
  // Each word stores 8 bytes, the last of them to be overwritten by the next.
  for (; i + 8 * kWords <= n && p + kWords * bits + 8 <= out + total; i += 8 * kWords) {
    const W w = codec::pack8<W>(load<W>(codes + i), bits);
    for (int k = 0; k < kWords; ++k, p += bits) {
      const uint64_t word = w[k];
      memcpy(p, &word, 8);
    }
  }
  for (; i < n; i += 8, p += bits) {
    const uint64_t word = codec::pack8<uint64_t>(load_bytes(codes + i, n - i), bits);
    const int64_t left = out + total - p;
    memcpy(p, &word, size_t(left < bits ? left : bits));
  }
}

PYFMT_INLINE void unpack_nibbles(const uint8_t* in, int64_t n, uint8_t* codes) {
  int64_t i = 0;
#if PYFMT_AVX512
  for (; i + 64 <= n; i += 64) {
    const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(in + i / 2)));
    const __m512i two = _mm512_or_si512(w, _mm512_slli_epi16(w, 4));
    _mm512_storeu_si512(codes + i, _mm512_and_si512(two, _mm512_set1_epi8(0xf)));
  }
#elif PYFMT_AVX2
  for (; i + 32 <= n; i += 32) {
    const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(in + i / 2)));
    const __m256i two = _mm256_or_si256(w, _mm256_slli_epi16(w, 4));
    _mm256_storeu_si256((__m256i*)(codes + i), _mm256_and_si256(two, _mm256_set1_epi8(0xf)));
  }
#endif
  for (; i < n; ++i) codes[i] = uint8_t(in[i / 2] >> (i & 1 ? 4 : 0)) & 0xf;
}

// The first n codes of packed bytes, of which `have` are readable (at least ceil(n * bits / 8)).
static void unpack_row(const uint8_t* in, int64_t have, int64_t n, int bits, uint8_t* codes) {
  if (bits == 8) {
    memcpy(codes, in, size_t(n));
    return;
  }
  if (bits == 4) return unpack_nibbles(in, n, codes);
  constexpr int kWords = kLanes / 2;
  int64_t i = 0;
  const uint8_t* p = in;
  for (; i + 8 * kWords <= n && p + kWords * bits + 8 <= in + have; i += 8 * kWords) {
    W w{};
    for (int k = 0; k < kWords; ++k, p += bits) {
      uint64_t word;
      memcpy(&word, p, 8);
      w[k] = word;
    }
    store<W>(codes + i, codec::unpack8<W>(w, bits));
  }
  for (; i < n; i += 8, p += bits) {
    const uint64_t word = codec::unpack8<uint64_t>(load_bytes(p, in + have - p), bits);
    memcpy(codes + i, &word, size_t(n - i < 8 ? n - i : 8));
  }
}

static void pack(const cpu::PackArgs& a, int64_t begin, int64_t end) {
  const int64_t tiles = a.tiles();
  const uint8_t mask = uint8_t((1 << a.bits) - 1);
  alignas(64) uint8_t codes[512];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / tiles, first = item % tiles * a.tile;
    const int64_t last = a.length - first < a.tile ? a.length : first + a.tile;
    for (int64_t i = first; i < last; i += 512) {
      const int64_t n = last - i < 512 ? last - i : 512;
      const uint8_t* in = a.in + row * a.in_stride + i;
      for (int64_t k = 0; k < n; ++k) codes[k] = in[k] & mask;
      pack_row(codes, n, a.bits, a.out + row * a.out_stride + i * a.bits / 8);
    }
  }
}

static void unpack(const cpu::PackArgs& a, int64_t begin, int64_t end) {
  const int64_t tiles = a.tiles();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / tiles, first = item % tiles * a.tile;
    const int64_t n = a.length - first < a.tile ? a.length - first : a.tile;
    const int64_t offset = first * a.bits / 8;
    unpack_row(a.in + row * a.in_stride + offset, a.in_stride - offset, n, a.bits,
               a.out + row * a.out_stride + first);
  }
}

}  // namespace PYFMT_ISA
}  // namespace pyfmt
