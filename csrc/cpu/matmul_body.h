// SPDX-License-Identifier: Apache-2.0
// The products of one instruction-set level. Included as kernels_body.h is.
#pragma once

#if !defined(PYFMT_VNNI)
#define PYFMT_VNNI 0
#endif
#if !defined(PYFMT_BF16)
#define PYFMT_BF16 0
#endif

#include "matmul_stream.h"
#include "matmul_tile.h"

#define PYFMT_MATMUL(level)   \
  {level,                     \
   PYFMT_VNNI != 0,           \
   PYFMT_BF16 != 0,           \
   PYFMT_ISA::kPanel,         \
   PYFMT_ISA::stream_serves,  \
   PYFMT_ISA::stream_columns, \
   PYFMT_ISA::stream_prepare, \
   PYFMT_ISA::stream,         \
   PYFMT_ISA::left,           \
   PYFMT_ISA::tiles,          \
   PYFMT_ISA::tame}
