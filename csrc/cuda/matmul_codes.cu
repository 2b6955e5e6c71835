// SPDX-License-Identifier: Apache-2.0
// Few rows of codes by a weight of codes: which kernel, and how many blocks share the rows.
#include <algorithm>

#include "../parse.h"
#include "matmul_codes.cuh"

namespace pyfmt {
namespace cuda {

namespace {

bool by_32(const FormatSpec& f) {
  return f.scale == Scale::kE8M0 && f.block_rows == 1 && f.block_columns == 32 &&
         (f.element == elements::e2m1 || f.element == elements::int4q2);
}
bool by_16(const FormatSpec& f) {
  return f.scale == Scale::kE4M3 && f.block_rows == 1 && f.block_columns == 16 &&
         (f.element == elements::e2m1 || f.element == elements::int4);
}

// What a product of bytes is more than one of elements, as a power of two.
int more_by(const FormatSpec& f, bool weight) {
  return f.element.is_int() ? (weight ? 4 : 0) + f.element.frac : 1;
}

struct CodesKernel {
  void (*run)(CodesParams);
  int columns, (*shared)(int warps);
};

template <class E, Scale kScale, int kTiles, int kSlots>
CodesKernel describe() {
  using S = CodesShape<E, kScale, kTiles, kSlots>;
  return {matmul_codes_kernel<E, kScale, kTiles, kSlots>, S::kColumns, S::shared_bytes};
}

template <class E, Scale kScale>
CodesKernel kernel_for(int64_t m, int64_t k) {
  if constexpr (kScale == Scale::kE8M0) {
    if (m > 8) return describe<E, kScale, 2, 2>();
  }
  return k > 8192 ? describe<E, kScale, 1, 4>() : describe<E, kScale, 1, 2>();
}

CodesKernel find_kernel(const FormatSpec& f, int64_t m, int64_t k) {
  if (by_16(f)) {
    return f.element == elements::e2m1 ? kernel_for<e2m1_element, Scale::kE4M3>(m, k)
                                       : kernel_for<int4_element, Scale::kE4M3>(m, k);
  }
  return f.element == elements::e2m1 ? kernel_for<e2m1_element, Scale::kE8M0>(m, k)
                                     : kernel_for<int4q2_element, Scale::kE8M0>(m, k);
}

PlaceParams place_params(const FormatSpec& f, const CodesLeft& to) {
  PlaceParams p;
  p.eights = int64_t(to.m) * (to.k / 8);
  p.row_eights = to.k / 8;
  p.rows = to.m;
  p.limits = limits(f.element, false);
  p.bytes = static_cast<uint8_t*>(to.bytes);
  p.scales = to.scales;
  p.tiles = CodesLayout::tiles(to.m);
  p.halves = to.halves;
  return p;
}

int64_t place_blocks(const PlaceParams& p) {
  return (p.eights + kPlaceThreads - 1) / kPlaceThreads;
}

}  // namespace

const char* matmul_codes_refuses(const FormatSpec& x, const FormatSpec& w, int64_t m, int64_t n,
                                 int64_t k) {
  const bool apart = by_16(x) && by_16(w);
  if (!apart && (!by_32(x) || !by_32(w))) {
    return "it multiplies MXFP4 and MXINT4 by MXFP4 and MXINT4, NVFP4 and NVINT4 by NVFP4 and "
           "NVINT4";
  }
  if (m < 1 || m > (apart ? CodesLayout::kApartRows : 16)) {
    return apart ? "it takes 1 to 4 rows of x in blocks of 16" : "it takes 1 to 16 rows of x";
  }
  if (n < 1 || n % 16 != 0) return "it takes weights of a multiple of 16 rows";
  if (k < 256 || k % 256 != 0) return "it takes rows of a multiple of 256 elements";
  if (apart && k > 14336) return "its shared memory holds scales of 14336 columns";
  if (k > (m > 8 ? 8192 : 16384)) return "its registers hold 8192 columns of 16 rows or 16384 of 8";
  return nullptr;
}

bool matmul_codes_reads(const FormatSpec& w, const void* codes, const void* scales) {
  return aligned16(codes) && reinterpret_cast<uintptr_t>(scales) % (by_16(w) ? 16 : 8) == 0;
}

int64_t codes_bytes(int64_t m, int64_t k) {
  return (m + 7) / 8 * ((k + 511) / 512) * 4096;
}
int64_t codes_scales(int64_t m, int64_t k) {
  return (m + 7) / 8 * 8 * (k / 32);
}

bool round_codes_serves(const QuantizeArgs& a) {
  return few_rows(a) && (by_32(a.format) || by_16(a.format)) && a.rotation.size <= kWarpTurn;
}

bool codes_in_halves(const FormatSpec& w) {
  return w.element.is_int();
}

void round_codes(const QuantizeArgs& a, const CodesLeft& to, Stream stream) {
  PlaceParams p = place_params(a.format, to);
  p.x = a.x;
  p.scale = scale_params(a);
  p.limits = limits(a.format.element, a.full);
  p.rotation = rotation_params(a.rotation);
  p.tensor_scale = to.tensor_scale;
  const bool fp4 = a.format.element == elements::e2m1;
  auto kernel = fp4 ? round_to_bytes<e2m1_element, Scale::kE8M0>
                    : round_to_bytes<int4q2_element, Scale::kE8M0>;
  if (by_16(a.format)) {
    kernel = fp4 ? round_to_bytes<e2m1_element, Scale::kE4M3>
                 : round_to_bytes<int4_element, Scale::kE4M3>;
    if (a.recipe != Recipe::kSingleLevel && !a.tensor_scale) p.together = to.together;
  }
  launch_after(launches_overlap(), kernel, place_blocks(p), kPlaceThreads, stream, p);
}

void place_codes(const uint8_t* codes, const uint8_t* scales, const FormatSpec& f,
                 const CodesLeft& to, Stream stream) {
  PlaceParams p = place_params(f, to);
  p.x = codes;
  p.x_scales = scales;
  const bool fp4 = f.element == elements::e2m1;
  auto kernel = fp4 ? place_as_bytes<e2m1_element, Scale::kE8M0>
                    : place_as_bytes<int4q2_element, Scale::kE8M0>;
  if (by_16(f)) {
    kernel = fp4 ? place_as_bytes<e2m1_element, Scale::kE4M3>
                 : place_as_bytes<int4_element, Scale::kE4M3>;
  }
  launch_after(launches_overlap(), kernel, place_blocks(p), kPlaceThreads, stream, p);
}

void matmul_codes(const MatmulCodesArgs& a, Stream stream) {
  CodesParams p;
  p.x = static_cast<const uint8_t*>(a.x.bytes);
  p.x_scales = a.x.scales;
  p.tokens = a.x.m;
  p.codes = a.codes;
  p.scales = a.scales;
  p.n = int(a.n);
  p.k = a.x.k;
  p.row_bytes = p.k / 2;
  p.row_scales = p.k / int(a.format.block_columns);
  p.x_tensor_scale = a.x_tensor_scale;
  p.tensor_scale = a.tensor_scale;
  p.slots = a.x.together.slots;
  p.slot_count = together_blocks(int64_t(p.tokens) * p.k);
  p.factor =
      L::as_float(power_of_two_bits(23 - more_by(a.x_format, false) - more_by(a.format, true)));
  p.bias = a.bias;
  p.bias_dtype = a.bias_dtype;
  p.out = a.out;
  p.out_dtype = a.out_dtype;
  const CodesKernel kernel = find_kernel(a.format, p.tokens, p.k);
  const int warps = (p.k + kernel.columns - 1) / kernel.columns;
  ClusterLaunch l;
  l.shared = kernel.shared(warps);
  // Where two blocks fit a multiprocessor and each has work, one begins while the other ends.
  const int64_t tiles = a.n / 16, places = multiprocessors();
  const bool two = warps <= 8 && 2 * (l.shared + 1024) <= 228 * 1024 && tiles >= 6 * places;
  // Where one block is meant for each, two might share a multiprocessor while another has none.
  if (!two) l.shared = std::max(l.shared, 116 * 1024);
  l.clusters = std::min(tiles, a.blocks ? int64_t(a.blocks) : two ? 2 * places : places);
  p.even_tiles = int(tiles / l.clusters);
  p.longer_blocks = int(tiles % l.clusters);
  // Many copies ahead of x hold it up.
  const bool two_slots = a.format.element.is_int() || tiles > 6 * l.clusters ||
                         (a.x.together.slots && warps > 8);  // x comes later, too
  p.early = a.early ? a.early : two_slots ? 2 : 1;
  l.overlap = a.overlap;
  l.threads = 32 * warps;
  launch_clusters(kernel.run, l, stream, p);
}

}  // namespace cuda
}  // namespace pyfmt
