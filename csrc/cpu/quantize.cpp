// SPDX-License-Identifier: Apache-2.0
// Quantize, fake-quantize, dequantize and amax: tensor scales, tiles, and blocks too long for one.
#include <atomic>
#include <memory>

#include "cpu.h"
#include "float_env.h"
#include "tiling.h"

namespace pyfmt {
namespace cpu {
namespace {

using Bits = codec::Lane<uint32_t>;

float finite_amax_of(const ParallelFor& parallel, const Source& s, const Rotation& rotation) {
  AmaxArgs a;
  a.x = s.x;
  a.dtype = s.dtype;
  a.rotation = rotation;
  FormatSpec f;  // Blocks play no part: any width that the rotation divides.
  f.element = elements::int8;
  f.block_columns = 1;
  make_tiling(s.view, f, rotation, &a.tiling);
  if (a.tiling.columns == 0) return 0.0f;
  std::atomic<uint32_t> largest{0};
  parallel(a.tiling.items(), grain(a.tiling), [&](int64_t begin, int64_t end) {
    const uint32_t mine = kernels().finite_amax(a, begin, end);
    uint32_t seen = largest.load(std::memory_order_relaxed);
    while (mine > seen && !largest.compare_exchange_weak(seen, mine)) {
    }
  });
  return Bits::as_float(largest.load());
}

// The constants of the recipe, each step rounded to float32.
codec::RecipeConstants recipe_constants(const ParallelFor& parallel, const Source& s,
                                        const Options& o) {
  codec::RecipeConstants r{};
  float tensor_scale = 1.0f, big_s = 1.0f;
  const float q = Bits::as_float(o.format.element.max_bits());
  const float top = 448.0f * q, huge = Bits::as_float(kFloatMax);
  const bool dynamic = o.has_tensor_scale() && !o.has_given;
  const float amax = dynamic ? finite_amax_of(parallel, s, o.rotation) : 0.0f;
  GradualUnderflow guard;
  if (o.recipe == Recipe::kTorchao && o.format.tensor_scale) {
    tensor_scale = o.has_given ? o.given : amax / top;
    if (tensor_scale == 0.0f) tensor_scale = 1.0f;
    r.torchao = true;
  } else if (o.has_given) {
    tensor_scale = o.given;
    big_s = 1.0f / o.given;
    if (big_s > huge) big_s = huge;
  } else if (dynamic && amax != 0.0f) {
    big_s = top / amax;
    if (big_s > huge) big_s = huge;
    tensor_scale = 1.0f / big_s;
  }
  r.tensor_scale = Bits::as_uint(tensor_scale);
  r.amax_factor = Bits::as_uint(big_s * (1.0f / q));
  r.qmax = o.format.element.max_bits();
  r.inverse = Bits::as_uint(1.0f / tensor_scale);
  return r;
}

// Blocks of more than one tile: amax of their pieces, then all scales, then codes by tiles that
// mind no block.
void quantize_long(const ParallelFor& parallel, const Source& s, QuantizeArgs a) {
  constexpr int64_t kPiece = 8192;
  Tiling& t = a.tiling;
  const int64_t rows = t.batches * t.rows, blocks = t.blocks();
  const int64_t piece = t.block_columns < kPiece ? t.block_columns : kPiece;
  const int64_t pieces = (t.block_columns + piece - 1) / piece;
  const std::unique_ptr<uint32_t[]> part(new uint32_t[size_t(rows * blocks * pieces)]);
  parallel(rows * blocks * pieces, kGrain / piece + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / (blocks * pieces), block = i / pieces % blocks;
      const int64_t inside = i % pieces * piece;
      const int64_t first = block * t.block_columns + inside;
      int64_t n = t.block_columns - inside < piece ? t.block_columns - inside : piece;
      n = t.columns - first < n ? t.columns - first : n;
      const char* x = (const char*)s.x + (row * t.columns + first) * dtype_bytes(s.dtype);
      part[size_t(i)] = n > 0 ? kernels().range_amax(x, s.dtype, n, false) : 0u;
    }
  });

  const int64_t strips = t.strips(), count = t.batches * strips * blocks;
  const std::unique_ptr<uint32_t[]> words(new uint32_t[size_t(count * 3)]);
  uint32_t *amax = words.get(), *encode = amax + count, *decode = encode + count;
  parallel(
      t.batches * strips, 1 + kGrain / (blocks * t.block_rows), [&](int64_t begin, int64_t end) {
        for (int64_t strip = begin; strip < end; ++strip) {
          const int64_t first = strip % strips * t.block_rows;
          const int64_t last = first + t.block_rows < t.rows ? first + t.block_rows : t.rows;
          uint32_t* out = amax + strip * blocks;
          for (int64_t b = 0; b < blocks; ++b) out[b] = 0;
          for (int64_t r = first; r < last; ++r) {
            const uint32_t* row = part.get() + (strip / strips * t.rows + r) * blocks * pieces;
            for (int64_t i = 0; i < blocks * pieces; ++i) {
              uint32_t& m = out[i / pieces];
              m = row[i] > m ? row[i] : m;
            }
          }
        }
        ScaleArgs sa;
        sa.quantize = &a;
        sa.amax = amax + begin * blocks;
        sa.count = (end - begin) * blocks;
        sa.scales = a.scales ? (char*)a.scales + begin * blocks * scale_bytes(a.scale) : nullptr;
        sa.encode = encode + begin * blocks;
        sa.decode = decode + begin * blocks;
        kernels().scale_blocks(sa);
      });

  a.given = encode;
  a.given_decode = decode;
  a.given_rows = t.block_rows;
  t.block_rows = 1;
  t.tile_columns = kTile;
  parallel(t.items(), grain(t),
           [&](int64_t begin, int64_t end) { kernels().quantize(a, begin, end); });
}

void run_quantize(const ParallelFor& parallel, Source s, const Options& o, uint8_t* codes,
                  void* scales, float* tensor_scale, void* out) {
  QuantizeArgs a;
  a.recipe = recipe_constants(parallel, s, o);
  if (tensor_scale) *tensor_scale = Bits::as_float(a.recipe.tensor_scale);
  if (s.view.count() == 0) return;
  a.element = o.format.element;
  a.scale = o.format.scale;
  a.rule = o.rule;
  a.stochastic = o.stochastic;
  a.full = o.full;
  a.seed = o.seed;
  a.codes = codes;
  a.scales = scales;
  a.out = out;
  a.has_tensor_scale = o.has_tensor_scale();
  a.out_dtype = s.dtype;

  Rotation rotation = o.rotation;
  std::unique_ptr<float[]> rotated;
  bool fits = make_tiling(s.view, o.format, rotation, &a.tiling);
  if (!fits && rotation.size) {
    // Blocks and rotations too large for one tile: rotate all of x first, in float32.
    rotated.reset(new float[size_t(s.view.count())]);
    rotate_to_float(parallel, s, rotation, rotated.get());
    s.x = rotated.get();
    s.dtype = DType::kFP32;
    rotation = Rotation{};
    fits = make_tiling(s.view, o.format, rotation, &a.tiling);
  }
  a.x = s.x;
  a.dtype = s.dtype;
  a.rotation = rotation;
  a.row_bytes = a.tiling.row_bytes(o.format.bits());
  if (!fits) return quantize_long(parallel, s, a);
  parallel(a.tiling.items(), grain(a.tiling),
           [&](int64_t begin, int64_t end) { kernels().quantize(a, begin, end); });
}

}  // namespace

void quantize(const ParallelFor& parallel, const Source& s, const Options& o, uint8_t* codes,
              void* scales, float* tensor_scale) {
  run_quantize(parallel, s, o, codes, scales, tensor_scale, nullptr);
}

void fake_quantize(const ParallelFor& parallel, const Source& s, const Options& o, void* out) {
  run_quantize(parallel, s, o, nullptr, nullptr, nullptr, out);
}

void dequantize(const ParallelFor& parallel, const uint8_t* codes, const void* scales,
                const float* tensor_scale, const FormatSpec& f, const View& v, DType dtype,
                void* out) {
  if (v.count() == 0) return;
  DequantizeArgs a;
  a.codes = codes;
  a.scales = scales;
  a.has_tensor_scale = tensor_scale != nullptr;
  if (tensor_scale) a.tensor_scale = *tensor_scale;
  a.element = f.element;
  a.scale = f.scale;
  a.dtype = dtype;
  a.out = out;
  make_tiling(v, f, Rotation{}, &a.tiling);
  a.row_bytes = a.tiling.row_bytes(f.bits());
  // Tiles need not hold whole blocks here: kTile elements are whole bytes and whole groups.
  a.tiling.tile_columns = kTile;
  parallel(a.tiling.items(), grain(a.tiling),
           [&](int64_t begin, int64_t end) { kernels().dequantize(a, begin, end); });
}

float finite_amax(const ParallelFor& parallel, const Source& s) {
  return finite_amax_of(parallel, s, Rotation{});
}

void block_amax(const ParallelFor& parallel, const Source& s, int64_t block, float* out) {
  if (s.view.count() == 0) return;
  const int64_t rows = s.view.batches * s.view.rows, columns = s.view.columns;
  const int64_t blocks = (columns + block - 1) / block;
  uint32_t* bits = (uint32_t*)out;
  if (block <= kMaxTile) {
    AmaxArgs a;
    a.x = s.x;
    a.dtype = s.dtype;
    a.out = bits;
    FormatSpec f;
    f.block_columns = block;
    f.element = elements::int8;
    make_tiling(s.view, f, Rotation{}, &a.tiling);
    parallel(a.tiling.items(), grain(a.tiling),
             [&](int64_t begin, int64_t end) { kernels().block_amax(a, begin, end); });
  } else {
    parallel(rows * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks * block;
        const int64_t n = columns - first < block ? columns - first : block;
        const char* x = (const char*)s.x + (i / blocks * columns + first) * dtype_bytes(s.dtype);
        bits[i] = kernels().range_amax(x, s.dtype, n, false);
      }
    });
  }
  for (int64_t i = 0; i < rows * blocks; ++i) bits[i] = bits[i] >= kFloatInf ? kFloatNaN : bits[i];
}

}  // namespace cpu
}  // namespace pyfmt
