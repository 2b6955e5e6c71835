# SPDX-License-Identifier: Apache-2.0
"""Which GEMM path serves up to how many rows: data, written by bench/paths.py on one H200.

Rows are read from the front; the first path whose limit is not exceeded and that can serve the call
is taken. A limit is a number of rows of a, or one for each size of a weight: up to SIZES[0]
elements, up to SIZES[1], and more. None: any number.

Keys: what the operands allow ("fold": both fold into fp8; "bf16": both are exact in bfloat16;
"groups": the weight is of integers with float scales; "any"), the bits of a weight's code, and
"kept" for a weight that is kept expanded.
"""

from __future__ import annotations

SIZES = (1 << 25, 1 << 27)

Limit = int | tuple[int | None, ...] | None

TABLE: dict[str, tuple[tuple[str, Limit], ...]] = {
    "fold-4": (("native", None), ("skinny", 16), ("wide", 384), ("fold", None)),
    "fold-6": (("native", None), ("skinny", 16), ("wide", 384), ("fold", None)),
    "fold-4 kept": (("skinny", 16), ("wide", 64), ("fold", None)),
    "fold-6 kept": (("skinny", 16), ("wide", 64), ("fold", None)),
    "bf16-4": (("native", None), ("skinny", 16), ("wide", 2048), ("exact", None)),
    "bf16-6": (("native", None), ("skinny", 16), ("wide", 1024), ("exact", None)),
    "bf16-8": (("native", None), ("skinny", 16), ("wide", 1024), ("exact", None)),
    "bf16-4 kept": (("skinny", 16), ("wide", 64), ("exact", None)),
    "bf16-6 kept": (("skinny", 16), ("exact", None)),
    "bf16-8 kept": (("skinny", 16), ("exact", None)),
    "groups-4": (("skinny", 16), ("wide", None)),
    "groups-8": (("skinny", 16), ("wide", None)),
    "any": (("skinny", 64), ("portable", None)),
}
