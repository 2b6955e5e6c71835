# SPDX-License-Identifier: Apache-2.0
"""Numbers and codes on the device: elements, block scales, float conversions, the random source.

Device functions over tensors of any shape. Float32 values stay float32; codes and bits are uint32.
A kernel knows a format by its `Facts`, never by a name. Compile with `enable_fp_fusion=False`: a
product and a sum are two roundings here, and where one is meant `tl.fma` says so.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pyfmt.formats import get_format
from pyfmt.triton_kernels.facts import facts

# The interpreter has no inline assembly, truncates where it should round to bfloat16, and reduces
# by a function of one's own element by element; the few places that mind ask this.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

INF_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
FLT_MAX = tl.constexpr((2.0 - 2.0**-23) * 2.0**127)
# 1.5 * 2^23: adding it rounds to an integer, on both sides of zero, and leaves it in the low bits.
ROUND = tl.constexpr(12582912.0)
TINY = tl.constexpr(2.0**-60)


# The scale type E4M3 is itself an element. The interpreter would not unwrap its attributes.
E4M3 = facts(get_format("e4m3fn-b1-fp32"))
if not INTERPRET:
    E4M3 = tl.constexpr(E4M3)


# ---- float32, bfloat16, float16 ---------------------------------------------------------------


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def to_float32(x):
    """Widen bfloat16, float16 or float32 to float32, exactly."""
    if x.dtype == tl.bfloat16:
        y = float_of(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def round_to(x, nan, DTYPE: tl.constexpr):
    """Round float32 to nearest even in DTYPE; the canonical quiet NaN where `nan` says so."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        if INTERPRET:
            bits = bits_of(x)
            y = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        else:
            y = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        y = tl.where(nan, 0x7FC0, y).to(tl.uint16)
    elif DTYPE == tl.float16:  # noqa: SIM300
        y = x.to(tl.float16).to(tl.uint16, bitcast=True)
        y = tl.where(nan, 0x7E00, y).to(tl.uint16)
    else:
        y = tl.where(nan, NAN_BITS, bits_of(x)).to(tl.uint32)
    return y.to(DTYPE, bitcast=True)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """Return the largest |x| along AXIS; NaN or infinity where one of them is NaN or infinite."""
    if INTERPRET:
        # Bits of magnitudes are in the order of the magnitudes, infinity and NaN above all.
        y = float_of(tl.max(tl.abs(x).to(tl.int32, bitcast=True), AXIS))
    else:
        y = tl.reduce(tl.abs(x), AXIS, _larger_or_nan)
    return y


@triton.jit
def not_finite(amax):
    return (bits_of(amax) & 0x7FFFFFFF) >= INF_BITS


# ---- elements ---------------------------------------------------------------------------------


@triton.jit
def _magnitude(y, F: tl.constexpr):
    """Return |y| saturated, 0 for negative numbers of an unsigned element, and its binade 2^e."""
    m = y
    if not F.SIGNED:
        m = tl.where(y > 0, y, 0.0)
    if F.CLAMP:
        m = tl.minimum(tl.abs(m), F.MAX)
    e = tl.maximum(bits_of(m) & INF_BITS, F.EMIN_BITS)
    return tl.abs(m), float_of(e)


@triton.jit
def _clamped(y, F: tl.constexpr):
    """Return y saturated to an integer element's range."""
    v = y
    if not F.SIGNED:
        v = tl.where(y > 0, y, 0.0)
    if F.CLAMP:
        v = tl.minimum(v, F.MAX)
        if F.SIGNED:
            v = tl.maximum(v, F.LOW)
    return v


@triton.jit
def _random_steps(t, x, random, F: tl.constexpr):
    """Return floor(t) + [random < (t - floor(t)) * 2^24] for t = |y| / step.

    What comes from an x that is not zero stays above zero: only random = 0 can tell.
    """
    if F.SIGNED:
        some = x != 0
    else:
        some = x > 0
    t = tl.where(some, tl.maximum(t, TINY), t)
    low = t.to(tl.int32)
    rest = (t - low.to(tl.float32)) * 16777216.0
    return low + (random.to(tl.float32) < rest).to(tl.int32)


@triton.jit
def _counting(e, F: tl.constexpr):
    """Return 2^23 e plus the number of binade e, for elements without fraction bits.

    Adding |y| rounds to a multiple of e and leaves the code in the low bits, so that a tie goes to
    the even code and not to the even multiple.
    """
    binade = (bits_of(e) - F.EMIN_BITS) >> 23
    return float_of(bits_of(e) + (23 << 23) + binade)


@triton.jit
def encode(y, x, random, F: tl.constexpr):
    """Round scaled values to the element's grid and return their codes.

    y: float32, finite or infinite, taken as exact; x: what y was scaled from (y itself where the
    product was rounded) and random: 24 random bits, both for stochastic rounding only.

    Floats add |y| to a magic number whose ulp is the step of y's binade, so that the adder rounds
    to nearest even; the low bits of the sum are then the number of steps.
    """
    if F.IS_INT:
        v = _clamped(y, F)
        if F.STOCHASTIC:
            n = _random_steps(tl.abs(v) * 2.0**F.FRAC, x, random, F)
            code = tl.where(y.to(tl.int32, bitcast=True) < 0, -n, n).to(tl.uint32, bitcast=True)
        else:
            code = bits_of(tl.fma(v, 2.0**F.FRAC, ROUND))
        code = code & (2**F.BITS - 1)
    else:
        m, e = _magnitude(y, F)
        if F.STOCHASTIC:
            t = m * float_of(((254 + F.MAN) << 23) - bits_of(e))
            n = _random_steps(t, x, random, F).to(tl.uint32, bitcast=True)
            code = n + ((bits_of(e) - F.EMIN_BITS) >> (23 - F.MAN))
        elif F.MAN == 0:
            code = bits_of(_counting(e, F) + m)
        else:
            code = bits_of(tl.fma(e, F.MAGIC, m)) + (bits_of(e) >> (23 - F.MAN))
        MAGNITUDE: tl.constexpr = 2 ** (F.EXP + F.MAN) - 1
        if F.SIGNED:
            # The sign from `top`, the rest from `code`: one three-input logic instruction.
            top = bits_of(y) >> (32 - F.BITS)
            code = top ^ ((top ^ code) & MAGNITUDE)
        else:
            code = code & MAGNITUDE
    return code


@triton.jit
def round_small(y, F: tl.constexpr):
    """Return |y| rounded to nearest on the element's grid; see F.HALVES.

    y: scaled values times F.UNIT. Less |y| from |y| * 2^(23 - MAN), the adder rounds at the step of
    y's own binade, and at that of the smallest one below it (1.5: far from both ends of its
    binade). Less, not plus: the sum's ulp is then never larger than what it is compared with.
    """
    m = tl.abs(y)
    if F.CLAMP:
        m = tl.minimum(m, F.MAX * F.UNIT)
        c = tl.maximum(m * 2.0 ** (23 - F.MAN), 1.5 * 2.0 ** (9 - F.MAN))
    else:
        c = tl.maximum(tl.abs(y * 2.0 ** (23 - F.MAN)), 1.5 * 2.0 ** (9 - F.MAN))
    return c - (c - m)


@triton.jit
def round_value(y, x, random, F: tl.constexpr):
    """Return the value of `encode(y)`, without going through the code."""
    if F.IS_INT:
        v = _clamped(y, F)
        if F.STOCHASTIC:
            n = _random_steps(tl.abs(v) * 2.0**F.FRAC, x, random, F).to(tl.float32)
            # 0 - 0 is +0: the zero of an integer has no sign.
            n = tl.where(y.to(tl.int32, bitcast=True) < 0, 0.0 - n, n)
        else:
            n = tl.fma(v, 2.0**F.FRAC, ROUND) - ROUND
        value = n * 2.0**-F.FRAC
    else:
        m, e = _magnitude(y, F)
        if F.STOCHASTIC:
            t = m * float_of(((254 + F.MAN) << 23) - bits_of(e))
            value = _random_steps(t, x, random, F).to(tl.float32) * (e * 2.0**-F.MAN)
        elif F.MAN == 0:
            value = (_counting(e, F) + m) - _counting(e, F)
        else:
            value = tl.fma(e, -(2.0 ** (23 - F.MAN)), tl.fma(e, 2.0 ** (23 - F.MAN), m))
        if F.SIGNED:
            value = float_of(bits_of(value) | (bits_of(y) & 0x80000000))
    return value


@triton.jit
def decode(code, F: tl.constexpr):
    """Return the float32 value of each code (bits above the code are ignored).

    A float's fields are moved to float32's places, where they mean 2^(BIAS - 127) times as much,
    subnormals included. NaN is whatever NaN the device makes.
    """
    top = code << (32 - F.BITS)
    if F.IS_INT:
        if F.SIGNED:
            n = (top.to(tl.int32, bitcast=True) >> (32 - F.BITS)).to(tl.float32)
        else:
            n = (code & (2**F.BITS - 1)).to(tl.int32).to(tl.float32)
        value = n * 2.0**-F.FRAC
    elif F.SPECIAL == "ieee" and F.SIGNED and F.EXP == 5 and F.BIAS == 15:
        # The upper bits of a float16, infinities and NaNs included.
        half = (top >> (32 - F.BITS)) << (16 - F.BITS)
        value = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        MAGNITUDE: tl.constexpr = (2 ** (F.EXP + F.MAN) - 1) << (23 - F.MAN)
        if F.SIGNED:
            # The arithmetic shift leaves the sign where it belongs.
            fields = (top.to(tl.int32, bitcast=True) >> (8 - F.EXP)).to(tl.uint32, bitcast=True)
            fields = fields & (MAGNITUDE | 0x80000000)
        else:
            fields = top >> (9 - F.EXP)
        if F.BIAS >= 0:
            value = float_of(fields) * 2.0 ** (127 - F.BIAS)
        else:
            value = float_of(fields) * 2.0**127 * 2.0**-F.BIAS
        if F.SPECIAL == "fn":
            value = tl.where((fields & MAGNITUDE) == MAGNITUDE, float("nan"), value)
        elif F.SPECIAL == "ieee":
            INFINITE: tl.constexpr = F.NAN_CODE << (23 - F.MAN)
            infinite = float_of((fields & 0x80000000) | INF_BITS)
            value = tl.where((fields & MAGNITUDE) == INFINITE, infinite, value)
            value = tl.where((fields & MAGNITUDE) > INFINITE, float("nan"), value)
    return value


# ---- block scales -----------------------------------------------------------------------------


@triton.jit
def _e8m0(amax, F: tl.constexpr):
    """Return the scale byte of blocks with largest magnitude amax, by the scale rule.

    Adding RULE_ADD to the bits carries into the exponent exactly where the rule rounds up.
    """
    bits = amax.to(tl.int32, bitcast=True)
    if F.EMAX >= 1:
        # A subnormal amax has byte 0 anyway.
        byte = ((bits + F.RULE_ADD) >> 23) - F.EMAX
    else:
        small = bits < 0x800000
        bits = tl.where(small, (amax * 16777216.0).to(tl.int32, bitcast=True), bits)
        byte = ((bits + F.RULE_ADD) >> 23) - F.EMAX - tl.where(small, 24, 0)
        byte = tl.where(bits == 0, 0, byte)
    return tl.minimum(tl.maximum(byte, 0), 254)


@triton.jit
def power_of_two(byte):
    """Return 2^(byte - 127) for 0 <= byte <= 254; byte 0 is the subnormal 2^-127."""
    return float_of(tl.maximum(byte << 23, 0x400000))


@triton.jit
def tensor_multipliers(t, DYNAMIC: tl.constexpr, F: tl.constexpr):
    """Return (the multiplier of amax, the tensor scale) from the tensor's amax or a given scale."""
    if F.RECIPE == "torchao":
        if DYNAMIC:
            tensor_scale = tl.div_rn(t, F.TOP)
        else:
            tensor_scale = t
        tensor_scale = tl.where(tensor_scale == 0, 1.0, tensor_scale)
        multiplier = tensor_scale
    else:
        if DYNAMIC:
            big = tl.where(t == 0, 1.0, tl.minimum(tl.div_rn(F.TOP, t), FLT_MAX))
            tensor_scale = tl.div_rn(1.0, big)
        else:
            big = tl.minimum(tl.div_rn(1.0, t), FLT_MAX)
            tensor_scale = t
        multiplier = big * F.INVERSE
    return multiplier, tensor_scale


@triton.jit
def block_scale(amax, multiplier, tensor_scale, F: tl.constexpr):
    """Return (stored scale bits, element multiplier, scale value) of blocks.

    multiplier, tensor_scale: of `tensor_multipliers`, for E4M3 scales with a tensor scale only.
    Where amax is not finite the stored scale is NaN and the rest is of no use.
    """
    if F.SCALE == "e8m0":
        byte = _e8m0(amax, F)
        stored = byte
        scale = power_of_two(byte)
        inverse = power_of_two(254 - byte)
    elif F.SCALE == "e4m3":
        if F.RECIPE == "torchao":
            s = tl.div_rn(tl.div_rn(amax, F.MAX), multiplier)
            s = tl.minimum(tl.maximum(s, 2.0**-6), 448.0)
        elif F.RECIPE == "nvidia":
            s = tl.minimum(amax * multiplier, FLT_MAX)
        else:
            s = tl.minimum(amax * F.INVERSE, FLT_MAX)
        stored = encode(s, s, 0, E4M3)
        scale = decode(stored, E4M3)
        if F.RECIPE == "torchao":
            inverse = tl.div_rn(tl.div_rn(1.0, multiplier), scale)
        elif F.RECIPE == "nvidia":
            inverse = tl.div_rn(1.0, scale * tensor_scale)
        else:
            inverse = tl.div_rn(1.0, scale)
        inverse = tl.minimum(inverse, FLT_MAX)
        if F.RECIPE != "torchao":
            inverse = tl.where(stored == 0, 0.0, inverse)
    else:
        s = bits_of(tl.div_rn(amax, F.MAX))
        if F.SCALE == "bf16":
            stored = tl.minimum((s + 0x7FFF + ((s >> 16) & 1)) >> 16, 0x7F7F)
            scale = float_of(stored << 16)
        elif F.SCALE == "fp16":
            # Beyond float16's largest number only saturation is left.
            half = tl.minimum(float_of(s), 65504.0).to(tl.float16)
            stored = half.to(tl.uint16, bitcast=True).to(tl.uint32)
            scale = half.to(tl.float32)
        else:
            stored = tl.minimum(s, 0x7F7FFFFF)
            scale = float_of(stored)
        inverse = tl.minimum(tl.div_rn(1.0, scale), FLT_MAX)
        inverse = tl.where(stored == 0, 0.0, inverse)
    stored = tl.where(not_finite(amax), F.NAN_SCALE, stored)
    return stored, inverse, scale


@triton.jit
def stored_as(bits, DTYPE: tl.constexpr):
    """Return stored scale bits in the dtype of the scales' tensor."""
    if DTYPE.primitive_bitwidth == 8:
        y = bits.to(tl.uint8)
    elif DTYPE.primitive_bitwidth == 16:
        y = bits.to(tl.uint16).to(DTYPE, bitcast=True)
    else:
        y = bits.to(tl.uint32).to(DTYPE, bitcast=True)
    return y


@triton.jit
def scale_value(stored, F: tl.constexpr):
    """Return the float32 value of stored scales (E8M0 byte b is 2^(b-127), 0xFF is NaN)."""
    if F.SCALE == "e8m0":
        byte = stored.to(tl.int32)
        value = tl.where(byte == 255, float("nan"), power_of_two(byte))
    elif F.SCALE == "e4m3":
        value = decode(stored.to(tl.uint32), E4M3)
    else:
        value = to_float32(stored)
    return value


# ---- random source ----------------------------------------------------------------------------


@triton.jit
def philox(low, high, key_low, key_high):
    """Return the four words of Philox4x32-10 for the counter (low, high, 0, 0); all uint32.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    c0 = low
    c1 = high
    c2 = low * 0
    c3 = low * 0
    k0 = key_low.to(tl.uint32)
    k1 = key_high.to(tl.uint32)
    for _ in tl.static_range(10):
        a = tl.umulhi(c0, 0xD2511F53)
        b = tl.umulhi(c2, 0xCD9E8D57)
        d = c0 * 0xD2511F53
        c0 = b ^ c1 ^ k0
        c1 = c2 * 0xCD9E8D57
        c2 = a ^ c3 ^ k1
        c3 = d
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def random24(index, key_low, key_high):
    """Return the 24-bit random integers of flat element indices (int64, any shape)."""
    counter = index >> 2
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    a, b, c, d = philox(low, high, key_low, key_high)
    lane = (index & 3).to(tl.int32)
    word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
    return (word >> 8).to(tl.int32)


@triton.jit
def random24_run(first, N: tl.constexpr, key_low, key_high):
    """Return the random integers of N elements from index `first` on, a multiple of 4: (N,)."""
    counter = (first >> 2) + tl.arange(0, N // 4)
    a, b, c, d = philox(counter.to(tl.uint32), (counter >> 32).to(tl.uint32), key_low, key_high)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return (tl.reshape(words, (N,)) >> 8).to(tl.int32)
