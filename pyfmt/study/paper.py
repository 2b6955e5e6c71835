# SPDX-License-Identifier: Apache-2.0
"""The numbers of arXiv 2510.25602 that ours stand beside, as printed there."""

from __future__ import annotations

# Crest factor below which the integer wins (section 4): rho = 1.5, and E4M3's own scales for NV.
CROSSOVERS = {
    ("mxint8", "mxfp8_e4m3"): 7.55,
    ("mxint6", "mxfp6_e2m3"): 1.96,
    ("mxint4", "mxfp4"): 2.04,
    ("nvint4", "nvfp4"): 2.39,
}

# Quartiles over the 10,752 tensors of Llama-3.1-8B of a tensor's mean crest factor (section 5.1),
# by block size, plain and rotated.
CREST = {
    16: {"plain": (2.13, 2.16, 2.39), "rotated": (2.06, 2.10, 2.11)},
    32: {"plain": (2.40, 2.48, 2.96), "rotated": (2.29, 2.35, 2.36)},
}

# Mean QSNR over the same tensors in dB (section 5.1), the scales of MX formats by rceil.
QSNR = {
    "mxint8": {"plain": 40.35, "rotated": 41.93},
    "mxfp8_e4m3": {"plain": 31.50, "rotated": 31.51},
    "mxint6": {"plain": 28.57, "rotated": 30.18},
    "mxfp6_e2m3": {"plain": 30.39, "rotated": 31.03},
    "mxint4": {"plain": 15.89, "rotated": 17.22},
    "mxfp4": {"plain": 17.98, "rotated": 18.79},
    "nvint4": {"plain": 20.55, "rotated": 21.65},
    "nvfp4": {"plain": 20.60, "rotated": 20.35},
}

# Training losses: of 1B parameters over 100B tokens; of 145M parameters by INT8 codes down to -128
# and to -127, blocks of 32 with E8M0 scales.
TRAINING: dict[str, float] = {"bf16": 2.6727, "mxint8": 2.6758, "mxfp8": 2.6767}
CLIPPING: dict[str, float] = {"full": 3.1299, "symmetric": 3.1269}
