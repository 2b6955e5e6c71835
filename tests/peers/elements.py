# SPDX-License-Identifier: Apache-2.0
"""ml_dtypes: casts of single elements."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from pyfmt.formats import FORMATS
from pyfmt.reference import codec
from tests import grids, mismatch
from tests.peers.common import check, ours


@check("ml_dtypes")
def _() -> None:
    peers = {
        "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
        "mxfp8_e5m2": ml_dtypes.float8_e5m2,
        "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
        "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
        "mxfp4": ml_dtypes.float4_e2m1fn,
    }
    for name, peer in peers.items():
        fmt = FORMATS[name]
        # Blocks led by Qmax itself have the scale 1, so that codes are plain casts.
        y = grids.element_grid(fmt.element)
        y = np.resize(y[np.abs(y) <= fmt.max], (len(y) // 31 + 1, 31))
        x = np.concatenate([np.full((len(y), 1), fmt.max, np.float32), y], axis=1)
        for rule in ("floor", "rceil"):
            codes, scales = ours(x, fmt, scale_rule=rule)
            assert (scales == 127).all()
            mismatch.same_codes(name, codes, x.astype(peer).view(np.uint8), fmt.element, x)
        e8m0 = np.arange(255, dtype=np.uint8)
        theirs = e8m0.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        mismatch.same_floats("e8m0", codec.decode_scale(e8m0, "e8m0"), theirs)
