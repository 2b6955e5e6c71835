# SPDX-License-Identifier: Apache-2.0
"""The format table: elements, scales and block formats. Data and derived facts only.

This is the one place where a format's facts stand. The reference reads these rows directly;
`_codegen.py` turns them into `csrc/formats.inc` and into README's table. Adding a format is
adding a row to `FORMATS` and running `python -m pyfmt._codegen`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Literal

SCALE_RULES = ("rceil", "floor", "ceil", "even")
RECIPES = ("nvidia", "torchao", "single_level")
ROUNDINGS = ("nearest", "stochastic")
CLIPS = ("symmetric", "full")
LAYOUTS = ("rows", "blocked_128x4")
ROTATION_SIZES = tuple(2**k for k in range(1, 11))

FLT_MAX = (2.0 - 2.0**-23) * 2.0**127


def closest(value: object, known: Iterable[str]) -> str:
    """Return the sentence part "; did you mean 'x'?" for a misspelt name, or the whole list."""
    known = list(known)
    near = difflib.get_close_matches(str(value).lower(), known, n=3, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "; known are " + ", ".join(known)


@dataclass(frozen=True)
class Element:
    """One element of a block: a small float ExMy or an integer with a binary point.

    float: (-1)^s * 2^(max(e, 1) - bias) * ([e > 0] + m / 2^man), sign-magnitude codes
    int:   code / 2^frac, two's complement codes

    `exp`, `man` are field widths in bits (for an integer `man` is the width without the sign).
    `special` says which codes are not numbers: "none", "fn" (only the all-ones code is NaN, as in
    OCP E4M3) or "ieee" (the top exponent holds infinity and NaN, as in OCP E5M2).

    Source: OCP Microscaling Formats (MX) v1.0, section 5.3; OCP 8-bit Floating Point v1.0.
    Raises ValueError where the widths do not give 2 to 8 bits or a value leaves float32's range.
    """

    kind: Literal["float", "int"]
    exp: int
    man: int
    bias: int = 0
    frac: int = 0
    signed: bool = True
    special: Literal["none", "fn", "ieee"] = "none"

    @classmethod
    def fp(
        cls,
        exp: int,
        man: int,
        *,
        bias: int | None = None,
        signed: bool = True,
        special: Literal["none", "fn", "ieee"] = "none",
    ) -> Element:
        """Make the float element ExMy; the bias is 2^(exp-1) - 1 unless given (0 for E0My)."""
        if bias is None:
            bias = 2 ** (exp - 1) - 1 if exp > 0 else 0
        return cls("float", exp, man, bias=bias, signed=signed, special=special)

    @classmethod
    def integer(cls, bits: int, *, frac: int = 0, signed: bool = True) -> Element:
        """Make the integer element of `bits` bits, whose codes count steps of 2^-frac."""
        return cls("int", 0, bits - signed, frac=frac, signed=signed)

    def __post_init__(self) -> None:
        if self.kind not in ("float", "int"):
            raise ValueError(f"element kind: expected 'float' or 'int', got {self.kind!r}")
        if self.special not in ("none", "fn", "ieee"):
            raise ValueError(
                f"element special codes: expected 'none', 'fn' or 'ieee', got {self.special!r}"
            )
        for what in ("exp", "man", "bias", "frac"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"element {what}: expected an int, got {value!r}")
        if self.exp < 0 or self.man < 0:
            raise ValueError(
                f"element widths must not be negative, got exp={self.exp}, man={self.man}"
            )
        if not 2 <= self.bits <= 8:
            raise ValueError(
                f"element {self.name}: expected 2 to 8 bits in all, got {self.bits}; "
                "choose narrower or wider fields"
            )
        if self.kind == "int" and (self.exp or self.bias or self.special != "none"):
            raise ValueError("an integer element has no exponent, bias or special codes")
        if self.kind == "float" and self.frac:
            raise ValueError("a float element has no frac; its binary point comes from the bias")
        if self.special == "ieee" and (self.exp < 2 or self.man < 1):
            raise ValueError(f"element {self.name}: infinity and NaN need exp >= 2 and man >= 1")
        # Rounding works in float32 steps, so every step and every value must be a normal number.
        if not -100 <= self.step_exp <= 100 or not -100 <= self.emax <= 100:
            raise ValueError(
                f"element {self.name}: its values run from 2^{self.step_exp} to about "
                f"2^{self.emax}; expected exponents within -100 to 100; choose another bias"
            )

    @property
    def bits(self) -> int:
        return self.exp + self.man + self.signed

    @property
    def name(self) -> str:
        """The canonical name, for example e2m1, e4m3fn, ue4m3, e3m2bias5, int4, int8q6."""
        sign = "" if self.signed else "u"
        if self.kind == "int":
            return f"{sign}int{self.bits}" + (f"q{self.frac}" if self.frac else "")
        default = 2 ** (self.exp - 1) - 1 if self.exp > 0 else 0
        bias = f"bias{self.bias}" if self.bias != default else ""
        special = "" if self.special == "none" else self.special
        return f"{sign}e{self.exp}m{self.man}{special}{bias}"

    @property
    def max_code(self) -> int:
        """The code of the largest finite value."""
        top = 2 ** (self.exp + self.man) - 1
        if self.special == "fn":
            return top - 1
        if self.special == "ieee":
            return top - 2**self.man
        return top

    @property
    def step_exp(self) -> int:
        """log2 of the smallest positive value (the step of the grid next to zero)."""
        return -self.frac if self.kind == "int" else 1 - self.bias - self.man

    def decode(self, code: int) -> float:
        """Return the exact value of one code (NaN and infinities included)."""
        if not 0 <= code < 2**self.bits:
            raise ValueError(f"code: expected 0 to {2**self.bits - 1}, got {code}")
        if self.kind == "int":
            wrapped = self.signed and code > self.max_code
            return math.ldexp(code - 2**self.bits if wrapped else code, -self.frac)
        magnitude = code & (2 ** (self.exp + self.man) - 1)
        negative = code > 2 ** (self.exp + self.man) - 1
        e, m = magnitude >> self.man, magnitude & (2**self.man - 1)
        if magnitude > self.max_code:
            value = math.inf if self.special == "ieee" and m == 0 else math.nan
        else:
            value = math.ldexp(m + (2**self.man if e else 0), max(e, 1) - self.bias - self.man)
        return -value if negative else value

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of every code, in code order."""
        return tuple(self.decode(code) for code in range(2**self.bits))

    @cached_property
    def grid(self) -> tuple[float, ...]:
        """The non-negative finite values, ascending; grid[i] is the value of code i."""
        return self.values[: self.max_code + 1]

    @cached_property
    def midpoints(self) -> tuple[float, ...]:
        """The rounding boundaries between neighbouring magnitudes of `grid`."""
        return tuple((a + b) / 2 for a, b in zip(self.grid, self.grid[1:], strict=False))

    @property
    def max(self) -> float:
        """The largest finite value (Qmax)."""
        return self.decode(self.max_code)

    @property
    def emax(self) -> int:
        """floor(log2(Qmax)), the exponent of the largest value."""
        return math.frexp(self.max)[1] - 1

    @property
    def significand(self) -> int:
        """Fraction bits of the largest value: `man`, one less where no exponent hides a bit."""
        return self.man if self.exp else self.man - 1


@dataclass(frozen=True)
class Scale:
    """One kind of block scale: its width, storage dtype and largest value."""

    name: str
    bits: int
    dtype: str
    max: float
    nan_code: int


# fmt: off
SCALES: MappingProxyType[str, Scale] = MappingProxyType({s.name: s for s in (
    #     name   bits  stored as   largest value                 code of NaN
    Scale("e8m0",   8, "uint8",    2.0**127,                     0xFF),
    Scale("e4m3",   8, "uint8",    448.0,                        0x7F),
    Scale("bf16",  16, "bfloat16", (2.0 - 2.0**-7) * 2.0**127,   0x7FC0),
    Scale("fp16",  16, "float16",  65504.0,                      0x7E00),
    Scale("fp32",  32, "float32",  FLT_MAX,                      0x7FC00000),
)})
# fmt: on

Block = int | tuple[int, int] | Literal["row"]


@dataclass(frozen=True)
class Format:
    """A block format: elements of one kind sharing one scale per block.

    value = element * scale (* tensor_scale)

    `block` counts elements along the quantized axis; "row" makes the whole axis one block; a pair
    (rows, columns) makes square blocks over the last two axes. `scale` names a row of SCALES.
    With `tensor_scale` (E4M3 scales only) one float32 multiplier is shared by the whole tensor.

    Raises ValueError or TypeError for a block or scale that cannot be.
    """

    element: Element
    block: Block
    scale: str
    tensor_scale: bool = False
    label: str | None = field(default=None, compare=False)
    source: str = field(default="user-made", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.element, Element):
            raise TypeError(
                f"element: expected a pyfmt.Element, got {type(self.element).__name__}; "
                "make one with Element.fp(exp, man) or Element.integer(bits)"
            )
        if isinstance(self.block, list):
            object.__setattr__(self, "block", tuple(self.block))
        sizes = self.block if isinstance(self.block, tuple) else (self.block,)
        good = self.block == "row" or (
            all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes)
            and len(sizes) in ((2,) if isinstance(self.block, tuple) else (1,))
        )
        if not good:
            raise ValueError(
                "block: expected a positive int, a pair (rows, columns) of them or 'row', "
                f"got {self.block!r}"
            )
        if self.scale not in SCALES:
            raise ValueError(f"scale: unknown {self.scale!r}{closest(self.scale, SCALES)}")
        if self.tensor_scale and self.scale != "e4m3":
            raise ValueError(
                f"tensor_scale: only formats with an e4m3 scale have one, got scale {self.scale!r}"
            )

    @property
    def spec(self) -> str:
        """The canonical spelling of the facts, for example e2m1-b16-e4m3-ts."""
        block = "x".join(map(str, self.block)) if isinstance(self.block, tuple) else self.block
        return f"{self.element.name}-b{block}-{self.scale}" + ("-ts" if self.tensor_scale else "")

    @property
    def name(self) -> str:
        """What people read: the label (a row's name), or the canonical spelling."""
        return self.label or self.spec

    @property
    def key(self) -> str:
        """What ops and files carry: the row's name, else the spelling; get_format(f.key) == f."""
        row = FORMATS.get(self.name)
        return self.name if row is self or row == self else self.spec

    @property
    def bits(self) -> int:
        return self.element.bits

    @property
    def max(self) -> float:
        return self.element.max

    @property
    def block_rows(self) -> int:
        """Rows covered by one block (1 unless blocks are square)."""
        return self.block[0] if isinstance(self.block, tuple) else 1

    def block_columns(self, length: int) -> int:
        """Elements along the quantized axis covered by one block, for an axis of `length`."""
        if self.block == "row":
            return max(length, 1)
        return self.block[1] if isinstance(self.block, tuple) else self.block

    def blocks(self, length: int) -> int:
        """Blocks along an axis of `length`, the last one padded."""
        return -(-length // self.block_columns(length))

    def padded(self, length: int) -> int:
        """`length` rounded up to whole blocks."""
        return self.blocks(length) * self.block_columns(length)

    def row_bytes(self, length: int) -> int:
        """Bytes of packed codes for one row of `length` elements."""
        return -(-self.padded(length) * self.bits // 8)

    @property
    def bytes_per_block(self) -> float:
        """Bytes of codes and scale for one block; NaN for whole-row blocks."""
        if self.block == "row":
            return math.nan
        return (self._block_elements * self.bits + SCALES[self.scale].bits) / 8

    @property
    def bits_per_element(self) -> float:
        """Bits for an element with its share of the block scale (none for whole rows)."""
        if self.block == "row":
            return float(self.bits)
        return self.bits + SCALES[self.scale].bits / self._block_elements

    @property
    def _block_elements(self) -> int:
        return self.block_rows * self.block_columns(1)

    @property
    def scale_rules(self) -> tuple[str, ...]:
        """Scale rules the format takes, the default first; empty unless the scale is E8M0."""
        return SCALE_RULES if self.scale == "e8m0" else ()

    @property
    def recipes(self) -> tuple[str, ...]:
        """Recipes the format takes, the default first; empty unless the scale is E4M3."""
        if self.scale != "e4m3":
            return ()
        return RECIPES if self.tensor_scale else ("single_level",)

    def constexprs(self) -> dict[str, Any]:
        """The facts a kernel template needs, by the names that the kernels use."""
        return {
            "IS_INT": self.element.kind == "int",
            "EXP": self.element.exp,
            "MAN": self.element.man,
            "BIAS": self.element.bias,
            "FRAC": self.element.frac,
            "SIGNED": self.element.signed,
            "SPECIAL": self.element.special,
            "BLOCK": self.block,
            "SCALE": self.scale,
            "TENSOR_SCALE": self.tensor_scale,
        }

    def __str__(self) -> str:
        return self.name


_E4M3 = Element.fp(4, 3, special="fn")
_E5M2 = Element.fp(5, 2, special="ieee")
_E2M3 = Element.fp(2, 3)
_E3M2 = Element.fp(3, 2)
_E2M1 = Element.fp(2, 1)
_MX = "OCP MX v1.0"
_PAPER = "arXiv 2510.25602"
_NV = "NVIDIA NVFP4"

# fmt: off
FORMATS: MappingProxyType[str, Format] = MappingProxyType({f.name: f for f in (
    #      element                    block  scale   tensor scale  name         source
    Format(_E4M3,                     32,    "e8m0", False, "mxfp8_e4m3", _MX),
    Format(_E5M2,                     32,    "e8m0", False, "mxfp8_e5m2", _MX),
    Format(_E2M3,                     32,    "e8m0", False, "mxfp6_e2m3", _MX),
    Format(_E3M2,                     32,    "e8m0", False, "mxfp6_e3m2", _MX),
    Format(_E2M1,                     32,    "e8m0", False, "mxfp4",      _MX),
    Format(Element.integer(8, frac=6),    32,    "e8m0", False, "mxint8",     _MX),
    Format(Element.integer(6, frac=4),    32,    "e8m0", False, "mxint6",     _PAPER),
    Format(Element.integer(4, frac=2),    32,    "e8m0", False, "mxint4",     _PAPER),
    Format(_E2M1,                     16,    "e4m3", True,  "nvfp4",      _NV),
    Format(Element.integer(4),            16,    "e4m3", True,  "nvint4",     _PAPER),
    Format(Element.integer(4),            128,   "bf16", False, "int4",       "weight-only groups"),
    Format(Element.integer(8),            128,   "bf16", False, "int8",       "weight-only groups"),
)})
# fmt: on

_ELEMENT = re.compile(
    r"(?P<sign>u?)(?:int(?P<bits>\d)(?:q(?P<frac>-?\d+))?"
    r"|e(?P<exp>\d)m(?P<man>\d)(?P<special>fn|ieee)?(?:bias(?P<bias>-?\d+))?)"
)
_SPEC = re.compile(
    r"(?P<element>[a-z0-9-]+?)-b(?P<block>row|\d+(?:x\d+)?)-(?P<scale>[a-z0-9]+)(?P<ts>-ts)?"
)


def get_element(name: str) -> Element:
    """Return the element of a canonical name such as e2m1, e4m3fn, ue4m3 or int8q6.

    Raises ValueError for a name outside the grammar `Element.name` writes.
    """
    match = _ELEMENT.fullmatch(name)
    if match is None:
        raise ValueError(
            f"element: cannot read {name!r}; expected a name such as 'e2m1', 'e4m3fn', 'int4' or "
            "'int8q6'"
        )
    signed = not match["sign"]
    if match["bits"]:
        return Element.integer(int(match["bits"]), frac=int(match["frac"] or 0), signed=signed)
    return Element.fp(
        int(match["exp"]),
        int(match["man"]),
        bias=None if match["bias"] is None else int(match["bias"]),
        signed=signed,
        special=match["special"] or "none",  # type: ignore[arg-type]
    )


def _with_row_name(format: Format) -> Format:
    """Give a format the name and source of the row that has the same facts, where one has."""
    for row in FORMATS.values():
        if row == format:
            return row
    return format


def get_format(
    name: str | Format,
    *,
    block: Block | None = None,
    scale: str | None = None,
    tensor_scale: bool | None = None,
) -> Format:
    """Return a format by name or canonical spelling, with some facts changed if asked.

    `get_format("int4", block=64)`, `get_format("e3m2-b32-e8m0")`, `get_format(fmt)` for a Format.

    Raises ValueError (with the closest names) for an unknown name, TypeError for other types.
    """
    if block is None and scale is None and tensor_scale is None:
        return name if isinstance(name, Format) else _lookup(name)
    changes = {"block": block, "scale": scale, "tensor_scale": tensor_scale}
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes.get("scale") not in (None, "e4m3"):
        changes.setdefault("tensor_scale", False)
    base = name if isinstance(name, Format) else _lookup(name)
    return _with_row_name(replace(base, label=None, source="user-made", **changes))  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _parse(name: str) -> Format:
    match = _SPEC.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown format {name!r}{closest(name, FORMATS)}")
    block: Block
    if match["block"] == "row":
        block = "row"
    elif "x" in match["block"]:
        rows, columns = match["block"].split("x")
        block = (int(rows), int(columns))
    else:
        block = int(match["block"])
    return _with_row_name(
        Format(get_element(match["element"]), block, match["scale"], match["ts"] is not None)
    )


def _lookup(name: str) -> Format:
    if not isinstance(name, str):
        raise TypeError(
            f"format: expected a name or a pyfmt.Format, got {type(name).__name__}; "
            "names are in pyfmt.FORMATS"
        )
    return FORMATS.get(name) or _parse(name)
