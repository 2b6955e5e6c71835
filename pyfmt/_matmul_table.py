# SPDX-License-Identifier: Apache-2.0
"""Which GEMM path serves up to how many rows: data, from bench/matmul.py on one H200.

Rows are read from the front; the first path whose limit is not exceeded and that can serve the call
is taken. A limit is a number of rows of a, or a pair: for weights of up to SMALL elements, and for
larger ones. None: any number.

Keys: what the operands allow ("fold": both fold into fp8; "bf16": both are exact in bfloat16;
"any"), the bits of a weight's code, and "kept" for a weight that is kept expanded for `fold`.
"""

from __future__ import annotations

SMALL = 1 << 26

Limit = int | tuple[int, int] | None

TABLE: dict[str, tuple[tuple[str, Limit], ...]] = {
    "fold-4": (("native", None), ("skinny", 16), ("fold", 128), ("wide", 384), ("fold", None)),
    "fold-6": (("native", None), ("skinny", 16), ("fold", 64), ("wide", 384), ("fold", None)),
    "fold-4 kept": (("skinny", 16), ("fold", None)),
    "fold-6 kept": (("skinny", 16), ("fold", None)),
    "bf16-4": (("native", None), ("skinny", 16), ("wide", 2048), ("exact", None)),
    "bf16-6": (("native", None), ("skinny", 16), ("wide", 1024), ("exact", None)),
    "bf16-8": (("native", None), ("skinny", 16), ("wide", 1024), ("exact", None)),
    "any": (("skinny", 16), ("wide", None)),
}

# Up to how many rows of a `fold` leaves the weight packed (compute capability 9.0); for more rows
# it is written as fp8 for the library's GEMM.
PACKED: dict[str, int] = {"fold-4": 128, "fold-6": 64, "fold-4 kept": 64, "fold-6 kept": 64}
