// SPDX-License-Identifier: Apache-2.0
// fp8 products of a warpgroup, beside the bfloat16 ones of wgmma.cuh.
//
// Source: NVIDIA, PTX ISA 8.x, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include "wgmma.cuh"

namespace pyfmt {
namespace cuda {
namespace hopper {

// d (64 x kN, float32) += a (64 x 32 fp8, in registers) * b^T (kN x 32 fp8, a tile of rows of 128
// bytes); or = where `add` is 0. Lane 4 g + t of warp w holds of a, four columns a word: columns
// 4t of rows 16 w + g and + 8, then columns 4t + 16 of both; of d what Product says.
//
// A step keeps 13 bits below its largest product or sum, and cuts off the rest.
template <int kN, bool kE5M2, bool kTileE5M2>
struct Fp8Product;

#if !defined(__CUDACC__)
struct EmulatedFp8 {
  float values[2][256];
  EmulatedFp8() {
    for (int type = 0; type < 2; ++type) {
      const codec::FloatCodec c(type ? elements::e5m2ieee : elements::e4m3fn);
      for (uint32_t i = 0; i < 256; ++i) {
        values[type][i] = as_float(codec::decode_float<uint32_t>(c, i));
      }
    }
  }
};
inline float emulated_fp8(uint32_t code, bool e5m2) {
  static const EmulatedFp8 table;
  return table.values[e5m2][code & 0xffu];
}
inline float emulated_fp8_at(uint64_t b, int row, int column, bool e5m2) {
  const uint32_t start = uint32_t(b & 0x3fff) << 4, eight = uint32_t(b >> 32 & 0x3fff) << 4;
  uint32_t at = start + uint32_t(row / 8) * eight + uint32_t(row % 8) * 128 + uint32_t(column);
  at ^= (at >> 7 & 7) << 4;
  return emulated_fp8(uint8_t(*emulated_at(at)), e5m2);
}

// Sums in float32: the device's are cut to fewer bits.
template <int kN, bool kE5M2, bool kTileE5M2>
void emulated_fp8_product(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int add) {
  static uint32_t all[8 * 1024][4];
  const int me = ::emulation::block().current, quad = me & ~3, t = me & 3;
  memcpy(all[me], a, 16);
  ::emulation::yield();
  for (int row = 0; row < 2; ++row) {
    float w[32];
    for (int k = 0; k < 32; ++k) {
      w[k] = emulated_fp8(all[quad + k % 16 / 4][row + 2 * (k / 16)] >> (8 * (k % 4)), kE5M2);
    }
    for (int j = 0; j < kN / 8; ++j) {
      for (int c = 0; c < 2; ++c) {
        float sum = add ? d[4 * j + 2 * row + c] : 0.0f;
        for (int k = 0; k < 32; ++k) {
          sum += w[k] * emulated_fp8_at(b, 8 * j + 2 * t + c, k, kTileE5M2);
        }
        d[4 * j + 2 * row + c] = sum;
      }
    }
  }
  ::emulation::yield();
}
#endif

#if defined(__CUDACC__)
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
#define PYFMT_FP8_ASM(n, of_a, of_b, places, a0, a1, a2, a3, desc, flag, ...)                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #flag                                      \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32." of_a "." of_b " {" places     \
               "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #desc ", p, 1, 1;\n}"          \
               : __VA_ARGS__                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
#else
#define PYFMT_FP8_ASM(n, of_a, of_b, places, a0, a1, a2, a3, desc, flag, ...) \
  (void)a, (void)b, (void)add
#endif
#define PYFMT_FP8_PRODUCT(n, a_e5m2, b_e5m2, of_a, of_b, ...)                              \
  template <>                                                                              \
  struct Fp8Product<n, a_e5m2, b_e5m2> {                                                   \
    PYFMT_DEVICE static void add_to(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, \
                                    int add) {                                             \
      PYFMT_FP8_ASM(n, of_a, of_b, __VA_ARGS__);                                           \
    }                                                                                      \
  };
#else
#define PYFMT_FP8_PRODUCT(n, a_e5m2, b_e5m2, ...)                                        \
  template <>                                                                            \
  struct Fp8Product<n, a_e5m2, b_e5m2> {                                                 \
    static void add_to(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, int add) { \
      emulated_fp8_product<n, a_e5m2, b_e5m2>(d, a, b, add);                             \
    }                                                                                    \
  };
#endif

#define PYFMT_FP8_PRODUCTS(a_e5m2, b_e5m2, of_a, of_b)                                      \
  PYFMT_FP8_PRODUCT(64, a_e5m2, b_e5m2, of_a, of_b, PYFMT_S32_0, 32, 33, 34, 35, 36, 37,    \
                    PYFMT_R32(0))                                                           \
  PYFMT_FP8_PRODUCT(128, a_e5m2, b_e5m2, of_a, of_b, PYFMT_S32_0 ", " PYFMT_S32_1, 64, 65,  \
                    66, 67, 68, 69, PYFMT_R32(0), PYFMT_R32(32))

PYFMT_FP8_PRODUCTS(false, false, "e4m3", "e4m3")
PYFMT_FP8_PRODUCTS(false, true, "e4m3", "e5m2")
PYFMT_FP8_PRODUCTS(true, false, "e5m2", "e4m3")
PYFMT_FP8_PRODUCTS(true, true, "e5m2", "e5m2")

}  // namespace hopper
}  // namespace cuda
}  // namespace pyfmt
