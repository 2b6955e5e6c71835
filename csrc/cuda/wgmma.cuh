// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warpgroup on Hopper's tensor cores, with a host text for tests/emulation.
//
// Source: NVIDIA, PTX ISA 8.x, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include "hopper_clusters.cuh"

namespace pyfmt {
namespace cuda {
namespace hopper {

// A tile of rows of 128 bytes in shared memory, 16-byte pieces q of row r at q ^ (r & 7). `tile`:
// where it lies, aligned to 1024, through tile_code; step: 32 bytes of each row.
PYFMT_DEVICE uint32_t tile_code(uint32_t at) {
  return at >> 4 | 1u << 16;
}
PYFMT_DEVICE uint64_t tile_descriptor(uint32_t tile, int step) {
  constexpr uint32_t kRowsOf8 = 1024 >> 4, kSwizzle128 = 1u << 30;
  return uint64_t(kRowsOf8 | kSwizzle128) << 32 | (tile + 2u * uint32_t(step));
}

#if !defined(__CUDACC__)
inline void emulated_matrices(uint32_t at, const uint32_t (&words)[4], bool turned) {
  static uint32_t places[8 * 1024];
  const int me = ::emulation::block().current, warp = me & ~31, lane = me & 31;
  places[me] = at;
  emulated_warp_sync();
  for (int i = 0; i < 4; ++i) {
    const uint32_t* matrix = places + warp + 8 * i;
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4, column = lane % 4 * 2 + h;
      const uint16_t half = uint16_t(words[i] >> (16 * h));
      memcpy(emulated_at(matrix[turned ? column : row]) + 2 * (turned ? row : column), &half, 2);
    }
  }
  emulated_warp_sync();
}
#endif
// Words of four matrices of 8 rows of 16 bytes: lane 4 r + t has word t of row r of each, and says
// where row `lane % 8` of matrix `lane / 8` goes.
PYFMT_DEVICE void store_matrices(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
#elif !defined(__CUDA_ARCH__) && !defined(__CUDACC__)
  emulated_matrices(at, {a, b, c, d}, false);
#else
  (void)at, (void)a, (void)b, (void)c, (void)d;
#endif
}
// The same for matrices of 16-bit numbers whose columns become rows: lane 4 c + t has numbers 2t
// and 2t + 1 of column c.
PYFMT_DEVICE void store_matrices_turned(uint32_t at, uint32_t a, uint32_t b, uint32_t c,
                                        uint32_t d) {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
#elif !defined(__CUDA_ARCH__) && !defined(__CUDACC__)
  emulated_matrices(at, {a, b, c, d}, true);
#else
  (void)at, (void)a, (void)b, (void)c, (void)d;
#endif
}

// Registers written before are seen by the products that follow.
PYFMT_DEVICE void products_fence() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
PYFMT_DEVICE void products_commit() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kPending>
PYFMT_DEVICE void products_wait() {
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving a use of these registers across.
template <int kCount>
PYFMT_DEVICE void pin(float (&v)[kCount]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(v[i])::"memory");
#endif
}
template <int kCount>
PYFMT_DEVICE void pin(uint32_t (&v)[kCount]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(v[i])::"memory");
#endif
}

// What the tiles of a product hold.
struct Bf16 {};
// A step of fp8 keeps 13 bits below its largest product or sum, and cuts off the rest.
template <bool kLeftE5M2, bool kRightE5M2>
struct Fp8 {};

// d (64 x kN, float32) += a (64 rows) * b^T (kN rows), 32 bytes of each row, both in tiles; or =
// where `add` is 0. Lane 4 g + t of warp w holds rows 16 w + g and + 8 of d, columns 8 j + 2t, + 1
// of both, for each j.
template <class Type, int kN>
struct Product;

#if !defined(__CUDACC__)
inline const char* emulated_tile_at(uint64_t tile, int row, int byte) {
  const uint32_t start = uint32_t(tile & 0x3fff) << 4, eight = uint32_t(tile >> 32 & 0x3fff) << 4;
  uint32_t at = start + uint32_t(row / 8) * eight + uint32_t(row % 8) * 128 + uint32_t(byte);
  at ^= (at >> 7 & 7) << 4;
  return emulated_at(at);
}
// 32 bytes as numbers; left: of a.
inline void emulated_numbers(Bf16, bool /*left*/, const char* bytes, float (&v)[16]) {
  for (int k = 0; k < 16; ++k) {
    uint16_t half;
    memcpy(&half, bytes + 2 * k, 2);
    v[k] = as_float(uint32_t(half) << 16);
  }
}
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
// The device cuts the sums to fewer bits.
template <bool kLeftE5M2, bool kRightE5M2>
void emulated_numbers(Fp8<kLeftE5M2, kRightE5M2>, bool left, const char* bytes, float (&v)[32]) {
  static const EmulatedFp8 table;
  const float* values = table.values[left ? kLeftE5M2 : kRightE5M2];
  for (int k = 0; k < 32; ++k) v[k] = values[uint8_t(bytes[k])];
}
// 32 bytes of a row of a tile.
template <class Type, int kCount>
void emulated_row(Type type, bool left, uint64_t tile, int row, float (&v)[kCount]) {
  char bytes[32];
  for (int k = 0; k < 32; k += 16) memcpy(bytes + k, emulated_tile_at(tile, row, k), 16);
  emulated_numbers(type, left, bytes, v);
}

template <class Type, int kCount, int kN>
void emulated_product(float (&d)[kN / 2], uint64_t a, uint64_t b, int add) {
  const int lane = int(threadIdx.x) & 31, first = 16 * (int(threadIdx.x) >> 5 & 3) + lane / 4;
  float w[2][kCount], x[kCount];
  emulated_row(Type(), true, a, first, w[0]);
  emulated_row(Type(), true, a, first + 8, w[1]);
  for (int j = 0; j < kN / 8; ++j) {
    for (int c = 0; c < 2; ++c) {
      emulated_row(Type(), false, b, 8 * j + lane % 4 * 2 + c, x);
      for (int row = 0; row < 2; ++row) {
        float& sum = d[4 * j + 2 * row + c];
        if (!add) sum = 0.0f;
        for (int k = 0; k < kCount; ++k) sum += w[row][k] * x[k];
      }
    }
  }
}
#endif

// The same with a in registers, 32 bytes of each row: of lane 4 g + t bytes 4t to 4t + 3 of rows 16
// w + g and + 8, then 16 bytes further of both.
template <class Type, int kN>
struct RegisterProduct;

#if !defined(__CUDACC__)
template <class Type, int kCount, int kN>
void emulated_register_product(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int add) {
  static uint32_t all[8 * 1024][4];
  const int me = ::emulation::block().current, quad = me & ~3, t = me & 3;
  memcpy(all[me], a, 16);
  emulated_warp_sync();
  float w[2][kCount], x[kCount];
  for (int row = 0; row < 2; ++row) {
    uint32_t bytes[8];
    for (int i = 0; i < 8; ++i) bytes[i] = all[quad + i % 4][row + 2 * (i / 4)];
    emulated_numbers(Type(), true, reinterpret_cast<const char*>(bytes), w[row]);
  }
  for (int j = 0; j < kN / 8; ++j) {
    for (int c = 0; c < 2; ++c) {
      emulated_row(Type(), false, b, 8 * j + 2 * t + c, x);
      for (int row = 0; row < 2; ++row) {
        float& sum = d[4 * j + 2 * row + c];
        if (!add) sum = 0.0f;
        for (int k = 0; k < kCount; ++k) sum += w[row][k] * x[k];
      }
    }
  }
  emulated_warp_sync();
}
#endif

#define PYFMT_S8(a, b, c, d, e, f, g, h) \
  "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define PYFMT_S32_0                                          \
  PYFMT_S8(0, 1, 2, 3, 4, 5, 6, 7)                           \
  ", " PYFMT_S8(8, 9, 10, 11, 12, 13, 14, 15) ", " PYFMT_S8( \
      16, 17, 18, 19, 20, 21, 22, 23) ", " PYFMT_S8(24, 25, 26, 27, 28, 29, 30, 31)
#define PYFMT_S32_1                                            \
  PYFMT_S8(32, 33, 34, 35, 36, 37, 38, 39)                     \
  ", " PYFMT_S8(40, 41, 42, 43, 44, 45, 46, 47) ", " PYFMT_S8( \
      48, 49, 50, 51, 52, 53, 54, 55) ", " PYFMT_S8(56, 57, 58, 59, 60, 61, 62, 63)
#define PYFMT_S4_1 "%32, %33, %34, %35"
#define PYFMT_S8_1 PYFMT_S8(32, 33, 34, 35, 36, 37, 38, 39)
#define PYFMT_S16_1 PYFMT_S8_1 ", " PYFMT_S8(40, 41, 42, 43, 44, 45, 46, 47)
#define PYFMT_S32_2                                            \
  PYFMT_S8(64, 65, 66, 67, 68, 69, 70, 71)                     \
  ", " PYFMT_S8(72, 73, 74, 75, 76, 77, 78, 79) ", " PYFMT_S8( \
      80, 81, 82, 83, 84, 85, 86, 87) ", " PYFMT_S8(88, 89, 90, 91, 92, 93, 94, 95)
#define PYFMT_S32_3                                                                            \
  PYFMT_S8(96, 97, 98, 99, 100, 101, 102, 103)                                                 \
  ", " PYFMT_S8(104, 105, 106, 107, 108, 109, 110, 111) ", " PYFMT_S8(                         \
      112, 113, 114, 115, 116, 117, 118, 119) ", " PYFMT_S8(120, 121, 122, 123, 124, 125, 126, \
                                                            127)

#define PYFMT_R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PYFMT_R8(i) PYFMT_R4(i), PYFMT_R4(i + 4)
#define PYFMT_R16(i) PYFMT_R4(i), PYFMT_R4(i + 4), PYFMT_R4(i + 8), PYFMT_R4(i + 12)
#define PYFMT_R32(i) PYFMT_R16(i), PYFMT_R16(i + 16)

#if defined(__CUDACC__)
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
#define PYFMT_PRODUCT_ASM(shape, tail, places, a_place, b_place, flag, ...)            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #flag                              \
               ", 0;\nwgmma.mma_async.sync.aligned." shape " {" places "}, %" #a_place \
               ", %" #b_place ", p, 1, 1" tail ";\n}"                                  \
               : __VA_ARGS__                                                           \
               : "l"(a), "l"(b), "r"(add))
#else
#define PYFMT_PRODUCT_ASM(...) (void)d, (void)a, (void)b, (void)add
#endif
#define PYFMT_PRODUCT(type, count, n, shape, tail, places, a_place, b_place, flag, ...)   \
  template <>                                                                             \
  struct Product<type, n> {                                                               \
    PYFMT_DEVICE static void add_to(float (&d)[n / 2], uint64_t a, uint64_t b, int add) { \
      PYFMT_PRODUCT_ASM(shape, tail, places, a_place, b_place, flag, __VA_ARGS__);        \
    }                                                                                     \
  };
#else
#define PYFMT_PRODUCT(type, count, n, ...)                                   \
  template <>                                                                \
  struct Product<type, n> {                                                  \
    static void add_to(float (&d)[n / 2], uint64_t a, uint64_t b, int add) { \
      emulated_product<type, count, n>(d, a, b, add);                        \
    }                                                                        \
  };
#endif

PYFMT_PRODUCT(Bf16, 16, 128, "m64n128k16.f32.bf16.bf16", ", 0, 0", PYFMT_S32_0 ", " PYFMT_S32_1, 64,
              65, 66, PYFMT_R32(0), PYFMT_R32(32))
PYFMT_PRODUCT(Bf16, 16, 192, "m64n192k16.f32.bf16.bf16", ", 0, 0",
              PYFMT_S32_0 ", " PYFMT_S32_1 ", " PYFMT_S32_2, 96, 97, 98, PYFMT_R32(0),
              PYFMT_R32(32), PYFMT_R32(64))

using E4M3ByE4M3 = Fp8<false, false>;
using E4M3ByE5M2 = Fp8<false, true>;
using E5M2ByE4M3 = Fp8<true, false>;
using E5M2ByE5M2 = Fp8<true, true>;

#if defined(__CUDACC__)
#if defined(PYFMT_SM90A) && defined(__CUDA_ARCH__)
#define PYFMT_REGISTER_ASM(shape, tail, places, a0, a1, a2, a3, b_place, flag, ...)          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #flag                                    \
               ", 0;\nwgmma.mma_async.sync.aligned." shape " {" places "}, {%" #a0 ", %" #a1 \
               ", %" #a2 ", %" #a3 "}, %" #b_place ", p, 1, 1" tail ";\n}"                   \
               : __VA_ARGS__                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
#else
#define PYFMT_REGISTER_ASM(...) (void)d, (void)a, (void)b, (void)add
#endif
#define PYFMT_REGISTER_PRODUCT(type, count, n, shape, tail, places, a0, a1, a2, a3, tile, flag, \
                               ...)                                                             \
  template <>                                                                                   \
  struct RegisterProduct<type, n> {                                                             \
    PYFMT_DEVICE static void add_to(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b,      \
                                    int add) {                                                  \
      PYFMT_REGISTER_ASM(shape, tail, places, a0, a1, a2, a3, tile, flag, __VA_ARGS__);         \
    }                                                                                           \
  };
#else
#define PYFMT_REGISTER_PRODUCT(type, count, n, ...)                                      \
  template <>                                                                            \
  struct RegisterProduct<type, n> {                                                      \
    static void add_to(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, int add) { \
      emulated_register_product<type, count, n>(d, a, b, add);                           \
    }                                                                                    \
  };
#endif

#define PYFMT_S8_0 PYFMT_S8(0, 1, 2, 3, 4, 5, 6, 7)
#define PYFMT_S16_0 PYFMT_S8_0 ", " PYFMT_S8(8, 9, 10, 11, 12, 13, 14, 15)

PYFMT_REGISTER_PRODUCT(Bf16, 16, 16, "m64n16k16.f32.bf16.bf16", ", 0", PYFMT_S8_0, 8, 9, 10, 11, 12,
                       13, PYFMT_R4(0), PYFMT_R4(4))
PYFMT_REGISTER_PRODUCT(Bf16, 16, 32, "m64n32k16.f32.bf16.bf16", ", 0", PYFMT_S16_0, 16, 17, 18, 19,
                       20, 21, PYFMT_R16(0))

// For 64, 72, 80, 96 and 128 rows of b.
#define PYFMT_REGISTER_PRODUCTS(type, count, k, kinds, tail)                                       \
  PYFMT_REGISTER_PRODUCT(type, count, 64, "m64n64" k kinds, tail, PYFMT_S32_0, 32, 33, 34, 35, 36, \
                         37, PYFMT_R32(0))                                                         \
  PYFMT_REGISTER_PRODUCT(type, count, 72, "m64n72" k kinds, tail, PYFMT_S32_0 ", " PYFMT_S4_1, 36, \
                         37, 38, 39, 40, 41, PYFMT_R32(0), PYFMT_R4(32))                           \
  PYFMT_REGISTER_PRODUCT(type, count, 80, "m64n80" k kinds, tail, PYFMT_S32_0 ", " PYFMT_S8_1, 40, \
                         41, 42, 43, 44, 45, PYFMT_R32(0), PYFMT_R8(32))                           \
  PYFMT_REGISTER_PRODUCT(type, count, 96, "m64n96" k kinds, tail, PYFMT_S32_0 ", " PYFMT_S16_1,    \
                         48, 49, 50, 51, 52, 53, PYFMT_R32(0), PYFMT_R16(32))                      \
  PYFMT_REGISTER_PRODUCT(type, count, 128, "m64n128" k kinds, tail, PYFMT_S32_0 ", " PYFMT_S32_1,  \
                         64, 65, 66, 67, 68, 69, PYFMT_R32(0), PYFMT_R32(32))

PYFMT_REGISTER_PRODUCTS(Bf16, 16, "k16", ".f32.bf16.bf16", ", 0")
PYFMT_REGISTER_PRODUCT(Bf16, 16, 192, "m64n192k16.f32.bf16.bf16", ", 0",
                       PYFMT_S32_0 ", " PYFMT_S32_1 ", " PYFMT_S32_2, 96, 97, 98, 99, 100, 101,
                       PYFMT_R32(0), PYFMT_R32(32), PYFMT_R32(64))
PYFMT_REGISTER_PRODUCT(Bf16, 16, 256, "m64n256k16.f32.bf16.bf16", ", 0",
                       PYFMT_S32_0 ", " PYFMT_S32_1 ", " PYFMT_S32_2 ", " PYFMT_S32_3, 128, 129,
                       130, 131, 132, 133, PYFMT_R32(0), PYFMT_R32(32), PYFMT_R32(64),
                       PYFMT_R32(96))
PYFMT_REGISTER_PRODUCTS(E4M3ByE4M3, 32, "k32", ".f32.e4m3.e4m3", "")
PYFMT_REGISTER_PRODUCTS(E4M3ByE5M2, 32, "k32", ".f32.e4m3.e5m2", "")
PYFMT_REGISTER_PRODUCTS(E5M2ByE4M3, 32, "k32", ".f32.e5m2.e4m3", "")
PYFMT_REGISTER_PRODUCTS(E5M2ByE5M2, 32, "k32", ".f32.e5m2.e5m2", "")

}  // namespace hopper
}  // namespace cuda
}  // namespace pyfmt
