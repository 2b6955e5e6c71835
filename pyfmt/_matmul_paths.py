# SPDX-License-Identifier: Apache-2.0
"""The GEMM paths: what each can serve, and which one the table of the GPU chooses.

    native    block-scaled tensor cores (compute capability 10 and 12)
    skinny    few rows: the packed weight is read once
    wide      up to a few hundred rows: the packed weight is decoded beside the tensor cores' work
    fold      codes and scales as fp8 numbers times one power of two a row, fp8 tensor cores
    exact     element * scale as bfloat16 numbers, bfloat16 tensor cores
    packed    on the CPU: packed operands, decoded by the compiled kernels as they go
    portable  element * scale as float32 numbers, float32 sums

Nothing here looks at values, so that a choice needs no device and can be explained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pyfmt._matmul_table import SIZES, TABLE, Entries
from pyfmt.formats import FORMATS, Format, closest, get_format

PATHS = ("native", "skinny", "wide", "fold", "exact", "packed", "portable")
PRECISIONS = ("full", "fast")

# Rows of a that a call of the path takes at once where the batch must not matter.
INVARIANT_ROWS = {"skinny": 64, "exact": 256, "portable": 256}

# Blocks of activations that the kernels read as they are.
_READ_WHOLE = (16, 32, 64, 128, 256, 512, 1024)

# Formats whose codes the kernel for few rows multiplies as they are, up to how many rows of a, and
# by how long rows; half as many rows may be twice as long.
_CODES = ("mxfp4", "mxint4")
CODES_ROWS, CODES_LONGEST = 16, 8192
# The same of blocks of 16.
_CODES_BY_16 = ("nvfp4", "nvint4")
CODES_BY_16_ROWS, CODES_BY_16_LONGEST = 4, 14336
# Rows of a left operand that is quantized on the way which can be written as products want them.
ORDERED_ROWS = 32

_FOLDING = ("e2m1", "e3m2", "e2m3", "int4q2")
# The longest row of activations that is quantized and folded in one kernel.
LONGEST_FOLD = 32768


def check(path: str | None, precision: str) -> None:
    """Check the names of a path and a precision; ValueError with the closest known ones."""
    if path is not None and path not in PATHS:
        raise ValueError(f"path: unknown {path!r}{closest(path, PATHS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: unknown {precision!r}{closest(precision, PRECISIONS)}")


def folds(fmt: Format) -> bool:
    """Whether an element times a power of two is an fp8 number."""
    return fmt.scale == "e8m0" and fmt.block == 32 and fmt.element.name in _FOLDING


def folds_into_e5m2(fmt: Format) -> bool:
    """Whether the left operand is E5M2, with the wider window; e2m3 has too many digits."""
    return fmt.element.name != "e2m3"


def exact_in_bf16(fmt: Format) -> bool:
    """Whether element * scale has at most bfloat16's eight significant bits."""
    element = fmt.element
    if fmt.scale not in ("e8m0", "e4m3") or element.step_exp < -16 or element.emax > 16:
        return False
    return element.significand + 1 + (4 if fmt.scale == "e4m3" else 0) <= 8


def multiplies_codes(a: Format, w: Format, m: int, n: int, k: int) -> bool:
    """Whether few rows of a are multiplied as codes, on compute capability 9.0 and later."""
    if n % 16 or k % 256:
        return False
    if a.name in _CODES_BY_16 and w.name in _CODES_BY_16:
        return m <= CODES_BY_16_ROWS and k <= CODES_BY_16_LONGEST
    if a.name not in _CODES or w.name not in _CODES:
        return False
    return m <= CODES_ROWS and k <= CODES_LONGEST * (2 if m <= CODES_ROWS // 2 else 1)


def takes_ordered(w: Format, m: int, k: int) -> bool:
    """Whether `wide` takes few rows whose columns lie in the order of the weight's codes."""
    return m <= ORDERED_ROWS and k % 128 == 0 and w.scale in ("e8m0", "e4m3")


@dataclass(frozen=True)
class Facts:
    """What the paths ask of a format on every call, looked up by its key."""

    format: Format
    key: str
    exact: bool
    e5m2: bool
    two_level: bool  # has a tensor scale
    whole: int  # what a row must be a multiple of to be read as it is; 0: never

    @property
    def block_rows(self) -> int:
        return self.format.block_rows


@lru_cache(maxsize=1024)
def facts(key: str) -> Facts:
    """Facts of a format by its key; ValueError or TypeError for an unknown one."""
    fmt = get_format(key)
    block = fmt.block
    whole = max(block, 32) if isinstance(block, int) and block in _READ_WHOLE else 0
    return Facts(fmt, fmt.key, exact_in_bf16(fmt), folds_into_e5m2(fmt), fmt.tensor_scale, whole)


@dataclass(frozen=True)
class Machine:
    """What a device and the compiled library offer."""

    capability: tuple[int, int]
    skinny: bool = True
    wide: bool = True
    native: bool = True


@dataclass(frozen=True)
class Call:
    """What a choice depends on. a_format None: a is dense, of dtype `a_dtype`."""

    a_format: Format | None
    a_dtype: str
    w_format: Format
    m: int
    n: int
    k: int
    kept: str = ""
    batch_invariant: bool = False


def _left_in_bf16(call: Call) -> bool:
    if call.a_format is None:
        return call.a_dtype == "bfloat16"
    return exact_in_bf16(call.a_format)


def _both_fold(call: Call) -> bool:
    return call.a_format is not None and folds(call.a_format) and folds(call.w_format)


def _inexact(call: Call) -> str:
    left = call.a_format.name if call.a_format else f"a dense {call.a_dtype} a"
    which = left if not _left_in_bf16(call) else call.w_format.name
    return f"{which} is not exact in bfloat16"


def cannot(path: str, call: Call, machine: Machine) -> str | None:
    """Return why a path cannot serve a call, or None."""
    if call.batch_invariant and path not in INVARIANT_ROWS:
        return "its sums depend on how many rows there are"
    if path == "skinny":
        if not machine.skinny:
            return "the GPU library has no such kernel"
        if call.m > 64 and not call.batch_invariant:
            return f"it takes up to 64 rows of a, got {call.m}"
        return skinny_reason(call)
    if path == "wide":
        if not machine.wide or machine.capability[0] != 9:
            return "the GPU library has no such kernel for this device"
        return wide_reason(call)
    if path == "fold":
        if not _both_fold(call):
            return "an operand does not fold into fp8 (MXFP4, MXINT4 and MXFP6 do)"
        if machine.capability < (8, 9):
            return "the device has no fp8 tensor cores"
        return None
    if path == "exact":
        if machine.capability < (8, 0):
            return "the device has no bfloat16 tensor cores"
        if _left_in_bf16(call) and exact_in_bf16(call.w_format):
            return None
        return _inexact(call)
    if path == "native":
        return native_reason(call, machine)
    if path == "packed":
        return "it serves tensors on the CPU"
    return None


def skinny_reason(call: Call) -> str | None:
    """Why the kernel for few rows cannot take a weight, or None."""
    fmt = call.w_format
    if fmt in FORMATS.values():
        return None
    groups = fmt.element.name in ("int4", "int8") and fmt.scale in ("bf16", "fp16", "fp32")
    if groups and isinstance(fmt.block, int) and fmt.block % 32 == 0:
        return None
    return "it takes the formats of the table, and int4 and int8 in groups of a multiple of 32"


def wide_reason(call: Call) -> str | None:
    """Why the kernel for a few hundred rows cannot take the operands, or None."""
    if not _left_in_bf16(call):
        return _inexact(call)
    fmt = call.w_format
    groups = fmt.element.name in ("int4", "int8") and fmt.scale in ("bf16", "fp16", "fp32")
    if groups and (fmt.block == "row" or (isinstance(fmt.block, int) and fmt.block % 32 == 0)):
        return None
    if not groups and fmt in FORMATS.values():
        return None
    return "it takes the formats of the table, and int4 and int8 in groups of a multiple of 32"


def native_reason(call: Call, machine: Machine) -> str | None:
    """Why block-scaled tensor cores cannot take the operands, or None."""
    if machine.capability[0] not in (10, 12):
        return "the device has no block-scaled tensor cores"
    if not machine.native:
        return "triton is not installed; `pip install triton`"
    if call.a_format is None:
        return "a is dense, and block-scaled tensor cores take codes; quantize it"
    names = {call.a_format.name, call.w_format.name}
    if names == {"nvfp4"} or names <= {"mxfp8_e4m3", "mxfp8_e5m2"} or names == {"mxfp4"}:
        return None
    if names <= {"mxfp4", "mxfp8_e4m3", "mxfp8_e5m2"}:
        if machine.capability[0] == 10:
            return None
        return "on this device the instructions take MXFP4 with MXFP4 and MXFP8 with MXFP8"
    return "block-scaled tensor cores take MXFP4 and MXFP8, and NVFP4 with NVFP4"


def row_of(call: Call) -> str:
    """The row of the table that speaks for a call."""
    fmt = call.w_format
    bits = max(4, fmt.bits + fmt.bits % 2)
    kept = " kept" if call.kept == "fold" else ""
    if call.a_format is not None and multiplies_codes(
        call.a_format, fmt, CODES_ROWS, call.n, call.k
    ):
        # Codes of integers become bytes in fewer instructions.
        return f"codes{'-int' if fmt.element.kind == 'int' else ''}-4" + kept
    if _both_fold(call):
        return f"fold-{bits}" + kept
    if _left_in_bf16(call):
        if exact_in_bf16(fmt):
            return f"bf16-{bits}" + (" kept" if call.kept == "exact" else "")
        if wide_reason(call) is None:
            small = isinstance(fmt.block, int) and fmt.block % 128
            return f"{'small ' if small else ''}groups-{bits}"
    return "any"


# Up to how many rows of a `fold` leaves the weight packed (compute capability 9.0), by the table's
# sizes of a weight; for more rows it is written as fp8 for the library's GEMM.
PACKED = {
    "fold-4": (576, 512, 320),
    "fold-6": (320, 384, 256),
    "fold-4 kept": (64, 64, 64),
    "fold-6 kept": (64, 64, 64),
}


def _size(n: int) -> int:
    return sum(n > rows for rows in SIZES)


def stays_packed(bits: int, kept: bool, n: int, m: int) -> bool:
    """Whether `fold` multiplies by the packed weight, where the device has the kernel for it."""
    limits = PACKED.get(f"fold-{bits}{' kept' if kept else ''}")
    return limits is not None and m <= limits[_size(n)]


def entries_of(call: Call) -> Entries:
    """The table's entries (path, limit) for a call."""
    entries = TABLE[row_of(call)][_size(call.n)]
    # A kept weight is for the path that it was expanded for.
    return entries if call.kept else (("native", None), *entries)


@lru_cache(maxsize=4096)
def choose(call: Call, machine: Machine, path: str | None = None) -> str:
    """Return the path that serves a call: the one named, or the first of the table that can.

    Raises ValueError with the reason where a named path cannot.
    """
    if path is not None:
        check(path, "full")
        reason = cannot(path, call, machine)
        if reason is not None:
            raise ValueError(f"path {path!r} cannot serve this call: {reason}")
        return path
    if call.batch_invariant:
        order: Entries = tuple((name, None) for name in INVARIANT_ROWS)
    else:
        order = entries_of(call)
    for name, limit in order:
        if (limit is None or call.m <= limit) and cannot(name, call, machine) is None:
            return name
    # Beyond the table: whatever is fastest on most devices.
    for name in ("exact", "portable"):
        if cannot(name, call, machine) is None:
            return name
    raise AssertionError("the portable path serves every call")


def choose_on_cpu(call: Call, path: str | None = None) -> str:
    """Return the path of a call on CPU tensors; ValueError where a named one cannot serve.

    The kernels choose by the number of rows, and rows of their tiles are not those of streams.
    """
    if call.batch_invariant and path == "packed":
        raise ValueError(
            "path 'packed' cannot serve this call: its sums depend on how many rows there are; "
            "leave the path or batch_invariant out"
        )
    if path not in (None, "packed", "portable"):
        raise ValueError(
            f"path: tensors on cpu have the packed and the portable path, got {path!r}; leave it "
            "out (the others need CUDA tensors and the compiled GPU library)"
        )
    return path or ("portable" if call.batch_invariant else "packed")


def explain(call: Call, machine: Machine) -> dict[str, str]:
    """Return for each path "chosen" with the table's row, "able", or why it cannot serve."""
    chosen = choose(call, machine)
    answer = {}
    for name in PATHS:
        reason = cannot(name, call, machine)
        answer[name] = reason or "able"
        if name == chosen:
            answer[name] = f"chosen: {_why(name, call)}"
    return answer


def _why(name: str, call: Call) -> str:
    if call.batch_invariant:
        return "results must not depend on the batch"
    for path, limit in entries_of(call):
        if path == name and (limit is None or call.m <= limit):
            rows = "any number of rows" if limit is None else f"up to {limit} rows"
            return f"table row {row_of(call)!r}, {rows}, {call.m} here"
    return "no path of the table can serve the call"
