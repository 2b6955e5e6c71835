# SPDX-License-Identifier: Apache-2.0
"""What every test shares: hypothesis profile, threads, markers, the rooms."""

from __future__ import annotations

import os

# Workers of pytest-xdist share the cores; one thread each, set before any library starts a pool.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

import importlib.util

import pytest
from hypothesis import HealthCheck, settings

from tests import rooms

settings.register_profile(
    "pyfmt",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# For a hunt: `pytest --hypothesis-profile=hunt tests/test_properties.py`.
settings.register_profile("hunt", deadline=None, max_examples=5000)
settings.load_profile("pyfmt")


def _no_gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device is visible"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    if hasattr(config, "workerinput") and importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords]
    reason = _no_gpu() if marked else None
    for item in marked:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=rooms.NAMES)
def room(request: pytest.FixtureRequest):
    """Every room that computes on this machine, the reference left out."""
    with rooms.opened(request.param) as found:
        yield found
