# SPDX-License-Identifier: Apache-2.0
"""The command line from outside: exit codes, sentences on stderr, JSON, and nothing half done."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

import pyfmt
from pyfmt import FORMATS
from pyfmt.checkpoint import load
from pyfmt.cli import app

WIDE = {"COLUMNS": "200", "NO_COLOR": "1"}


def run(*words: object, columns: int = 200):
    """Run a command in this process."""
    env = WIDE | {"COLUMNS": str(columns)}
    return CliRunner().invoke(app, [str(word) for word in words], env=env)


def spawn(*words: object, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """Start `python -m pyfmt` as another process, as a shell's foreground does."""

    def prepare() -> None:
        # What runs in a shell's background ignores Ctrl-C, and so would its children.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if before is not None:
            before()

    env = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    return subprocess.Popen(
        [sys.executable, "-m", "pyfmt", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=prepare,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out, err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(
        {
            "one.weight": rng.standard_normal((8, 96)).astype(np.float32),
            "two.weight": rng.standard_normal((4, 2, 64)).astype(np.float16),
            "one.bias": np.zeros(8, np.float32),
            "ids": np.arange(4),
        },
        path,
    )
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file that takes seconds but no disk space: 256 tensors of 64 MB in a sparse file."""
    path, size = tmp_path / "large.safetensors", 4096 * 4096 * 4
    tensors = {
        f"w{i:03}": {
            "dtype": "F32",
            "shape": [4096, 4096],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(256)
    }
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 256 * size)
    return path


# Help and formats


@pytest.mark.parametrize("command", ["formats", "inspect", "quantize", "compare", "study"])
def test_help(command: str) -> None:
    result = run(command, "--help", columns=100)
    assert result.exit_code == 0
    assert "--json" in result.output
    assert run(command, "-h", columns=100).output == result.output


def test_bare_command_shows_help() -> None:
    result = run(columns=100)
    assert "Exit codes" in result.output
    assert all(
        name in result.output for name in ("formats", "inspect", "quantize", "compare", "study")
    )


def test_version() -> None:
    assert run("--version").output == f"pyfmt {pyfmt.__version__}\n"


def test_formats_table() -> None:
    result = run("formats")
    assert result.exit_code == 0
    for name in FORMATS:
        assert name in result.output
    assert "\x1b" not in result.output


def test_formats_json() -> None:
    rows = json.loads(run("formats", "--json").output)
    assert [row["name"] for row in rows] == list(FORMATS)
    nvfp4 = next(row for row in rows if row["name"] == "nvfp4")
    assert (nvfp4["block"], nvfp4["scale"], nvfp4["tensor_scale"]) == (16, "e4m3", True)
    assert nvfp4["bits_per_element"] == 4.5


def test_module_is_the_command_and_starts_light() -> None:
    """Help needs no torch and no safetensors; off a terminal there are no colours."""
    code = (
        "import sys; sys.argv = ['pyfmt', 'formats']\n"
        "from pyfmt.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'safetensors', 'triton'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    # os.environ, not the inherited environment: readline adds COLUMNS to the latter.
    env = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    status, out, err = outcome(spawn("formats"))
    assert (status, out, err) == (0, done.stdout, "")
    assert "\x1b" not in out


# Inspect


def test_inspect_json(model: Path) -> None:
    result = run("inspect", model, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    one, two = facts["tensors"]
    assert (one["name"], one["shape"], one["dtype"]) == ("one.weight", [8, 96], "F32")
    assert list(one["qsnr"]) == list(FORMATS)
    assert set(facts["left_out"]) == {"one.bias", "ids"}
    x = load(model)["one.weight"]
    for name in FORMATS:
        expected = pyfmt.metrics.qsnr(x, pyfmt.fake_quantize(x, name))
        assert one["qsnr"][name] == expected
    widths = {"4": 4, "6": 6, "8": 8}
    for text, bits in widths.items():
        rivals = {n: db for n, db in one["qsnr"].items() if FORMATS[n].bits == bits}
        assert one["best"][text] == max(rivals, key=lambda name: rivals[name])
    assert 1 < two["crest"]["16"] < two["crest"]["32"] < 6


def test_inspect_pieces_equal_the_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(run("inspect", model, "--json").stdout)
    monkeypatch.setattr("pyfmt.inspection.PIECE", 200)
    pieces = json.loads(run("inspect", model, "--json").stdout)
    for a, b in zip(whole["tensors"], pieces["tensors"], strict=True):
        assert a["crest"] == b["crest"] and a["best"] == b["best"]
        assert a["qsnr"] == pytest.approx(b["qsnr"], rel=1e-9)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_inspect_table(model: Path, columns: int) -> None:
    result = run("inspect", model, "--formats", "mxfp4, mxint4,e3m2-b16-e8m0", columns=columns)
    assert result.exit_code == 0
    assert "Best of 4 bits" in result.output and "Best of 6 bits: e3m2-b16-e8m0" in result.output
    assert "2 tensors" in result.output and "…" not in result.output
    assert ("crest" in result.output) and ("8x96" in result.output)


def test_inspect_extremes(tmp_path: Path) -> None:
    """Zeros, a NaN and an infinity are measured, not stumbled over; JSON stays JSON."""
    path = tmp_path / "odd.safetensors"
    odd = np.ones((2, 64), np.float32)
    odd[0, 0] = np.nan
    odd[1, 40] = np.inf
    safetensors.numpy.save_file({"zero": np.zeros((2, 64), np.float32), "odd": odd}, path)
    result = run("inspect", path, "--json")
    assert result.exit_code == 0
    odd_facts, zero_facts = json.loads(result.stdout)["tensors"]
    assert odd_facts["qsnr"]["mxfp4"] is None
    assert zero_facts["qsnr"]["nvfp4"] is None and zero_facts["crest"]["16"] is None


# Quantize


def test_quantize(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = run("quantize", model, "-f", "nvint4", "-o", out)
    assert result.exit_code == 0, result.output
    assert "2 of 4 tensors quantized to nvint4" in result.output
    back = load(out)
    expected = pyfmt.quantize(load(model)["two.weight"], "nvint4")
    assert back["two.weight"].codes.tobytes() == expected.codes.tobytes()


def test_quantize_json_and_options(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    words = ["--exclude", "two.*", "--axis", "0", "--scale-rule", "even", "--clip", "full"]
    result = run("quantize", model, "--format", "mxint8", "--output", out, "--json", *words)
    assert result.exit_code == 0, result.output
    tensors = {one["name"]: one for one in json.loads(result.stdout)["tensors"]}
    assert tensors["one.weight"]["action"] == "quantized"
    assert tensors["two.weight"]["reason"] == "excluded"
    expected = pyfmt.quantize(
        load(model)["one.weight"], "mxint8", axis=0, scale_rule="even", clip="full"
    )
    assert load(out)["one.weight"].codes.tobytes() == expected.codes.tobytes()


def test_quantize_and_inspect_refuse_quantized_files(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert run("quantize", model, "-f", "mxfp4", "-o", out).exit_code == 0
    for words in (["inspect", out], ["quantize", out, "-f", "mxfp4", "-o", tmp_path / "again"]):
        result = run(*words)
        assert result.exit_code == 2
        assert "is quantized already" in result.stderr


# Bad input: one sentence on stderr, exit code 2, nothing on stdout, no file


BAD = {
    "absent file": (["inspect", "absent.safetensors"], "no such file"),
    "folder": (["inspect", "."], "no regular file"),
    "no safetensors": (["inspect", "text"], "not a valid safetensors file"),
    "truncated": (["inspect", "cut"], "not a valid safetensors file"),
    "unknown format": (["quantize", "model.safetensors", "-f", "mxpf4", "-o", "o"], "'mxfp4'"),
    "unknown rule": (
        ["quantize", "model.safetensors", "-f", "mxfp4", "-o", "o", "--scale-rule", "flor"],
        "did you mean 'floor'",
    ),
    "unknown formats": (["inspect", "model.safetensors", "--formats", "mxfp4,x"], "unknown"),
    "wrong axis": (
        ["quantize", "model.safetensors", "-f", "mxfp4", "-o", "o", "--axis", "5"],
        "axis: 5 is outside",
    ),
    "pattern": (
        ["quantize", "model.safetensors", "-f", "mxfp4", "-o", "o", "--include", "z*"],
        "fits no tensor",
    ),
    "existing target": (
        ["quantize", "model.safetensors", "-f", "mxfp4", "-o", "text"],
        "already exists",
    ),
    "source is target": (
        ["quantize", "model.safetensors", "-f", "mxfp4", "-o", "model.safetensors"],
        "one file",
    ),
    "no folder": (
        ["quantize", "model.safetensors", "-f", "mxfp4", "-o", "no/where"],
        "no such folder",
    ),
    "no model": (["compare", "--model", ".", "--out", "out"], "no config.json"),
    "few sentences": (["compare", "--sentences", "3", "--out", "out"], "at least 12"),
    "no threads": (["compare", "--threads", "0", "--out", "out"], "positive number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    words, sentence = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("not a model", encoding="utf-8")
    Path("cut").write_bytes(model.read_bytes()[:-10])
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert sentence in result.stderr
    assert result.stderr.startswith("pyfmt: ") and result.stderr.count("\n") == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert left == {"model.safetensors", "text", "cut"}
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    "words",
    [["formts"], ["quantize"], ["inspect", "x", "--nonsense"], ["compare", "--threads", "x"]],
)
def test_wrong_usage(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    path = tmp_path / "[bold]m.safetensors"
    safetensors.numpy.save_file({"[red]w": np.ones((2, 32), np.float32)}, path)
    assert "[red]w" in run("inspect", path).stdout
    assert "[bold]m" in run("inspect", f"{path}x").stderr


# Interruptions and full disks, in a process of its own


@pytest.mark.parametrize(
    # -2 is a shell's 130 too: CPython leaves so when Ctrl-C met an exec, as inside a dataclass.
    ("number", "codes"),
    [(signal.SIGINT, (130, -2)), (signal.SIGTERM, (143,)), (signal.SIGKILL, (-9,))],
)
def test_interrupted_quantize_leaves_nothing(
    large: Path, tmp_path: Path, number: signal.Signals, codes: tuple[int, ...]
) -> None:
    out = tmp_path / "out" / "o.safetensors"
    out.parent.mkdir()
    # The slowest work there is, so that the signal meets it: stochastic rounding, a made format.
    slow = ("--rounding", "stochastic", "--seed", "1")
    process = spawn("quantize", large, "-f", "e3m2bias5-b24-fp32", *slow, "-o", out)
    # The source is opened just before the work starts.
    deadline = time.monotonic() + 30
    while not _reads(process.pid, large) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    status, written, err = outcome(process)
    assert status in codes and written == ""
    if number == signal.SIGINT:
        assert err == "pyfmt: interrupted; nothing was left half done\n"
    assert list(out.parent.iterdir()) == []


def _reads(pid: int, path: Path) -> bool:
    folder = Path(f"/proc/{pid}/fd")
    if not folder.is_dir():
        pytest.skip("needs /proc")
    try:
        return any(os.path.samefile(link, path) for link in folder.iterdir())
    except OSError:
        return False


def test_file_size_limit_is_a_full_disk(large: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    out = tmp_path / "out" / "o.safetensors"
    out.parent.mkdir()
    process = spawn("quantize", large, "-f", "mxint8", "-o", out, before=limit)
    status, written, err = outcome(process)
    assert (status, written) == (1, "")
    assert err.startswith("pyfmt: File too large while writing") and "nothing was written" in err
    assert err.count("\n") == 1
    assert list(out.parent.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_devices_are_no_targets(model: Path) -> None:
    result = run("quantize", model, "-f", "mxfp4", "-o", "/dev/full", "--overwrite")
    assert result.exit_code == 2
    assert "expected the name of a file" in result.stderr


def test_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        f"{sys.executable} -m pyfmt formats --json | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[\n"
    assert "Traceback" not in done.stderr
