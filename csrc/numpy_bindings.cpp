// SPDX-License-Identifier: Apache-2.0
// pyfmt._native: the CPU verbs on NumPy arrays, without torch.
//
// x arrives as a C-contiguous row view (rows, K), or (batches, rows, K) for square blocks, with
// the quantized axis last: float32, or the raw bits of bfloat16 / float16 as uint16 together with
// `dtype`. Results are new arrays. Float scales travel as raw bits too: uint16 for bf16 and fp16,
// uint32 for fp32. Wrong arguments raise ValueError with a sentence.
//
//   quantize(x, dtype, format, scale_rule=None, recipe=None, rounding="nearest", seed=None,
//            clip="symmetric", tensor_scale=None, rotation=0, signs=None)
//       -> (codes uint8 (..., rows, row_bytes), scales (..., scale rows, blocks), float | None)
//   dequantize(codes, scales, tensor_scale, format, length, rows, dtype)
//       -> (..., rows, length): codes and scales as quantize returns them, dtype as asked
//   fake_quantize(x, dtype, format, scale_rule=None, recipe=None, rounding="nearest", seed=None,
//                 clip="symmetric", tensor_scale=None) -> x's shape and bits
//   hadamard(x, dtype, size, signs=None) -> x's shape and bits
//   matmul(left, right, k, bias, bias_dtype, dtype) -> (M, N): a b^T + bias. left: (a, dtype) with
//   a
//       of (M, K), or a tuple like right's; right: (codes, scales, tensor_scale, format), with
//       codes of (rows, row_bytes) or (batches, rows, row_bytes). bias: (N,) or None
//   pack(codes (rows, n), bits) -> (rows, bytes)       unpack(packed (rows, bytes), bits, length)
//   amax(x, dtype, block=None) -> float, or (rows, blocks) float32 for a block
//   level() -> str    levels() -> str, by commas    set_level(name)    threads() -> int
//   set_threads(n): how many threads a call may use; 0 restores the number of processors
//
// dtype: "bfloat16", "float16" or "float32". seed: any 64-bit int. signs: float32 (n,).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/matmul.h"
#include "options.h"

namespace py = pybind11;

namespace pyfmt {
namespace {

// ---- threads ----------------------------------------------------------------------------------

std::atomic<int> wanted_threads{0};

int threads() {
  const int wanted = wanted_threads.load();
  if (wanted > 0) return wanted;
  static const int processors = std::max(1, int(std::thread::hardware_concurrency()));
  return processors;
}

// Cut [0, n) evenly; the calling thread takes the first piece.
void run_threads(void*, int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                 void* context) {
  if (n <= 0) return;
  const int64_t most = std::max<int64_t>(1, n / std::max<int64_t>(1, grain));
  const int64_t count = std::min<int64_t>(threads(), most);
  std::vector<std::thread> helpers;
  std::exception_ptr failure;
  std::mutex lock;
  const auto piece = [&](int64_t k) {
    try {
      body(context, n * k / count, n * (k + 1) / count);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(lock);
      failure = std::current_exception();
    }
  };
  int64_t started = 1;
  for (; started < count; ++started) {
    try {
      helpers.emplace_back(piece, started);
    } catch (const std::system_error&) {
      break;  // No more threads to be had: the rest runs here.
    }
  }
  piece(0);
  for (int64_t k = started; k < count; ++k) piece(k);
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

const cpu::ParallelFor kParallel{run_threads, nullptr};

// ---- arrays -----------------------------------------------------------------------------------

DType dtype_of(const std::string& name) {
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kFP16;
  if (name == "float32") return DType::kFP32;
  options::fail("dtype: expected bfloat16, float16 or float32, got ", name);
}

py::dtype raw_dtype(DType dtype) {
  return dtype == DType::kFP32 ? py::dtype::of<float>() : py::dtype::of<uint16_t>();
}

py::dtype scale_raw_dtype(Scale scale) {
  const int bytes = scale_bytes(scale);
  return bytes == 1   ? py::dtype::of<uint8_t>()
         : bytes == 2 ? py::dtype::of<uint16_t>()
                      : py::dtype::of<uint32_t>();
}

using Shape = std::vector<py::ssize_t>;

Shape shape_of(const py::array& a) {
  return Shape(a.shape(), a.shape() + a.ndim());
}

void expect_array(const char* what, const py::array& a, const py::dtype& dtype) {
  options::expect(a.dtype().num() == dtype.num(), what, ": expected dtype ",
                  std::string(py::str(dtype)), ", got ", std::string(py::str(a.dtype())));
  options::expect((a.flags() & py::array::c_style) != 0, what,
                  ": expected a C-contiguous array; use numpy.ascontiguousarray");
}

cpu::View view_of(const char* what, const py::array& a) {
  options::expect(a.ndim() == 2 || a.ndim() == 3, what,
                  ": expected (rows, K) or (batches, rows, K), got ", int64_t(a.ndim()),
                  " dimensions");
  cpu::View v;
  v.batches = a.ndim() == 3 ? a.shape(0) : 1;
  v.rows = a.shape(a.ndim() - 2);
  v.columns = a.shape(a.ndim() - 1);
  return v;
}

cpu::Source source_of(const py::array& x, const std::string& dtype) {
  cpu::Source s;
  s.dtype = dtype_of(dtype);
  expect_array("x", x, raw_dtype(s.dtype));
  s.x = x.data();
  s.view = view_of("x", x);
  return s;
}

// Ask for huge pages before the first touch: page faults otherwise cost more than the kernels.
py::array new_array(const py::dtype& dtype, const Shape& shape) {
  py::array a(dtype, shape);
  cpu::prefer_huge_pages(a.mutable_data(), size_t(a.nbytes()));
  return a;
}

Shape with_last(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

Shape scales_shape(Shape shape, const FormatSpec& f, const cpu::View& v) {
  shape.back() = f.blocks(v.columns);
  shape[shape.size() - 2] = (v.rows + f.block_rows - 1) / f.block_rows;
  return shape;
}

using Text = std::optional<std::string>;

cpu::Options options_of(const std::string& format, const Text& scale_rule, const Text& recipe,
                        const std::string& rounding, const py::object& seed,
                        const std::string& clip, const std::optional<double>& tensor_scale) {
  std::optional<int64_t> word;
  if (!seed.is_none()) {
    // Any 64-bit pattern, signed or not.
    word = int64_t((py::int_(seed) & py::int_(~uint64_t(0))).cast<uint64_t>());
  }
  cpu::Options o = options::quantize(format, scale_rule, recipe, rounding, word, clip);
  if (tensor_scale) options::set_tensor_scale(o, float(*tensor_scale));
  return o;
}

using Signs = std::optional<py::array_t<float, py::array::c_style | py::array::forcecast>>;

cpu::Rotation rotation_of(int64_t size, int64_t length, const Signs& signs) {
  options::expect(!signs || signs->ndim() == 1, "signs: expected one dimension");
  return options::rotation(size, length, signs ? signs->data() : nullptr,
                           signs ? signs->size() : 0);
}

// ---- the verbs --------------------------------------------------------------------------------

py::tuple quantize(const py::array& x, const std::string& dtype, const std::string& format,
                   const Text& scale_rule, const Text& recipe, const std::string& rounding,
                   const py::object& seed, const std::string& clip,
                   const std::optional<double>& tensor_scale, int64_t rotation,
                   const Signs& signs) {
  const cpu::Source s = source_of(x, dtype);
  cpu::Options o = options_of(format, scale_rule, recipe, rounding, seed, clip, tensor_scale);
  if (rotation) o.rotation = rotation_of(rotation, s.view.columns, signs);
  py::array codes = new_array(py::dtype::of<uint8_t>(),
                              with_last(shape_of(x), o.format.row_bytes(s.view.columns)));
  py::array scales =
      new_array(scale_raw_dtype(o.format.scale), scales_shape(shape_of(x), o.format, s.view));
  float stored = 0.0f;
  uint8_t* codes_data = static_cast<uint8_t*>(codes.mutable_data());
  void* scales_data = scales.mutable_data();
  {
    const py::gil_scoped_release release;
    cpu::quantize(kParallel, s, o, codes_data, scales_data, &stored);
  }
  py::object given = py::none();
  if (o.has_tensor_scale()) given = py::float_(double(stored));
  return py::make_tuple(codes, scales, given);
}

py::array dequantize(const py::array& codes, const py::array& scales,
                     const std::optional<double>& tensor_scale, const std::string& format,
                     int64_t length, int64_t rows, const std::string& dtype) {
  const FormatSpec f = get_format(format);
  const DType out_dtype = dtype_of(dtype);
  expect_array("codes", codes, py::dtype::of<uint8_t>());
  expect_array("scales", scales, scale_raw_dtype(f.scale));
  cpu::View v = view_of("codes", codes);
  options::expect(length >= 0, "length: expected no less than 0, got ", length);
  options::expect(v.rows == rows && v.columns == f.row_bytes(length), "codes: expected ", rows,
                  " rows of ", f.row_bytes(length), " bytes, got ", v.rows, " of ", v.columns);
  v.columns = length;
  options::expect(shape_of(scales) == scales_shape(shape_of(codes), f, v), "scales: expected ",
                  (v.rows + f.block_rows - 1) / f.block_rows, " rows of ", f.blocks(length),
                  " for these codes");
  py::array out = new_array(raw_dtype(out_dtype), with_last(shape_of(codes), length));
  const float multiplier = float(tensor_scale.value_or(1.0));
  const uint8_t* codes_data = static_cast<const uint8_t*>(codes.data());
  const void* scales_data = scales.data();
  void* out_data = out.mutable_data();
  {
    const py::gil_scoped_release release;
    cpu::dequantize(kParallel, codes_data, scales_data, tensor_scale ? &multiplier : nullptr, f, v,
                    out_dtype, out_data);
  }
  return out;
}

py::array fake_quantize(const py::array& x, const std::string& dtype, const std::string& format,
                        const Text& scale_rule, const Text& recipe, const std::string& rounding,
                        const py::object& seed, const std::string& clip,
                        const std::optional<double>& tensor_scale) {
  const cpu::Source s = source_of(x, dtype);
  const cpu::Options o = options_of(format, scale_rule, recipe, rounding, seed, clip, tensor_scale);
  py::array out = new_array(raw_dtype(s.dtype), shape_of(x));
  void* out_data = out.mutable_data();
  {
    const py::gil_scoped_release release;
    cpu::fake_quantize(kParallel, s, o, out_data);
  }
  return out;
}

py::array hadamard(const py::array& x, const std::string& dtype, int64_t size, const Signs& signs) {
  const cpu::Source s = source_of(x, dtype);
  const cpu::Rotation r = rotation_of(size, s.view.columns, signs);
  py::array out = new_array(raw_dtype(s.dtype), shape_of(x));
  void* out_data = out.mutable_data();
  {
    const py::gil_scoped_release release;
    cpu::hadamard(kParallel, s, r, out_data);
  }
  return out;
}

py::array pack(const py::array& codes, int64_t bits) {
  options::bits(bits);
  expect_array("codes", codes, py::dtype::of<uint8_t>());
  const cpu::View v = view_of("codes", codes);
  const int64_t bytes = (v.columns * bits + 7) / 8;
  py::array out = new_array(py::dtype::of<uint8_t>(), with_last(shape_of(codes), bytes));
  const uint8_t* in = static_cast<const uint8_t*>(codes.data());
  uint8_t* out_data = static_cast<uint8_t*>(out.mutable_data());
  {
    const py::gil_scoped_release release;
    cpu::pack(kParallel, in, v.batches * v.rows, v.columns, int(bits), out_data, bytes);
  }
  return out;
}

py::array unpack(const py::array& packed, int64_t bits, int64_t length) {
  expect_array("packed", packed, py::dtype::of<uint8_t>());
  const cpu::View v = view_of("packed", packed);
  options::packed_bytes(v.columns, length, bits);
  py::array out = new_array(py::dtype::of<uint8_t>(), with_last(shape_of(packed), length));
  const uint8_t* in = static_cast<const uint8_t*>(packed.data());
  uint8_t* out_data = static_cast<uint8_t*>(out.mutable_data());
  {
    const py::gil_scoped_release release;
    cpu::unpack(kParallel, in, v.batches * v.rows, v.columns, length, int(bits), out_data);
  }
  return out;
}

py::object amax(const py::array& x, const std::string& dtype, const std::optional<int64_t>& block) {
  const cpu::Source s = source_of(x, dtype);
  if (!block) {
    float largest = 0.0f;
    {
      const py::gil_scoped_release release;
      largest = cpu::finite_amax(kParallel, s);
    }
    return py::float_(double(largest));
  }
  options::expect(*block >= 1, "block: expected at least 1, got ", *block);
  const int64_t blocks = (s.view.columns + *block - 1) / *block;
  py::array out = new_array(py::dtype::of<float>(), with_last(shape_of(x), blocks));
  float* out_data = static_cast<float*>(out.mutable_data());
  {
    const py::gil_scoped_release release;
    cpu::block_amax(kParallel, s, *block, out_data);
  }
  return out;
}

// A quantized matrix as its tuple holds it.
cpu::Packed packed_of(const char* what, const py::tuple& parts, int64_t k) {
  options::expect(parts.size() == 4, what, ": expected (codes, scales, tensor_scale, format)");
  const py::array codes = parts[0], scales = parts[1];
  cpu::Packed p;
  p.format = get_format(parts[3].cast<std::string>());
  expect_array(what, codes, py::dtype::of<uint8_t>());
  expect_array("scales", scales, scale_raw_dtype(p.format.scale));
  cpu::View v = view_of(what, codes);
  options::expect(v.columns == p.format.row_bytes(k), what, ": expected rows of ",
                  p.format.row_bytes(k), " bytes, got ", v.columns);
  v.columns = k;
  options::expect(shape_of(scales) == scales_shape(shape_of(codes), p.format, v),
                  "scales: expected ", (v.rows + p.format.block_rows - 1) / p.format.block_rows,
                  " rows of ", p.format.blocks(k), " for these codes");
  p.codes = static_cast<const uint8_t*>(codes.data());
  p.scales = scales.data();
  p.rows = v.batches * v.rows;
  p.batch_rows = v.rows;
  p.has_tensor_scale = !parts[2].is_none();
  if (p.has_tensor_scale) p.tensor_scale = parts[2].cast<float>();
  return p;
}

py::array matmul(const py::tuple& left, const py::tuple& right, int64_t k,
                 const std::optional<py::array>& bias, const std::string& bias_dtype,
                 const std::string& dtype) {
  cpu::MatmulCall c;
  c.right = packed_of("b", right, k);
  cpu::Packed packed;
  if (left.size() == 2) {
    const py::array a = left[0];
    const cpu::Source s = source_of(a, left[1].cast<std::string>());
    options::expect(s.view.columns == k, "a: expected rows of ", k, " elements, got ",
                    s.view.columns);
    c.a = s.x;
    c.a_dtype = s.dtype;
    c.m = s.view.batches * s.view.rows;
  } else {
    packed = packed_of("a", left, k);
    c.left = &packed;
    c.m = packed.rows;
  }
  c.n = c.right.rows;
  c.k = k;
  if (bias) {
    c.bias_dtype = dtype_of(bias_dtype);
    expect_array("bias", *bias, raw_dtype(c.bias_dtype));
    options::expect(bias->size() == c.n, "bias: expected ", c.n, " numbers, got ",
                    int64_t(bias->size()));
    c.bias = bias->data();
  }
  c.out_dtype = dtype_of(dtype);
  py::array out = new_array(raw_dtype(c.out_dtype), Shape{c.m, c.n});
  c.out = out.mutable_data();
  {
    const py::gil_scoped_release release;
    cpu::matmul(kParallel, c);
  }
  return out;
}

void set_level(const std::string& name) {
  options::expect(cpu::set_level(name.c_str()), "level: this processor has ", cpu::matmul_levels(),
                  " (or best), got ", name);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  using namespace py::literals;
  m.doc() = "The CPU verbs of pyfmt on NumPy arrays in row view.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& e) {
      py::set_error(PyExc_ValueError, e.what());
    }
  });
  m.def("quantize", &quantize, "x"_a, "dtype"_a, "format"_a, "scale_rule"_a = py::none(),
        "recipe"_a = py::none(), "rounding"_a = "nearest", "seed"_a = py::none(),
        "clip"_a = "symmetric", "tensor_scale"_a = py::none(), "rotation"_a = 0,
        "signs"_a = py::none());
  m.def("dequantize", &dequantize, "codes"_a, "scales"_a, "tensor_scale"_a, "format"_a, "length"_a,
        "rows"_a, "dtype"_a);
  m.def("fake_quantize", &fake_quantize, "x"_a, "dtype"_a, "format"_a, "scale_rule"_a = py::none(),
        "recipe"_a = py::none(), "rounding"_a = "nearest", "seed"_a = py::none(),
        "clip"_a = "symmetric", "tensor_scale"_a = py::none());
  m.def("hadamard", &hadamard, "x"_a, "dtype"_a, "size"_a, "signs"_a = py::none());
  m.def("matmul", &matmul, "left"_a, "right"_a, "k"_a, "bias"_a, "bias_dtype"_a, "dtype"_a);
  m.def("matmul_level", [] { return cpu::matmul_kernels().name; });
  m.def("matmul_levels", &cpu::matmul_levels);
  m.def("pack", &pack, "codes"_a, "bits"_a);
  m.def("unpack", &unpack, "packed"_a, "bits"_a, "length"_a);
  m.def("amax", &amax, "x"_a, "dtype"_a, "block"_a = py::none());
  m.def("level", &cpu::level);
  m.def("levels", &cpu::levels);
  m.def("set_level", &set_level, "name"_a);
  m.def("threads", &threads);
  m.def("set_threads", [](int n) { wanted_threads = n < 0 ? 0 : n; }, "n"_a);
}

}  // namespace pyfmt
