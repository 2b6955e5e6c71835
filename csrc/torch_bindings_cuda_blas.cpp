// SPDX-License-Identifier: Apache-2.0
// torch.ops.pyfmt._scaled_gemm: RNE(factor * (a w^T)) with the factor on the device, which torch.mm
// has no place for. The cuBLASLt that torch brought along does it; its functions are looked up when
// first called, so that this library names no CUDA flavour. Its epilogue with a bias rounds twice,
// so _scaled_gemm_add adds to what is there: RNE(factor * (a w^T) + y).
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
};

const Plan& plan_of(int32_t device, const std::array<int64_t, 5>& key, Handle* handle) {
  static std::mutex mutex;
  static std::map<int32_t, Context> contexts;
  const std::lock_guard<std::mutex> lock(mutex);
  Context& c = contexts[device];
  if (!c.handle) must(library().create(&c.handle), "a handle");
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
}

PYFMT_REGISTER(PYFMT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_has_scaled_gemm", TORCH_BOX(&pyfmt::has_scaled_gemm));
}

PYFMT_REGISTER(PYFMT_NAMESPACE, PYFMT_DISPATCH_KEY, m) {
  m.impl("_scaled_gemm", TORCH_BOX(&pyfmt::scaled_gemm));
  m.impl("_scaled_gemm_add", TORCH_BOX(&pyfmt::scaled_gemm_add));
}
