// SPDX-License-Identifier: Apache-2.0
// torch.ops.pyfmt._scaled_gemm: RNE(factor * (a w^T)) with the factor on the device, which torch.mm
// has no place for. The cuBLASLt that torch brought along does it; its functions are looked up when
// first called, so that this library names no CUDA flavour. Its epilogue with a bias rounds twice,
// so _scaled_gemm_add adds to what is there: RNE(factor * (a w^T) + y).
//
// _folded_gemm: RNE((a w^T) * a_scale * w_scale + bias) of fp8 rows with a scale each, the function
// behind torch._scaled_mm, but with no workspace: with one it clears it first, and picks slower
// kernels for some shapes.
#include <map>
#include <mutex>

#include "cuda/expand.h"
#include "torch_device.h"

namespace pyfmt {
namespace {

using namespace tensors;

// The few names of cublasLt.h that are used here; numbers are part of its binary interface.
enum { kOk = 0, kCompute32F = 68, kReal32F = 0, kReal16BF = 14, kReal16F = 2 };
enum { kDescPointerMode = 2, kDescTransA = 3, kPointersOnDevice = 1, kTransposed = 1 };
enum { kDescEpilogue = 7, kDescBias = 8, kDescAScale = 17, kDescBScale = 18, kDescFast = 25 };
enum { kDescBiasType = 26, kDescAScaleMode = 31, kDescBScaleMode = 32 };
enum { kReal8E4M3 = 28, kReal8E5M2 = 29, kScaleOfEach = 3, kEpilogueBias = 4 };
enum { kPreferenceWorkspace = 1, kPreferenceReductions = 3, kReduceInPlace = 1, kReduceFloat = 2 };

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
using Handle = void*;

struct Library {
  int (*create)(Handle*);
  int (*desc_create)(Handle*, int, int);
  int (*desc_set)(Handle, int, const void*, size_t);
  int (*layout_create)(Handle*, int, uint64_t, uint64_t, int64_t);
  int (*preference_create)(Handle*);
  int (*preference_set)(Handle, int, const void*, size_t);
  int (*preference_destroy)(Handle);
  int (*heuristic)(Handle, Handle, Handle, Handle, Handle, Handle, Handle, int, Heuristic*, int*);
  int (*matmul)(Handle, Handle, const void*, const void*, Handle, const void*, Handle, const void*,
                const void*, Handle, void*, Handle, const Algorithm*, void*, size_t, void*);
  bool found = false;

  Library() {
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) return;
    found = find(torch, "cublasLtCreate", &create) &&
            find(torch, "cublasLtMatmulDescCreate", &desc_create) &&
            find(torch, "cublasLtMatmulDescSetAttribute", &desc_set) &&
            find(torch, "cublasLtMatrixLayoutCreate", &layout_create) &&
            find(torch, "cublasLtMatmulPreferenceCreate", &preference_create) &&
            find(torch, "cublasLtMatmulPreferenceSetAttribute", &preference_set) &&
            find(torch, "cublasLtMatmulPreferenceDestroy", &preference_destroy) &&
            find(torch, "cublasLtMatmulAlgoGetHeuristic", &heuristic) &&
            find(torch, "cublasLtMatmul", &matmul);
  }
  template <class F>
  static bool find(void* from, const char* name, F* function) {
    *function = reinterpret_cast<F>(dlsym(from, name));
    return *function != nullptr;
  }
};

const Library& library() {
  static const Library l;
  return l;
}

void must(int status, const char* what) {
  options::expect(status == kOk, "cuBLASLt: ", what, " failed with status ", status,
                  "; choose another path");
}

constexpr size_t kWorkspace = size_t(32) << 20;

// What a product of one shape is to be called with; made once, used from any thread.
struct Plan {
  Handle desc = nullptr, a = nullptr, b = nullptr, d = nullptr;
  Algorithm algorithm;
  size_t workspace = 0;
};

int type_code(ScalarType t) {
  return t == ScalarType::BFloat16 ? kReal16BF : t == ScalarType::Half ? kReal16F : kReal32F;
}

template <class T>
void set(Handle desc, int attribute, T value) {
  must(library().desc_set(desc, attribute, &value, sizeof value), "an attribute");
}

// y^T (n, m) = w (n, k) a^T (k, m), all by columns; turned: w lies as (k, n).
Plan make_plan(Handle handle, int64_t m, int64_t n, int64_t k, ScalarType dtype, bool turned) {
  const Library& l = library();
  Plan p;
  must(l.desc_create(&p.desc, kCompute32F, kReal32F), "a description");
  if (!turned) set(p.desc, kDescTransA, int32_t(kTransposed));
  set(p.desc, kDescPointerMode, int32_t(kPointersOnDevice));
  const int64_t across = turned ? n : k;
  must(l.layout_create(&p.a, kReal16BF, uint64_t(across), uint64_t(turned ? k : n), across),
       "a layout");
  must(l.layout_create(&p.b, kReal16BF, uint64_t(k), uint64_t(m), k), "a layout");
  must(l.layout_create(&p.d, type_code(dtype), uint64_t(n), uint64_t(m), n), "a layout");
  Handle preference = nullptr;
  must(l.preference_create(&preference), "a preference");
  const size_t room = kWorkspace;
  const uint32_t reductions = kReduceInPlace | kReduceFloat;  // no partial sums in the output dtype
  must(l.preference_set(preference, kPreferenceWorkspace, &room, sizeof room), "a preference");
  must(l.preference_set(preference, kPreferenceReductions, &reductions, sizeof reductions),
       "a preference");
  Heuristic found{};
  int count = 0;
  must(l.heuristic(handle, p.desc, p.a, p.b, p.d, p.d, preference, 1, &found, &count),
       "the search for an algorithm");
  l.preference_destroy(preference);
  options::expect(count > 0, "cuBLASLt: there is no algorithm for ", m, " x ", n, " x ", k,
                  "; choose another path");
  p.algorithm = found.algorithm;
  p.workspace = found.workspace;
  return p;
}

// A handle and the plans of one device.
struct Context {
  Handle handle = nullptr;
  std::map<std::array<int64_t, 5>, Plan> plans;
  std::map<std::array<int64_t, 7>, Plan> folded;
};

std::mutex& contexts_lock() {
  static std::mutex mutex;
  return mutex;
}
// To be called with the lock held.
Context& context_of(int32_t device) {
  static std::map<int32_t, Context> contexts;
  Context& c = contexts[device];
  if (!c.handle) must(library().create(&c.handle), "a handle");
  return c;
}

const Plan& plan_of(int32_t device, const std::array<int64_t, 5>& key, Handle* handle) {
  const std::lock_guard<std::mutex> lock(contexts_lock());
  Context& c = context_of(device);
  *handle = c.handle;
  const auto found = c.plans.find(key);
  if (found != c.plans.end()) return found->second;
  return c.plans[key] = make_plan(c.handle, key[0], key[1], key[2], ScalarType(key[3]), key[4]);
}

// y = factor * (a w^T) + beta * y; factor, beta: one float32 number each. w: (n, k), its rows or
// its columns contiguous.
void multiply_into(const Device& device, const Tensor& y, const Tensor& a, const Tensor& w,
                   const Tensor& factor, const Tensor& beta) {
  for (const Tensor* t : {&y, &w, &factor, &beta}) device.expect_here("operand", *t);
  const bool turned = w.dim() == 2 && !w.is_contiguous();
  const bool matrices =
      a.dim() == 2 && w.dim() == 2 && a.size(1) == w.size(1) && a.is_contiguous() &&
      (!turned || (w.stride(0) == 1 && w.stride(1) == w.size(0))) &&
      a.scalar_type() == ScalarType::BFloat16 && w.scalar_type() == ScalarType::BFloat16;
  options::expect(matrices, "a: expected contiguous bfloat16 matrices with rows of one length");
  options::expect(factor.numel() == 1 && factor.scalar_type() == ScalarType::Float &&
                      beta.numel() == 1 && beta.scalar_type() == ScalarType::Float,
                  "factor: expected one float32 number");
  const int64_t m = a.size(0), n = w.size(0), k = a.size(1);
  options::expect(y.dim() == 2 && y.size(0) == m && y.size(1) == n && y.is_contiguous(),
                  "y: expected a contiguous matrix of ", m, " x ", n);
  Handle handle = nullptr;
  const std::array<int64_t, 5> key{m, n, k, int64_t(y.scalar_type()), turned};
  const Plan& plan = plan_of(device.index, key, &handle);
  const Library& l = library();
  Tensor room = device.empty({int64_t(plan.workspace)}, ScalarType::Byte);
  const int status = l.matmul(
      handle, plan.desc, factor.const_data_ptr(), w.const_data_ptr(), plan.a, a.const_data_ptr(),
      plan.b, beta.const_data_ptr(), y.const_data_ptr(), plan.d, y.mutable_data_ptr(), plan.d,
      &plan.algorithm, room.mutable_data_ptr(), plan.workspace, device.stream);
  must(status, "the product");
}

// zero: a float32 number that is 0.
Tensor scaled_gemm(Tensor a, Tensor w, Tensor factor, Tensor zero, ScalarType dtype) {
  const Device device(a);
  Tensor y = device.empty({a.size(0), w.size(0)}, dtype);
  multiply_into(device, y, a, w, factor, zero);
  return y;
}

// one: a float32 number that is 1.
void scaled_gemm_add(Tensor y, Tensor a, Tensor w, Tensor factor, Tensor one) {
  multiply_into(Device(a), y, a, w, factor, one);
}

// ---- folded rows ------------------------------------------------------------------------------

// What tells one plan from another: m, n, k, the output's type, whether a is E5M2, whether a bias
// is added, whether sums stay in the tensor cores.
using FoldedKey = std::array<int64_t, 7>;

// y^T (n, m) = w (n, k) a^T (k, m); without a description where there is no algorithm.
Plan make_folded_plan(Handle handle, const FoldedKey& key) {
  const Library& l = library();
  const auto [m, n, k, dtype, e5m2, biased, fast] = key;
  Plan p;
  if (m == 0 || n % 16 || k % 16) return p;
  must(l.desc_create(&p.desc, kCompute32F, kReal32F), "a description");
  set(p.desc, kDescTransA, int32_t(kTransposed));
  set(p.desc, kDescFast, int8_t(fast));
  const int32_t each = kScaleOfEach;
  const bool known = l.desc_set(p.desc, kDescAScaleMode, &each, sizeof each) == kOk &&
                     l.desc_set(p.desc, kDescBScaleMode, &each, sizeof each) == kOk;
  // The search wants to see that there are scales, and how they are aligned; it reads none.
  const auto some = reinterpret_cast<const void*>(uintptr_t(256));
  set(p.desc, kDescAScale, some);
  set(p.desc, kDescBScale, some);
  if (biased) {
    set(p.desc, kDescEpilogue, int32_t(kEpilogueBias));
    set(p.desc, kDescBiasType, int32_t(kReal16BF));
    set(p.desc, kDescBias, some);
  }
  must(l.layout_create(&p.a, kReal8E4M3, uint64_t(k), uint64_t(n), k), "a layout");
  must(l.layout_create(&p.b, e5m2 ? kReal8E5M2 : kReal8E4M3, uint64_t(k), uint64_t(m), k),
       "a layout");
  must(l.layout_create(&p.d, type_code(ScalarType(dtype)), uint64_t(n), uint64_t(m), n),
       "a layout");
  Handle preference = nullptr;
  must(l.preference_create(&preference), "a preference");
  const size_t room = 0;
  must(l.preference_set(preference, kPreferenceWorkspace, &room, sizeof room), "a preference");
  Heuristic found{};
  int count = 0;
  const int status =
      known ? l.heuristic(handle, p.desc, p.a, p.b, p.d, p.d, preference, 1, &found, &count) : 1;
  l.preference_destroy(preference);
  if (status != kOk || count == 0) p.desc = nullptr;
  p.algorithm = found.algorithm;
  return p;
}

// To be called with the lock held.
const Plan& folded_plan(Context& c, const FoldedKey& key) {
  const auto found = c.folded.find(key);
  return found != c.folded.end() ? found->second : c.folded[key] = make_folded_plan(c.handle, key);
}

bool folded_gemm_serves(Tensor like, int64_t m, int64_t n, int64_t k, ScalarType dtype, bool e5m2,
                        bool biased, bool fast) {
  if (!library().found) return false;
  const Device device(like);
  const std::lock_guard<std::mutex> lock(contexts_lock());
  const FoldedKey key{m, n, k, int64_t(dtype), e5m2, biased, fast};
  return folded_plan(context_of(device.index), key).desc != nullptr;
}

// a, w: bytes of fp8 rows; the scales have a number for each row at least.
Tensor folded_gemm(Tensor a, bool e5m2, Tensor a_scale, Tensor w, Tensor w_scale,
                   std::optional<Tensor> bias, ScalarType dtype, bool fast) {
  const Device device(a);
  for (const Tensor* t : {&a_scale, &w, &w_scale}) device.expect_here("operand", *t);
  const bool matrices = a.dim() == 2 && w.dim() == 2 && a.size(1) == w.size(1) &&
                        a.is_contiguous() && w.is_contiguous() &&
                        a.scalar_type() == ScalarType::Byte && w.scalar_type() == ScalarType::Byte;
  options::expect(matrices, "a: expected contiguous matrices of bytes with rows of one length");
  const int64_t m = a.size(0), n = w.size(0), k = a.size(1);
  options::expect(a_scale.numel() >= m && w_scale.numel() >= n &&
                      a_scale.scalar_type() == ScalarType::Float &&
                      w_scale.scalar_type() == ScalarType::Float,
                  "a_scale: expected a float32 number for each row");
  if (bias) {
    device.expect_here("bias", *bias);
    options::expect(
        bias->numel() == n && bias->is_contiguous() && bias->scalar_type() == ScalarType::BFloat16,
        "bias: expected ", n, " bfloat16 numbers end to end");
  }
  Tensor y = device.empty({m, n}, dtype);
  const Library& l = library();
  options::expect(l.found, "cuBLASLt: torch brought none along; choose another path");
  const float one = 1.0f, zero = 0.0f;
  const FoldedKey key{m, n, k, int64_t(dtype), e5m2, bias.has_value(), fast};
  // The description holds the pointers until the product is launched.
  const std::lock_guard<std::mutex> lock(contexts_lock());
  Context& c = context_of(device.index);
  const Plan& plan = folded_plan(c, key);
  options::expect(plan.desc, "cuBLASLt: there is no algorithm for ", m, " x ", n, " x ", k,
                  "; choose another path");
  set(plan.desc, kDescAScale, w_scale.const_data_ptr());
  set(plan.desc, kDescBScale, a_scale.const_data_ptr());
  if (bias) set(plan.desc, kDescBias, bias->const_data_ptr());
  must(l.matmul(c.handle, plan.desc, &one, w.const_data_ptr(), plan.a, a.const_data_ptr(), plan.b,
                &zero, y.const_data_ptr(), plan.d, y.mutable_data_ptr(), plan.d, &plan.algorithm,
                nullptr, 0, device.stream),
       "the product");
  return y;
}

bool has_scaled_gemm() {
  return library().found;
}

}  // namespace
}  // namespace pyfmt

PYFMT_DEFINE(PYFMT_NAMESPACE, m) {
  m.def(
      "_scaled_gemm(Tensor a, Tensor w, Tensor factor, Tensor zero, "
      "ScalarType dtype) -> Tensor");
  m.def("_scaled_gemm_add(Tensor(a!) y, Tensor a, Tensor w, Tensor factor, Tensor one) -> ()");
  m.def("_has_scaled_gemm() -> bool");
  m.def(
      "_folded_gemm(Tensor a, bool e5m2, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, "
      "ScalarType dtype, bool fast) -> Tensor");
  m.def(
      "_folded_gemm_serves(Tensor like, int m, int n, int k, ScalarType dtype, bool e5m2, "
      "bool biased, bool fast) -> bool");
}

PYFMT_REGISTER(PYFMT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_has_scaled_gemm", TORCH_BOX(&pyfmt::has_scaled_gemm));
}

PYFMT_REGISTER(PYFMT_NAMESPACE, PYFMT_DISPATCH_KEY, m) {
  m.impl("_folded_gemm", TORCH_BOX(&pyfmt::folded_gemm));
  m.impl("_folded_gemm_serves", TORCH_BOX(&pyfmt::folded_gemm_serves));
  m.impl("_scaled_gemm", TORCH_BOX(&pyfmt::scaled_gemm));
  m.impl("_scaled_gemm_add", TORCH_BOX(&pyfmt::scaled_gemm_add));
}
