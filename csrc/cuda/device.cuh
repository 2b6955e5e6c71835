// SPDX-License-Identifier: Apache-2.0
// What kernels are made of: conversions the hardware has, 16-byte memory access, warp staging. Each
// conversion has a host text of the same bits, so that the kernels also run in the emulation of
// tests/emulation.
#pragma once

#include <cuda_runtime.h>

#include "../codec.h"
#include "args.h"
#include "launch.cuh"

namespace pyfmt {
namespace cuda {

using L = codec::Lane<uint32_t>;

// Instructions of compute capability 8.9 and later; older GPUs run the plain text.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define PYFMT_SM89 1
#endif

constexpr int kUnit = 32;      // elements of one thread
constexpr int kThreads = 256;  // threads of one block of the grid
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

PYFMT_DEVICE float as_float(uint32_t x) {
  return L::as_float(x);
}
PYFMT_DEVICE uint32_t as_uint(float x) {
  return L::as_uint(x);
}

// ---- single instructions ----------------------------------------------------------------------

// Magnitudes compared, the sign of a kept; b must be positive.
PYFMT_DEVICE float min_magnitude(float a, float b) {
#if defined(PYFMT_SM89)
  float d;
  asm("min.xorsign.abs.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
#else
  return as_float(L::min(as_uint(a) & 0x7fffffffu, as_uint(b)) | (as_uint(a) & 0x80000000u));
#endif
}

// max(a, |b|), NaN where either is.
PYFMT_DEVICE float max_abs_nan(float a, float b) {
#if defined(PYFMT_SM89)
  float d;
  asm("{.reg .f32 t; abs.f32 t, %2; max.NaN.f32 %0, %1, t;}" : "=f"(d) : "f"(a), "f"(b));
  return d;
#else
  return as_float(L::max(as_uint(a), as_uint(b) & 0x7fffffffu));
#endif
}

// (a & mask) | (b & ~mask) in one instruction, whatever the compiler knows about the bits.
PYFMT_DEVICE uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xac;" : "=r"(d) : "r"(mask), "r"(b), "r"(a));
  return d;
#else
  return (a & mask) | (b & ~mask);
#endif
}

// Four bytes picked from b:a (a's are 0 to 3); one selector nibble a byte, lowest first.
PYFMT_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, selector);
#else
  const uint64_t all = uint64_t(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    d |= uint32_t(all >> (8 * ((selector >> (4 * i)) & 7)) & 0xff) << (8 * i);
  }
  return d;
#endif
}

// The same by the low 16 bits of a selector, whose nibbles' upper bits ask for eight copies of the
// byte's sign in its place.
PYFMT_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  // __byte_perm drops the bits that ask for signs.
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
#else
  const uint32_t picked = pick_bytes(a, b, selector & 0x7777u);
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = picked >> (8 * i) & 0xffu;
    d |= (selector >> (4 * i) & 8u ? (byte >> 7) * 0xffu : byte) << (8 * i);
  }
  return d;
#endif
}

PYFMT_DEVICE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// a * b rounded towards zero.
PYFMT_DEVICE float multiply_down(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rz(a, b);
#else
  // Exact in double but for results far below float32's smallest.
  const double exact = double(a) * double(b);
  const float near = float(exact);
  const bool beyond = std::fabs(double(near)) > std::fabs(exact);
  return beyond ? as_float(as_uint(near) - 1) : near;
#endif
}

// Two float32 to two fp8 codes, a in the low byte: RNE, saturating. No NaN.
template <bool kE5M2>
PYFMT_DEVICE uint32_t to_fp8(float a, float b) {
#if defined(PYFMT_SM89)
  uint16_t d;
  if constexpr (kE5M2) {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(d) : "f"(b), "f"(a));
  } else {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(b), "f"(a));
  }
  return d;
#else
  constexpr codec::FloatCodec c(kE5M2 ? elements::e5m2ieee : elements::e4m3fn);
  return codec::encode_float<uint32_t>(c, as_uint(a)) | codec::encode_float<uint32_t>(c, as_uint(b))
                                                            << 8;
#endif
}

PYFMT_DEVICE float from_half(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(uint16_t(bits)));
  return f;
#else
  return as_float(codec::float_from_half<uint32_t>(bits & 0xffffu));
#endif
}

// The low two bytes as E4M3 codes.
PYFMT_DEVICE void from_e4m3(uint32_t two, float* a, float* b) {
#if defined(PYFMT_SM89)
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(two)));
  *a = from_half(halves);
  *b = from_half(halves >> 16);
#else
  constexpr codec::FloatCodec c(elements::e4m3fn);
  *a = as_float(codec::decode_float<uint32_t>(c, two & 0xffu));
  *b = as_float(codec::decode_float<uint32_t>(c, two >> 8 & 0xffu));
#endif
}

// Two float32 rounded to the output dtype, a in the low half; NaN comes out canonical.
template <DType kOut>
PYFMT_DEVICE uint32_t to_halves(float a, float b) {
  constexpr bool kBf16 = kOut == DType::kBF16;
#if defined(PYFMT_SM89)
  uint32_t d;
  if constexpr (kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
  }
  // The conversion's only NaN is 0x7fff; as signed halves it alone exceeds the canonical one.
  return __vmins2(d, kBf16 ? 0x7fc07fc0u : 0x7e007e00u);
#else
  const uint32_t x = as_uint(a), y = as_uint(b);
  return kBf16 ? codec::bf16_from_float<uint32_t>(x) | codec::bf16_from_float<uint32_t>(y) << 16
               : codec::half_from_float<uint32_t>(x) | codec::half_from_float<uint32_t>(y) << 16;
#endif
}

// The bits of an arithmetic result, whose only NaN is then the canonical one.
PYFMT_DEVICE uint32_t canonical(float x) {
#if defined(__CUDA_ARCH__)
  return uint32_t(min(int32_t(as_uint(x)), int32_t(kFloatNaN)));
#else
  return codec::canonical_nan<uint32_t>(as_uint(x), kFloatNaN);
#endif
}

// Lane-wise max(a, |b|) of two halves, NaN where either is.
template <DType kIn>
PYFMT_DEVICE uint32_t max_abs_halves(uint32_t a, uint32_t b) {
#if defined(PYFMT_SM89)
  uint32_t d;
  if constexpr (kIn == DType::kBF16) {
    asm("{.reg .b32 t; abs.bf16x2 t, %2; max.NaN.bf16x2 %0, %1, t;}" : "=r"(d) : "r"(a), "r"(b));
  } else {
    asm("{.reg .b32 t; abs.f16x2 t, %2; max.NaN.f16x2 %0, %1, t;}" : "=r"(d) : "r"(a), "r"(b));
  }
  return d;
#else
  const uint32_t t = b & 0x7fff7fffu;
  return L::max(a >> 16, t >> 16) << 16 | L::max(a & 0xffffu, t & 0xffffu);
#endif
}

// Lane-wise largest of unsigned halves.
PYFMT_DEVICE uint32_t max_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __vmaxu2(a, b);
#else
  return L::max(a >> 16, b >> 16) << 16 | L::max(a & 0xffffu, b & 0xffffu);
#endif
}

// One of two halves as float32 bits.
template <DType kIn>
PYFMT_DEVICE float half_at(uint32_t pair, int which) {
  if constexpr (kIn == DType::kBF16) {
    return as_float(which ? pair & 0xffff0000u : pair << 16);
  } else {
    return from_half(which ? pair >> 16 : pair);
  }
}

// ---- memory -----------------------------------------------------------------------------------

// A unit of elements as they lie in memory.
template <DType kIn>
struct Raw {
  static constexpr int kWords = kIn == DType::kFP32 ? kUnit : kUnit / 2;
  uint32_t w[kWords];

  // p: 16-byte aligned.
  PYFMT_DEVICE void load(const void* p) {
    const uint4* q = static_cast<const uint4*>(p);
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 v = q[i];
      w[4 * i] = v.x;
      w[4 * i + 1] = v.y;
      w[4 * i + 2] = v.z;
      w[4 * i + 3] = v.w;
    }
  }
  PYFMT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) w[i] = 0;
  }
  // i: known at compile time.
  PYFMT_DEVICE float get(int i) const {
    if constexpr (kIn == DType::kFP32) {
      return as_float(w[i]);
    } else {
      return half_at<kIn>(w[i / 2], i & 1);
    }
  }
  // Element 16 becomes the first.
  PYFMT_DEVICE void skip16() {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) w[i] = w[kWords / 2 + i];
  }
  // The largest magnitude of 16 elements as float32 bits; infinity's or more for non-finite ones.
  PYFMT_DEVICE uint32_t amax16(int half) const {
    if constexpr (kIn == DType::kFP32) {
      float m = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) m = max_abs_nan(m, as_float(w[16 * half + i]));
      return as_uint(m);
    } else {
      uint32_t m = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) m = max_abs_halves<kIn>(m, w[8 * half + i]);
      const uint32_t low = as_uint(half_at<kIn>(m, 0)), high = as_uint(half_at<kIn>(m, 1));
      return L::max(low, high);
    }
  }
};

// What is read once should not take the place of what is written and read again.
template <class T>
PYFMT_DEVICE T load_once(const T* p) {
#if defined(__CUDA_ARCH__)
  return __ldcs(p);
#else
  return *p;
#endif
}
PYFMT_DEVICE void store_once(uint4* p, const uint4& v) {
#if defined(__CUDA_ARCH__)
  __stcs(p, v);
#else
  *p = v;
#endif
}
// 16-byte aligned, in whole 16 bytes; a hint.
PYFMT_DEVICE void fetch_to_l2(const void* p, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

// One element of any dtype as float32.
PYFMT_DEVICE float load_element(const void* x, DType dtype, int64_t i) {
  if (dtype == DType::kFP32) return static_cast<const float*>(x)[i];
  const uint32_t bits = static_cast<const uint16_t*>(x)[i];
  return dtype == DType::kBF16 ? as_float(bits << 16) : from_half(bits);
}

PYFMT_DEVICE void store_element(void* out, DType dtype, int64_t i, float value) {
  if (dtype == DType::kFP32) {
    static_cast<uint32_t*>(out)[i] = canonical(value);
  } else {
    const uint32_t bits = dtype == DType::kBF16 ? to_halves<DType::kBF16>(value, 0.0f)
                                                : to_halves<DType::kFP16>(value, 0.0f);
    static_cast<uint16_t*>(out)[i] = uint16_t(bits);
  }
}

// The words of a unit that a warp's lanes hold, written to consecutive places from `out` on; lane
// l holds bytes [l * kBytes, (l + 1) * kBytes). Goes through shared memory where a lane's share is
// wider than one access, so that each store of the warp is one contiguous stretch.
template <int kBytes>
struct Stage {
  static constexpr int kChunk = kBytes % 16 == 0 ? 16 : 8;
  static constexpr int kCount = kBytes / kChunk;
  static constexpr int kShared = kBytes == 16 ? 1 : 32 * kBytes * kWarps / 16;
  static_assert(kBytes == 16 || kBytes == 24 || kBytes == 32 || kBytes == 64 || kBytes == 128,
                "a unit is 16, 24, 32, 64 or 128 bytes");

  // unit: of this lane; units: how many there are in all.
  PYFMT_DEVICE static void store(uint8_t* out, int64_t unit, int64_t units, const uint32_t* words,
                                 uint4* shared) {
    if constexpr (kBytes == 16) {
      if (unit < units) {
        reinterpret_cast<uint4*>(out)[unit] = make_uint4(words[0], words[1], words[2], words[3]);
      }
    } else {
      const int lane = threadIdx.x & 31;
      const int64_t first = (unit - lane) * kCount, end = units * kCount;
      __syncwarp();
      if constexpr (kChunk == 8) {
        uint2* mine = reinterpret_cast<uint2*>(shared) + (threadIdx.x >> 5) * 32 * kCount;
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          mine[lane * kCount + c] = make_uint2(words[2 * c], words[2 * c + 1]);
        }
        __syncwarp();
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          const int i = c * 32 + lane;
          if (first + i < end) reinterpret_cast<uint2*>(out)[first + i] = mine[i];
        }
      } else {
        // Chunk c of lane l lies at l * kCount + (c ^ turn(l)): eight lanes never share a bank.
        uint4* mine = shared + (threadIdx.x >> 5) * 32 * kCount;
        const int turn = (lane * kCount >> 3) & (kCount - 1);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          mine[lane * kCount + (c ^ turn)] =
              make_uint4(words[4 * c], words[4 * c + 1], words[4 * c + 2], words[4 * c + 3]);
        }
        __syncwarp();
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          const int i = c * 32 + lane;
          // The owner of chunk i is lane i / kCount, whose turn is (i >> 3) & (kCount - 1).
          const int place = i ^ ((i >> 3) & (kCount - 1));
          if (first + i < end) reinterpret_cast<uint4*>(out)[first + i] = mine[place];
        }
      }
    }
  }
};

// ---- asynchronous copies ----------------------------------------------------------------------

// Where something lies in shared memory.
#if defined(__CUDA_ARCH__)
using SharedAddress = uint32_t;
PYFMT_DEVICE SharedAddress shared_address(const void* p) {
  return SharedAddress(__cvta_generic_to_shared(p));
}
#else
using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* p) {
  return reinterpret_cast<uintptr_t>(p);
}
#endif

// 16 bytes from device memory to shared memory, complete after wait_copies.
PYFMT_DEVICE void copy16(SharedAddress to, const void* from) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  *reinterpret_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}

PYFMT_DEVICE uint4 load_shared16(SharedAddress from) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
#else
  return *reinterpret_cast<const uint4*>(from);
#endif
}

PYFMT_DEVICE void store_shared16(SharedAddress to, const uint4& v) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = v;
#endif
}

PYFMT_DEVICE void wait_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

constexpr int64_t blocks_for(int64_t threads) {
  return (threads + kThreads - 1) / kThreads;
}
inline bool aligned16(const void* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

}  // namespace cuda
}  // namespace pyfmt
