// SPDX-License-Identifier: Apache-2.0
// matmul_fold.h for floats of 6 bits.
#include "matmul_fold.cuh"

namespace pyfmt {
namespace cuda {
namespace folding {

Launch fold6_launch(const ElementSpec& e) {
  if (e == elements::e3m2) return launch_element<e3m2_element>;
  if (e == elements::e2m3) return launch_element<e2m3_element>;
  return nullptr;
}

}  // namespace folding
}  // namespace cuda
}  // namespace pyfmt
