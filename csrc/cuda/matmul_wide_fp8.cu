// SPDX-License-Identifier: Apache-2.0
// matmul_wide.h for e4m3 and e5m2.
#include "matmul_wide.cuh"

namespace pyfmt {
namespace cuda {
namespace wide {

Launch fp8_launch(const FormatSpec& f) {
  if (is_mx(f, elements::e4m3fn)) return launch_format<Weights<e4m3fn_element, Scale::kE8M0>>;
  if (is_mx(f, elements::e5m2ieee)) return launch_format<Weights<e5m2ieee_element, Scale::kE8M0>>;
  return nullptr;
}

}  // namespace wide
}  // namespace cuda
}  // namespace pyfmt
