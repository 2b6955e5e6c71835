# SPDX-License-Identifier: Apache-2.0
"""What a kernel template knows of a format: constants that follow from its row, never its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from pyfmt.formats import SCALES, Format


@dataclass(frozen=True, eq=False)
class Facts:
    """What a kernel template needs to know of a format and its options: constants only.

    The upper part is `Format.constexprs()`, the rest follows from it.
    """

    IS_INT: bool
    EXP: int
    MAN: int
    BIAS: int
    FRAC: int
    SIGNED: bool
    SPECIAL: str
    SCALE: str
    TENSOR_SCALE: bool
    BITS: int
    MAX: float  # the largest value
    LOW: float  # the smallest: -MAX, or one step further with clip="full"
    CLAMP: bool  # whether scaled values can lie beyond the largest
    NAN_CODE: int  # codes from here on, without the sign, are not numbers
    EMIN_BITS: int  # float32 bits of the smallest normal binade
    MAGIC: float  # times a binade: what rounds at the binade's step when added
    EMAX: int
    RULE_ADD: int  # what the scale rule adds to the bits of amax before the exponent is taken
    RECIPE: str
    TOP: float  # 448 * MAX
    INVERSE: float  # float32(1) / float32(MAX), rounded to float32
    NAN_SCALE: int
    STOCHASTIC: bool
    HALVES: bool  # whether 4-bit codes are float16 numbers in small: sign, then 3 bits of its field
    UNIT: float  # what brings the element's smallest binade to float16's, 2^-14
    key: tuple[Any, ...] = field(default=(), repr=False)  # all of the above, to compare by

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Facts) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _float32(value: float) -> float:
    """Round a Python float to float32."""
    return float(np.float32(value))


@lru_cache(maxsize=4096)
def facts(
    fmt: Format, rule: str = "", recipe: str = "", clip: str = "symmetric", stochastic: bool = False
) -> Facts:
    """Return the constants of a format quantized by one scale rule or recipe."""
    given: dict[str, Any] = fmt.constexprs()
    element, man, exp = fmt.element, fmt.element.man, fmt.element.exp
    step = 2.0**element.step_exp
    # The code is the number of steps in its binade plus binade << man, less that of the smallest
    # normal binade. MAGIC's own low bits hold this last term modulo the code's width. They are even
    # and so do not turn ties; without fraction bits `encode` goes another way.
    low = ((element.bias - 128) % 2**exp) << man
    quotient = element.max / 2.0**element.emax
    rule_add = {
        "": 0,
        "floor": 0,
        "ceil": 0x7FFFFF,
        "rceil": 0x7FFFFF - int((quotient - 1) * 2**23),
        "even": 1 << (22 - element.significand),
    }[rule]
    halves = (
        element.bits == 4
        and given["SIGNED"]
        and man in (1, 2)
        and given["SPECIAL"] == "none"
        and not (given["IS_INT"] or stochastic)
        # Scales times UNIT stay exact.
        and -7 <= element.bias <= 15
    )
    values: dict[str, Any] = dict(
        **{name: value for name, value in given.items() if name != "BLOCK"},
        BITS=element.bits,
        MAX=element.max,
        # By rceil and ceil E8M0 scales bring amax below MAX, but for those that E <= 127 stops.
        CLAMP=rule not in ("rceil", "ceil") or element.emax < 1,
        LOW=-(element.max + step) if clip == "full" and given["IS_INT"] else -element.max,
        NAN_CODE=element.max_code + 1,
        EMIN_BITS=(128 - element.bias) << 23 if not given["IS_INT"] else 0,
        MAGIC=2.0 ** (23 - man) * (1 + low * 2.0**-23),
        EMAX=element.emax,
        RULE_ADD=rule_add,
        RECIPE=recipe,
        TOP=_float32(SCALES["e4m3"].max * element.max),
        INVERSE=_float32(1.0 / _float32(element.max)),
        NAN_SCALE=SCALES[fmt.scale].nan_code,
        STOCHASTIC=stochastic,
        HALVES=halves,
        UNIT=2.0 ** (element.bias - 15) if halves else 1.0,
    )
    return Facts(**values, key=tuple(values.values()))
