# SPDX-License-Identifier: Apache-2.0
"""Few rows of codes by codes: run on the CPU by the emulation, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pyfmt.ops  # noqa: E402, F401
from pyfmt import _matmul_paths as paths  # noqa: E402
from pyfmt import _torch_dense as dense  # noqa: E402
from pyfmt._matmul_table import TABLE  # noqa: E402
from pyfmt._torch_operands import Left, Out, Parts, Right  # noqa: E402
from pyfmt.formats import get_format  # noqa: E402
from tests import codes as by_codes  # noqa: E402
from tests.codes import Codes  # noqa: E402
from tests.cuda_rooms import emulated_and_on_device, emulated_ops  # noqa: E402

PAIRS = [("mxfp4", "mxfp4"), ("mxint4", "mxint4"), ("mxfp4", "mxint4"), ("mxint4", "mxfp4")]
BY_16 = [("nvfp4", "nvfp4"), ("nvint4", "nvint4"), ("nvfp4", "nvint4"), ("nvint4", "nvfp4")]


def make(ops: Any, device: str) -> Codes:
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the kernel under test is compiled for compute capability 9.0")
    return Codes(ops, device)


op = emulated_and_on_device(make)


def quantize(
    x: Any, name: str, rule: Any, recipe: Any, clip: str, rotation: int, signs: Any
) -> Any:
    """Codes, scales and tensor scale or None by the device's own quantize."""
    signs = None if signs is None else signs.to(x.device)
    given = (name, -1, rule, recipe, "nearest", None, clip, None, rotation, signs)
    codes, scales, scale = torch.ops.pyfmt.quantize(x, *given)
    return codes, scales, scale if scale.numel() else None


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_exact_sums(op: Codes, names: tuple[str, str]) -> None:
    for m, n, k in ((1, 32, 256), (5, 64, 768), (8, 96, 512), (16, 48, 512), (11, 176, 1280)):
        by_codes.exact_sums(op, names, m, n, k)
    for plan in ([1, 1, 1], [2, 0, 2], [3, 1, 99]):
        by_codes.exact_sums(op, names, 3, 112, 768, plan=plan)


@pytest.mark.parametrize("names", PAIRS[:2], ids="-".join)
def test_long_rows(op: Codes, names: tuple[str, str]) -> None:
    by_codes.exact_sums(op, names, 2, 32, 8448)
    by_codes.exact_sums(op, names, 16, 32, 4352)


@pytest.mark.parametrize("names", BY_16, ids="-".join)
def test_exact_sums_of_blocks_of_16(op: Codes, names: tuple[str, str]) -> None:
    for m, n, k in ((1, 32, 256), (3, 64, 768), (4, 96, 512), (2, 176, 1280), (4, 32, 8448)):
        by_codes.exact_sums(op, names, m, n, k)
    for plan in ([1, 1, 1], [2, 0, 2], [3, 1, 99]):
        by_codes.exact_sums(op, names, 3, 112, 768, plan=plan)


@pytest.mark.parametrize("names", PAIRS + BY_16, ids="-".join)
def test_extreme_codes_and_scales(op: Codes, names: tuple[str, str]) -> None:
    by_codes.extreme_sums(op, names)


@pytest.mark.parametrize("name", ["mxfp4", "mxint4", "nvfp4", "nvint4"])
def test_x_is_rounded_as_quantize_does(op: Codes, name: str) -> None:
    by_codes.rounds_like_quantize(op, name, quantize)


@pytest.mark.parametrize("name", ["nvfp4", "nvint4"])
def test_few_rows_are_rounded_on_the_way(op: Codes, name: str) -> None:
    by_codes.rounded_like_two_calls(op, name)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 7])
@pytest.mark.parametrize("name", ["nvfp4", "nvint4"])
def test_replays_of_a_graph_see_new_values(name: str, m: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the kernels under test are those of compute capability 9.0")
    by_codes.replays_see_new_values(name, m)


@pytest.mark.parametrize("names", PAIRS[:2] + BY_16[:2], ids="-".join)
def test_error_is_bounded(op: Codes, names: tuple[str, str]) -> None:
    for m, n, k in ((1, 64, 512), (13 if names in PAIRS else 4, 48, 2304)):
        by_codes.within_bound(op, names, m, n, k)


def test_bits_do_not_depend_on_the_rows(op: Codes) -> None:
    by_codes.same_for_any_rows(op, "mxfp4", 48, 1280, (1, 3, 8, 9, 15, 16))
    by_codes.same_for_any_rows(op, "nvfp4", 48, 1280, (1, 2, 3, 4))


def test_dtypes_and_bias(op: Codes) -> None:
    left, right = by_codes.operand("mxfp4", 3, 256, 1), by_codes.operand("mxfp4", 32, 256, 2)
    exact = torch.from_numpy(by_codes.value(left, 256) @ by_codes.value(right, 256).T)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for kind in (torch.bfloat16, torch.float16, torch.float32):
            bias = torch.arange(32).to(kind)
            y = op(left, right, bias=bias, dtype=dtype).cpu()
            assert y.dtype == dtype and torch.equal(y, (exact + bias.double()).float().to(dtype))


def test_refusals(op: Codes) -> None:
    for m, n, k, names, words in (
        (17, 32, 256, ("mxfp4", "mxfp4"), "1 to 16 rows"),
        (2, 40, 256, ("mxfp4", "mxfp4"), "multiple of 16 rows"),
        (2, 32, 288, ("mxfp4", "mxfp4"), "multiple of 256"),
        (9, 16, 8448, ("mxfp4", "mxfp4"), "8192 columns of 16 rows"),
        (2, 32, 256, ("mxfp8_e4m3", "mxfp4"), "MXFP4 and MXINT4"),
        (2, 32, 256, ("nvfp4", "mxfp4"), "NVINT4 by NVFP4"),
        (5, 32, 256, ("nvfp4", "nvfp4"), "1 to 4 rows"),
        (4, 16, 14592, ("nvint4", "nvint4"), "14336 columns"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(by_codes.operand(names[0], m, k, 1), by_codes.operand(names[1], n, k, 2))
    with pytest.raises(RuntimeError, match="bfloat16 rows"):
        op((torch.zeros(2, 256), "mxfp4"), by_codes.operand("mxfp4", 32, 256, 2))


def test_the_path_for_few_rows_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows to be rounded and packed ones, as the path hands them over; not where it cannot."""
    emulator = Codes(emulated_ops(), "cpu")
    called: list[Any] = []

    class Ops:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(emulator.ops, name)

    monkeypatch.setattr(Parts, "ops", Ops())
    m, n, k = 5, 32, 256
    w_codes, w_scales, _ = by_codes.operand("mxfp4", n, k, 1)
    facts = paths.facts("mxfp4")
    right = Right(emulator.there(w_codes), emulator.there(w_scales), None, facts, n)
    x = torch.randn(m, k).bfloat16()
    out = Out(None, torch.float32)
    left = Left(m, k, facts, x, rotation=32)
    y = dense.skinny(left, right, out)
    packed = quantize(x, "mxfp4", None, None, "symmetric", 32, None)
    given = Left(m, k, facts, None, *packed)
    assert torch.equal(y, dense.skinny(given, right, out))
    assert called.count("_matmul_codes") >= 2 and "_matmul_skinny" not in called
    called.clear()
    invariant = dense.skinny(left, right, Out(None, torch.float32, batch_invariant=True))
    assert "_matmul_codes" not in called and (invariant - y).abs().max() <= 1e-4 * y.abs().max()


def zeros(name: str, rows: int, k: int) -> Any:
    fmt = get_format(name)
    codes = torch.zeros(rows, fmt.row_bytes(k), dtype=torch.uint8)
    return codes, torch.full((rows, fmt.blocks(k)), 56, dtype=torch.uint8), name


def serves(op: Codes, left: Any, right: Any) -> bool:
    try:
        op(left, right)
    except RuntimeError as error:
        if "choose another path" not in str(error):
            raise
        return False
    return True


def test_the_table_knows_what_the_kernel_serves() -> None:
    emulator = Codes(emulated_ops(), "cpu")
    shapes = [(m, n, k) for m in (1, 8, 9, 16, 17) for n in (16, 24) for k in (256, 288)]
    shapes += [(9, 16, 8192), (9, 16, 8448), (8, 16, 16384), (1, 16, 16640)]
    shapes += [(4, 16, 256), (5, 16, 256), (4, 16, 14336), (1, 16, 14592)]
    others = [("mxfp8_e4m3", "mxfp4"), ("mxint4", "mxfp6_e2m3"), ("nvfp4", "mxfp4")]
    for a, w in (*PAIRS, *BY_16, *others):
        for m, n, k in shapes if (a, w) in (PAIRS[0], BY_16[0]) else shapes[:4]:
            known = paths.multiplies_codes(get_format(a), get_format(w), m, n, k)
            assert serves(emulator, zeros(a, m, k), zeros(w, n, k)) == known, (a, w, m, n, k)


def test_codes_that_lie_askew_are_refused() -> None:
    emulator = Codes(emulated_ops(), "cpu")
    codes, scales, name = by_codes.operand("mxfp4", 2, 256, 1)
    codes = emulator.there(codes)
    askew = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:].view(codes.shape)
    askew.copy_(codes)
    with pytest.raises(RuntimeError, match="codes: expected them at a multiple of 4 bytes"):
        emulator((askew, scales, name), by_codes.operand("mxfp4", 32, 256, 2))


def test_which_calls_it_serves() -> None:
    fp4, int4, fp8 = map(get_format, ("mxfp4", "mxint4", "mxfp8_e4m3"))
    assert paths.multiplies_codes(fp4, int4, 16, 64, 8192)
    assert paths.multiplies_codes(int4, fp4, 8, 16, 16384)
    for m, n, k in ((17, 64, 8192), (16, 64, 8448), (1, 40, 256), (1, 64, 288), (8, 64, 16640)):
        assert not paths.multiplies_codes(fp4, fp4, m, n, k)
    assert not paths.multiplies_codes(fp8, fp4, 1, 64, 256)
    call = paths.Call(fp4, "bfloat16", fp4, 8, 8192, 8192)
    machine = paths.Machine((9, 0))
    assert paths.row_of(call) == "codes-4" and paths.choose(call, machine) == "skinny"
    for a, w, row in (
        (fp4, int4, "codes-int-4"),
        (int4, int4, "codes-int-4"),
        (int4, fp4, "codes-4"),
    ):
        for kept in ("", "fold"):
            call = paths.Call(a, "bfloat16", w, 8, 8192, 8192, kept)
            assert paths.row_of(call) == (f"{row} kept" if kept else row) and row in TABLE
    # Integers become bytes in fewer instructions, so their times have a row of their own.
    for f, row in ((fp4, "codes-4"), (int4, "codes-int-4")):
        for m in (1, 8, 16, 64, 4096):
            call = paths.Call(f, "bfloat16", f, m, 28672, 8192)
            entries = TABLE[row][-1]
            want = next(path for path, limit in entries if limit is None or m <= limit)
            assert paths.choose(call, machine) == want
    call = paths.Call(fp4, "bfloat16", fp4, 8, 8192, 8192)
    assert "codes-4" in paths.explain(call, machine)["skinny"]
