# SPDX-License-Identifier: Apache-2.0
"""English text that every Python brings along: the first sentences of its docstrings."""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

# Tests, vendored packages and generated tables hold little prose of their own.
_SKIP = re.compile(r"(^|/)(site-packages|dist-packages|test|tests|idle_test|lib2to3|config-[^/]*)/")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_sentences(count: int, folder: Path | None = None) -> list[str]:
    """Return `count` different sentences from the standard library's docstrings.

    A sentence is the first of a docstring, starts with a capital, ends with a full stop and has 5
    to 30 words. They are drawn evenly from the whole library in the order of file names, so one
    Python always gives the same ones.

    Raises ValueError where the library (or `folder`) has fewer.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    if count < 1:
        raise ValueError(f"sentences: expected a positive number, got {count}")
    found = _pool(folder)
    if len(found) < count:
        raise ValueError(
            f"sentences: {folder} has {len(found):,} that fit, got {count:,}; ask for fewer"
        )
    return [found[i * len(found) // count] for i in range(count)]


@lru_cache(maxsize=1)
def _pool(folder: Path) -> list[str]:
    return list(dict.fromkeys(_sentences(folder)))


def _sentences(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if _SKIP.search(path.relative_to(folder).as_posix()):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in _documented(tree):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            first = _SENTENCE_END.split(text, maxsplit=1)[0]
            if first[:1].isupper() and first.endswith(".") and 5 <= len(first.split()) <= 30:
                yield first


def _documented(module: ast.Module) -> Iterator[_Documented]:
    """Yield the module, its classes and functions and theirs; expressions are not walked."""
    pending: list[_Documented] = [module]
    for node in pending:
        yield node
        pending.extend(child for child in node.body if isinstance(child, _DEFINITIONS))
