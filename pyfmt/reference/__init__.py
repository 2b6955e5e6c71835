# SPDX-License-Identifier: Apache-2.0
"""The specification as NumPy: slow, short, and the oracle that every kernel equals bit for bit.

The code asks its input for the array namespace, so it runs unchanged on NumPy and CuPy arrays.
"""

from pyfmt.reference.codec import decode, encode, philox
from pyfmt.reference.layout import from_blocked, pack, to_blocked, unpack
from pyfmt.reference.matmul import matmul, matmul_by_blocks
from pyfmt.reference.quantize import amax, dequantize, fake_quantize, quantize
from pyfmt.reference.rotate import hadamard

__all__ = [
    "amax",
    "decode",
    "dequantize",
    "encode",
    "fake_quantize",
    "from_blocked",
    "hadamard",
    "matmul",
    "matmul_by_blocks",
    "pack",
    "philox",
    "quantize",
    "to_blocked",
    "unpack",
]
