// SPDX-License-Identifier: Apache-2.0
// All kernels of one instruction-set level. A level's source file names it, includes the system
// headers, sets the compiler's target and then includes this page.
#pragma once

#include "kernels_amax.h"
#include "kernels_dequantize.h"
#include "kernels_encode.h"
#include "kernels_layout.h"
#include "kernels_quantize.h"
#include "kernels_rotate.h"

#define PYFMT_KERNELS(level) \
  {level,                    \
   PYFMT_ISA::quantize,      \
   PYFMT_ISA::scale_blocks,  \
   PYFMT_ISA::dequantize,    \
   PYFMT_ISA::hadamard,      \
   PYFMT_ISA::block_amax,    \
   PYFMT_ISA::finite_amax,   \
   PYFMT_ISA::range_amax,    \
   PYFMT_ISA::pack,          \
   PYFMT_ISA::unpack}
