// SPDX-License-Identifier: Apache-2.0
// Which product serves: by what both sides are made of, the number of left rows, and whether
// numbers stay within the range that a kernel is exact in. The sums of one result never depend on
// how the work was cut.
#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>

#include "tiling.h"

namespace pyfmt {
namespace cpu {
namespace {

// Memory that a thread keeps between calls; what is larger is the caller's, or given back.
constexpr int64_t kKept = int64_t(8) << 20;

class Room {
 public:
  char* get(int64_t bytes) {
    if (bytes > have_) {
      have_ = 0;
      room_.reset(new char[size_t(bytes) + 64]);
      have_ = bytes;
    }
    return room_.get() + (64 - (uintptr_t(room_.get()) & 63)) % 64;
  }
  void trim() {
    if (have_ > kKept) {
      room_.reset();
      have_ = 0;
    }
  }

 private:
  std::unique_ptr<char[]> room_;
  int64_t have_ = 0;
};

char* room_for(const MatmulCall& c, int64_t bytes, Room* room) {
  return bytes > kKept && c.borrow ? (char*)c.borrow(c.context, bytes) : room->get(bytes);
}

void* thread_workspace(int64_t bytes) {
  thread_local Room room;
  return room.get(bytes);
}

int64_t up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// ---- what serves ------------------------------------------------------------------------------

// Whether every value of an element is a number of steps that fits a signed byte.
bool counts_steps(const ElementSpec& e) {
  if (e.special != Special::kNone || e.step_exp() < -30 || e.step_exp() > 30) return false;
  if (e.is_int()) return e.is_signed || e.bits() < 8;
  const int shift = e.max_exp() - e.step_exp();
  return shift < 7 && (int64_t(e.max_significand()) << shift) <= 127;
}

bool fits_bytes(const ElementSpec& e) {
  return e.bits() <= 6 || (e.is_int() && e.bits() == 8);
}

bool moderate(const ElementSpec& e) {
  return e.step_exp() >= -20 && e.emax() <= 20;
}

// The elements of one dot product within one scale of each side, a multiple of 16 up to 512; or 0.
// Blocks 0 are as long as the row.
int64_t segment_of(int64_t a, int64_t b, int64_t k) {
  if (a >= k) a = 0;
  if (b >= k) b = 0;
  const int64_t g = gcd(a, b);
  constexpr int64_t kMost = 512;
  if (g == 0) return std::min(kMost, up(k, 16));
  if (g % 16) return 0;
  for (int64_t n = std::min(g, kMost); n >= 16; n -= 16) {
    if (g % n == 0) return n;
  }
  return 0;
}

// The product of two tensor scales; false where float32 does not hold it as a normal number.
bool multiplier_of(const Packed* left, const Packed& right, float* out) {
  double product = right.has_tensor_scale ? double(right.tensor_scale) : 1.0;
  if (left && left->has_tensor_scale) product *= left->tensor_scale;
  *out = float(product);
  return std::isnormal(*out);
}

// ---- the stream -------------------------------------------------------------------------------

bool stream_serves(const MatmulCall& c) {
  const MatmulKernels& kernels = matmul_kernels();
  float multiplier;
  const bool tokens = kernels.has_bf16 && c.a_dtype == DType::kBF16;
  return !c.left && c.m <= (tokens ? kStreamTokens : kStreamRows) &&
         kernels.stream_serves(c.right.format, c.k) &&
         multiplier_of(nullptr, c.right, &multiplier) && kernels.tame(c.a, c.a_dtype, c.m * c.k);
}

void run_stream(const ParallelFor& parallel, const MatmulCall& c) {
  const MatmulKernels& kernels = matmul_kernels();
  thread_local Room room;
  StreamArgs s;
  s.right = c.right;
  s.m = c.m;
  s.n = c.n;
  s.k = c.k;
  s.a = c.a;
  s.a_dtype = c.a_dtype;
  s.bias = c.bias;
  s.bias_dtype = c.bias_dtype;
  s.out = c.out;
  s.out_dtype = c.out_dtype;
  s.prepared = (float*)room_for(c, c.m * kernels.stream_columns(c.right.format, c.k) * 4, &room);
  kernels.stream_prepare(s);
  // Whole groups of four rows.
  const int64_t groups = (c.n + 3) / 4;
  parallel(
      groups, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, 4 * c.k)),
      [&](int64_t begin, int64_t end) { kernels.stream(s, begin * 4, std::min(end * 4, c.n)); });
  room.trim();
}

// ---- tiles ------------------------------------------------------------------------------------

void choose_tile(const MatmulCall& c, const FormatSpec* left, TileArgs* t) {
  const MatmulKernels& kernels = matmul_kernels();
  const FormatSpec& right = c.right.format;
  const int64_t b = right.columns(c.k), a = left ? left->columns(c.k) : 0;
  const int64_t segment = segment_of(a, b, c.k);
  const Packed* packed = c.left;
  bool apart = segment && multiplier_of(packed, c.right, &t->multiplier);
  if (left && apart) {
    const ElementSpec &x = left->element, &y = right.element;
    if (counts_steps(x) && counts_steps(y)) {
      const bool bytes = kernels.has_int8 && fits_bytes(x) && fits_bytes(y);
      t->kind = bytes ? TileKind::kInt8 : TileKind::kFP32;
    } else {
      t->kind = TileKind::kBF16;
      apart = kernels.has_bf16 && moderate(x) && moderate(y);
    }
  } else if (apart) {
    t->kind = TileKind::kBF16;
    apart = kernels.has_bf16 && c.a_dtype == DType::kBF16 && moderate(right.element) &&
            kernels.tame(c.a, c.a_dtype, c.m * c.k);
  }
  if (apart) {
    t->segment = segment;
    return;
  }
  t->kind = TileKind::kFP32;
  t->decoded = true;
  t->multiplier = 1.0f;
  t->segment = std::min<int64_t>(128, std::max<int64_t>(16, up(c.k, 16)));
}

// Every call on its own thread.
const ParallelFor kSerial{[](void*, int64_t n, int64_t, void (*body)(void*, int64_t, int64_t),
                             void* context) { body(context, 0, n); },
                          nullptr};

// Rows begin to end of x: rotated, quantized and packed, a few at a time.
void quantize_left(const MatmulCall& c, LeftArgs l, int64_t begin, int64_t end, int64_t* least,
                   int64_t* most) {
  const FormatSpec& f = c.quantize->format;
  const int64_t row_bytes = f.row_bytes(c.k), row_scales = f.blocks(c.k) * scale_bytes(f.scale);
  const int64_t some = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, c.k));
  const int64_t codes = up(some * row_bytes, 64);
  uint8_t* const room = (uint8_t*)thread_workspace(codes + some * row_scales);
  Packed left;
  left.codes = room;
  left.scales = room + codes;
  left.format = f;
  l.left = &left;
  for (int64_t row = begin; row < end; row += some) {
    View v;
    v.rows = left.rows = left.batch_rows = std::min(some, end - row);
    v.columns = c.k;
    const void* const x = (const char*)c.a + row * c.k * dtype_bytes(c.a_dtype);
    quantize(kSerial, Source{x, c.a_dtype, v}, *c.quantize, room, room + codes, nullptr);
    int64_t low = 255, high = 0;
    l.first_row = row;
    matmul_kernels().left(l, 0, left.rows, &low, &high);
    *least = std::min(*least, low);
    *most = std::max(*most, high);
  }
}

void pack_left(const ParallelFor& parallel, const MatmulCall& c, TileArgs* t) {
  LeftArgs l;
  l.tile = t;
  l.left = c.left;
  l.a = c.a;
  l.a_dtype = c.a_dtype;
  int64_t lowest = 255, highest = 0;
  std::mutex lock;
  parallel(c.m, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, c.k)),
           [&](int64_t begin, int64_t end) {
             int64_t least = 255, most = 0;
             if (c.quantize) {
               quantize_left(c, l, begin, end, &least, &most);
             } else {
               matmul_kernels().left(l, begin, end, &least, &most);
             }
             const std::lock_guard<std::mutex> guard(lock);
             lowest = std::min(lowest, least);
             highest = std::max(highest, most);
           });
  t->a_least = lowest;
  t->a_most = highest;
}

void run_tiles(const ParallelFor& parallel, const MatmulCall& c) {
  const MatmulKernels& kernels = matmul_kernels();
  TileArgs t;
  t.m = c.m;
  t.n = c.n;
  t.k = c.k;
  t.right = c.right;
  t.bias = c.bias;
  t.bias_dtype = c.bias_dtype;
  t.out = c.out;
  t.out_dtype = c.out_dtype;
  t.workspace = thread_workspace;
  const FormatSpec* const format = c.quantize ? &c.quantize->format
                                   : c.left   ? &c.left->format
                                              : nullptr;
  choose_tile(c, format, &t);

  thread_local Room panel_room, scale_room;
  const int64_t bytes = t.kind == TileKind::kInt8 ? 1 : t.kind == TileKind::kBF16 ? 2 : 4;
  t.a_columns = up(t.segments() * t.segment, t.kind == TileKind::kBF16 ? 128 : 64);
  // A left side that is what the tiles read already is not copied.
  const bool ready =
      !format && t.kind == TileKind::kFP32 && t.a_columns == c.k && c.a_dtype == DType::kFP32;
  if (ready) {
    t.a = const_cast<void*>(c.a);
  } else {
    const int64_t rows = t.kind == TileKind::kBF16 ? up(c.m, 16) : c.m;
    t.a = room_for(c, rows * t.a_columns * bytes, &panel_room);
    const int64_t scales = t.kind == TileKind::kBF16 ? t.a_columns / 16 : t.segments();
    if (format && !t.decoded) t.a_scales = (float*)room_for(c, rows * scales * 4, &scale_room);
    pack_left(parallel, c, &t);
  }

  // Enough items for every thread to have several, but few that pack the same panel again; equal
  // ones, since each thread gets as many as the others.
  const int64_t panels = (c.n + kernels.panel - 1) / kernels.panel;
  const bool tokens = t.kind == TileKind::kBF16;
  const int64_t most_rows = tokens ? 128 : 504, few_rows = 48;
  const int64_t most = std::max<int64_t>(1, c.m / few_rows);
  const int64_t wanted = std::max((c.m + most_rows - 1) / most_rows, std::min(16 / panels, most));
  // Whole tiles: of 16 rows, or of 6 and of 4.
  t.m_chunk = up((c.m + wanted - 1) / wanted, tokens ? 16 : 12);
  const int64_t chunks = (c.m + t.m_chunk - 1) / t.m_chunk;
  const int64_t work = t.m_chunk * kernels.panel * c.k;
  parallel(panels * chunks, std::max<int64_t>(1, (int64_t(1) << 20) / std::max<int64_t>(1, work)),
           [&](int64_t begin, int64_t end) { kernels.tiles(t, begin, end); });
  panel_room.trim();
  scale_room.trim();
}

// x quantized as a whole: where one number belongs to all of it, or blocks to several rows.
void quantize_first(const ParallelFor& parallel, MatmulCall c) {
  const FormatSpec& f = c.quantize->format;
  Packed left;
  left.format = f;
  left.rows = c.m;
  left.batch_rows = c.view.rows;
  left.has_tensor_scale = c.quantize->has_tensor_scale();
  const int64_t strips = c.view.batches * ((c.view.rows + f.block_rows - 1) / f.block_rows);
  const int64_t codes = up(c.m * f.row_bytes(c.k), 64);
  thread_local Room room;
  uint8_t* const to =
      (uint8_t*)room_for(c, codes + strips * f.blocks(c.k) * scale_bytes(f.scale), &room);
  left.codes = to;
  left.scales = to + codes;
  quantize(parallel, Source{c.a, c.a_dtype, c.view}, *c.quantize, to, to + codes,
           &left.tensor_scale);
  c.left = &left;
  c.quantize = nullptr;
  run_tiles(parallel, c);
  room.trim();
}

void rotate_first(const ParallelFor& parallel, MatmulCall c) {
  thread_local Room room;
  void* const to = room_for(c, c.m * c.k * dtype_bytes(c.a_dtype), &room);
  View v;
  v.rows = c.m;
  v.columns = c.k;
  hadamard(parallel, Source{c.a, c.a_dtype, v}, c.rotation, to);
  c.a = to;
  c.rotation = Rotation{};
  matmul(parallel, c);
  room.trim();
}

}  // namespace

void matmul(const ParallelFor& parallel, const MatmulCall& c) {
  if (c.m == 0 || c.n == 0) return;
  if (c.quantize) {
    const bool whole = c.quantize->has_tensor_scale() || c.quantize->format.block_rows > 1;
    return whole ? quantize_first(parallel, c) : run_tiles(parallel, c);
  }
  if (c.rotation.size) return rotate_first(parallel, c);
  if (stream_serves(c)) return run_stream(parallel, c);
  run_tiles(parallel, c);
}

}  // namespace cpu
}  // namespace pyfmt
