# SPDX-License-Identifier: Apache-2.0
"""What the documents say: README's code runs, generated files are fresh, the API is as pinned."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyfmt
from pyfmt import _codegen

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

PUBLIC = [
    "FORMATS",
    "Element",
    "Format",
    "QTensor",
    "__version__",
    "backends",
    "dequantize",
    "fake_quantize",
    "get_format",
    "hadamard",
    "load",
    "matmul",
    "nn",
    "ops",
    "quantize",
    "save",
]


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_readme_examples_run(code: str, tmp_path: Path) -> None:
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_readme_has_an_example_for_each_user() -> None:
    assert len(EXAMPLES) >= 3
    for word in ("torch.ops.pyfmt", "quantize_model", "import numpy"):
        assert any(word in code for code in EXAMPLES), word


def test_generated_files_are_fresh() -> None:
    for path, text in _codegen.outputs(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python -m pyfmt._codegen"


def test_codegen_check_finds_a_stale_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "README.md").write_text(f"{_codegen.BEGIN}\nold\n{_codegen.END}\n")
    monkeypatch.setattr(_codegen, "ROOT", tmp_path)
    assert _codegen.main(["--check"]) == 1
    assert "README.md: stale" in capsys.readouterr().out
    assert _codegen.main([]) == 0
    assert _codegen.main(["--check"]) == 0


def test_public_names_are_pinned() -> None:
    assert pyfmt.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(pyfmt, name) is not None


def test_import_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, pyfmt; heavy = {'torch', 'triton', 'cupy', 'rich', 'typer', 'safetensors', "
        "'matplotlib'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, f"import pyfmt loads {done.stderr}"


def test_version_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{pyfmt.__version__}]" in changelog
