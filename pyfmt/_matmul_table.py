# SPDX-License-Identifier: Apache-2.0
"""Which GEMM path serves up to how many rows: data, written by bench/paths.py on one H200.

A row of the table has entries (path, limit) for each size of a weight: up to SIZES[0] rows (N), up
to SIZES[1], and more. They are read from the front; the first path whose limit, a number of rows of
a, is not exceeded and that can serve the call is taken. None: any number.

Rows: what the operands allow ("codes": both have four bits that few rows multiply as they are, see
multiplies_codes, and fold; "codes-int": so do they, and the weight's are integers; "fold": both
fold into fp8; "bf16": both are exact in bfloat16; "groups": the weight is of integers with float
scales, "small" ones are no multiples of 128 columns; "any"), the bits of a weight's code, and
"kept" for a weight that is kept expanded. Devices with block-scaled tensor cores take those first.
"""

from __future__ import annotations

SIZES = (6144, 16384)

Entries = tuple[tuple[str, int | None], ...]

TABLE: dict[str, tuple[Entries, ...]] = {
    "codes-4": (
        (("skinny", 8), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
    ),
    "codes-int-4": (
        (("skinny", 8), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
    ),
    "fold-4": (
        (("skinny", 4), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
    ),
    "fold-6": (
        (("skinny", 8), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
    ),
    "codes-4 kept": (
        (("skinny", 8), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", 128), ("wide", 192), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", 128), ("wide", 192), ("fold", None)),
    ),
    "codes-int-4 kept": (
        (("skinny", 4), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", 128), ("wide", 192), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", 128), ("wide", 192), ("fold", None)),
    ),
    "fold-4 kept": (
        (("skinny", 4), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
    ),
    "fold-6 kept": (
        (("skinny", 4), ("wide", 64), ("fold", None)),
        (("skinny", 4), ("wide", 64), ("fold", None)),
        (("skinny", 8), ("wide", 64), ("fold", None)),
    ),
    "bf16-4": (
        (("skinny", 8), ("wide", 1024), ("exact", None)),
        (("skinny", 8), ("wide", 2048), ("exact", None)),
        (("skinny", 8), ("wide", 1024), ("exact", None)),
    ),
    "bf16-6": (
        (("skinny", 8), ("wide", 1024), ("exact", None)),
        (("skinny", 8), ("wide", 2048), ("exact", None)),
        (("skinny", 8), ("wide", 1024), ("exact", None)),
    ),
    "bf16-8": (
        (("skinny", 8), ("wide", 1024), ("exact", None)),
        (("skinny", 8), ("wide", 1536), ("exact", None)),
        (("skinny", 8), ("wide", 1024), ("exact", None)),
    ),
    "bf16-4 kept": (
        (("skinny", 8), ("wide", 48), ("exact", None)),
        (("skinny", 8), ("wide", 192), ("exact", None)),
        (("skinny", 8), ("wide", 192), ("exact", None)),
    ),
    "bf16-6 kept": (
        (("skinny", 8), ("wide", 48), ("exact", None)),
        (("skinny", 8), ("wide", 64), ("exact", None)),
        (("skinny", 8), ("wide", 64), ("exact", None)),
    ),
    "bf16-8 kept": (
        (("skinny", 8), ("wide", 48), ("exact", None)),
        (("skinny", 8), ("wide", 192), ("exact", None)),
        (("skinny", 8), ("wide", 64), ("exact", None)),
    ),
    "groups-4": (
        (("skinny", 8), ("wide", None)),
        (("skinny", 8), ("wide", None)),
        (("skinny", 8), ("wide", None)),
    ),
    "groups-8": (
        (("skinny", 8), ("wide", None)),
        (("skinny", 8), ("wide", None)),
        (("skinny", 8), ("wide", None)),
    ),
    "small groups-4": (
        (("wide", None), ("skinny", 64)),
        (("wide", None), ("skinny", 64)),
        (("wide", None), ("skinny", 64)),
    ),
    "small groups-8": (
        (("wide", None), ("skinny", 64)),
        (("wide", None), ("skinny", 64)),
        (("wide", None), ("skinny", 64)),
    ),
    "any": (
        (("skinny", 48), ("skinny", 64), ("portable", None)),
        (("skinny", 64), ("portable", None)),
        (("skinny", 64), ("portable", None)),
    ),
}
